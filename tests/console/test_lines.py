"""Bars and log lines never share a line of a terminal; elsewhere a bar is whole lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.terminal import Screen, run_on_terminal

PROGRAM = """
import logging, sys, warnings
from elastic.console import Bar, clear_of_bars, say
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="LOG %(message)s")
{install}
log = logging.getLogger("elastic.some.module")
with Bar(desc="BAR", total=40, unit="tok", mininterval={interval}) as bar:
    for step in range(40):
        bar.set_postfix_str(f"soft small loss {{step}}.123", refresh=False)
        bar.update()
        if step % 9 == 0:
            log.info("short %d", step)
        if step == 11:
            log.warning("long %s", "x" * 300)
        if step == 17:
            warnings.warn("of Python", stacklevel=1)
        if step == 23:
            say("LOG said", sys.stderr)
        if step == 29:
            with Bar(desc="BAR within", total=3, mininterval={interval}, leave=False) as inner:
                for _ in range(3):
                    inner.update()
                    log.info("within")
log.info("after")
"""

LINES = [f"LOG short {step}" for step in range(0, 40, 9)] + ["LOG said", "LOG after"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", "TERM": "xterm"}


def shared(screen: Screen) -> list[str]:
    """Lines of the screen that hold both a part of a bar and one of something else.

    A bar has none of the letters of the other lines, which wrap: half a word may be on a line.
    """
    others = set("LOGWx")
    return [
        line
        for line in screen.lines
        if ("BAR" in line or "%|" in line or "/40" in line) and set(line) & others
    ]


@pytest.mark.parametrize("columns", [40, 80, 200, 0])
def test_no_line_of_a_terminal_holds_a_bar_and_a_log_line(columns: int) -> None:
    program = PROGRAM.format(install="clear_of_bars()", interval=0)
    code, written = run_on_terminal([sys.executable, "-c", program], columns, environment())
    assert code == 0, written
    screen = Screen(columns or 80)  # a terminal that does not know its size counts as 80
    screen.feed(written)
    assert shared(screen) == []
    assert [line for line in screen.lines if line in LINES] == sorted(LINES, key=screen.lines.index)
    assert set(LINES) <= set(screen.lines) and screen.lines.count("LOG within") == 3
    assert any("of Python" in line for line in screen.lines)
    bars = [line for line in screen.lines if "BAR" in line]
    assert len(bars) == 1 and "100%" in bars[0], "one finished bar is left"
    assert written.count("BAR") > 40, "the bar was drawn all along"


def test_a_log_that_knows_nothing_of_bars_is_seen() -> None:
    """Guards the guard."""
    program = PROGRAM.format(install="", interval=0)
    _, written = run_on_terminal([sys.executable, "-c", program], 80, environment())
    screen = Screen(80)
    screen.feed(written)
    assert shared(screen) != []


def test_lines_of_another_process_start_on_an_empty_line() -> None:
    """What a second process logs while the first one's bar is drawn."""
    program = (
        "import logging, sys; from elastic.console import clear_of_bars\n"
        "logging.basicConfig(level=logging.WARNING, format='LOG %(message)s')\n"
        "clear_of_bars(beside=True)\n"
        "logging.getLogger('elastic').warning('beside')"
    )
    _, written = run_on_terminal([sys.executable, "-c", program], 80, environment())
    screen = Screen(80)
    screen.feed("\rBAR:  50%|#####     | 20/40")
    screen.feed(written)
    screen.feed("\rBAR: 100%|##########| 40/40")
    assert screen.lines == ["LOG beside", "BAR: 100%|##########| 40/40"]


def test_without_a_terminal_bars_are_a_few_whole_lines(tmp_path: Path) -> None:
    program = PROGRAM.format(install="clear_of_bars()", interval=1000)
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-u", "-c", program]
        done = subprocess.run(command, stdout=file, stderr=file, env=environment(), check=False)
    text = log.read_bytes().decode()
    assert done.returncode == 0, text
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert set(LINES) <= set(lines)
    bars = [line for line in lines if line.startswith("BAR: ")]
    assert len(bars) == 2, "where it starts and where it ends"
    assert bars[0].startswith("BAR: 0%, 0 of 40 tok")
    assert bars[1].startswith("BAR: 100%, 40 of 40 tok") and bars[1].endswith("loss 39.123")
    assert not any("BAR" in line and "LOG" in line for line in lines)


def test_all_bars_have_one_lock() -> None:
    """Else a log line would not wait until a bar is drawn."""
    program = (
        "from tqdm import tqdm; from elastic.console import Bar\n"
        "Bar(disable=True); print(Bar.get_lock() is tqdm.get_lock())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert done.stdout == "True\n", done.stderr
