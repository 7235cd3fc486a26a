"""Progress bars: drawn over one line of a terminal; whole lines now and then anywhere else."""

import os
import re
import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0

LINE = (
    "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} {unit}, {rate_fmt}, "
    "{elapsed} so far, {remaining} left{postfix}"
)
"""What a bar says where it cannot be drawn; times are minutes:seconds."""


class Bar(tqdm):
    """A bar on stderr, as wide as the terminal is at the moment.

    Without a terminal it writes lines, each ended by a line feed, with no carriage returns: at the
    start, every `SECONDS_BETWEEN_LINES`, and at the end. Takes tqdm's keywords.
    """

    def __new__(cls, *arguments: Any, **settings: Any) -> "Bar":
        tqdm.get_lock()  # else this class gets a lock of its own, beside that of tqdm's other bars
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._terminal = sys.stderr.isatty()
        if self._terminal:
            columns, rows = _size()
            defaults: dict[str, Any] = {"mininterval": 0.5, "ncols": columns, "nrows": rows}
        else:
            seconds = SECONDS_BETWEEN_LINES
            defaults = {
                "mininterval": seconds,
                "maxinterval": seconds,  # else tqdm's own thread asks for a line after ten
                "file": _Lines(sys.stderr),
                "bar_format": LINE,
            }
        super().__init__(*arguments, **defaults | settings)

    @property
    def format_dict(self) -> Any:
        """What is drawn; asked each time, so that the bar follows the terminal's width."""
        if self._terminal:
            self.ncols, self.nrows = _size()
        return super().format_dict


def _size() -> tuple[int, int]:
    """Columns and rows that bars may take: a full last column would wrap on some terminals.

    tqdm itself draws nothing on a terminal that does not know its size, as those of some batch
    systems and of `script`; 80 columns are assumed there.
    """
    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        columns, rows = 0, 0
    return max(1, (columns or 80) - 1), max(2, (rows or 24) - 1)


_CURSOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class _Lines:
    """A text stream that keeps what tqdm draws, as lines, and leaves out how it moves the
    cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = _CURSOR.sub("", text).strip()
        if line:
            self._stream.write(f"{line}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
