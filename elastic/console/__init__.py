"""What a terminal or a log file shows: progress bars, log lines between them, tables. No torch."""

from elastic.console.bar import Bar
from elastic.console.lasting import keep_going, lost, write_now
from elastic.console.lines import clear_of_bars, say
from elastic.console.text import short, table

__all__ = ["Bar", "clear_of_bars", "keep_going", "lost", "say", "short", "table", "write_now"]
