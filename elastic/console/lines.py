"""Log lines and messages that do not share a line with a bar."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

CLEAR = "\r\x1b[K"
"""Moves the cursor to the start of its line, and empties the line."""


@contextmanager
def _without_bars(stream: TextIO) -> Iterator[None]:
    """Take the bars of this process off the terminal, and draw them again below what was
    written."""
    if not sys.stderr.isatty():  # bars are whole lines there
        yield
        return
    with tqdm.external_write_mode(file=stream):
        yield
        stream.flush()  # before the bars, which are on another stream


class Handler(logging.StreamHandler):
    """Writes to a stream between the bars.

    Args:
        beside: the bars of this terminal are another process'. It draws on one line, which is
            emptied first; its next drawing goes below.
    """

    def __init__(self, stream: TextIO, beside: bool = False) -> None:
        super().__init__(stream)
        self.terminator = "\n"
        self.prefix = CLEAR if beside and stream.isatty() else ""

    def format(self, record: logging.LogRecord) -> str:
        return self.prefix + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        with _without_bars(self.stream):
            super().emit(record)


def clear_of_bars(beside: bool = False) -> None:
    """Let whatever is logged to stdout or stderr, and Python's warnings, go between the bars.

    Formats, levels and files are left as logging is configured (by Hydra's job_logging, or by
    `logging.basicConfig`); call this afterwards, and before torch is imported: its C++ writes past
    Python, so that only errors come from there, unless TORCH_CPP_LOG_LEVEL says otherwise. `beside`
    is as in `Handler`.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    root = logging.getLogger()
    for old in list(root.handlers):
        if type(old) is logging.StreamHandler and old.stream in (sys.stdout, sys.stderr):
            new = Handler(old.stream, beside)
            new.setFormatter(old.formatter)
            new.setLevel(old.level)
            root.removeHandler(old)
            root.addHandler(new)
    logging.captureWarnings(True)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line between the bars; to stdout unless a file is given."""
    stream = sys.stdout if file is None else file
    with _without_bars(stream):
        print(line, file=stream, flush=True)
