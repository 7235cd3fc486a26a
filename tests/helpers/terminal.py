"""A program on a terminal of some width, and what its screen holds afterwards."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence

from helpers.waiting import LIMIT

_TOKENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\s\S]")


class Screen:
    """The lines of a terminal, all that have scrolled away included.

    Knows what bars use: carriage return, line feed, cursor up, erase to the end of the line, and
    wrapping, which waits for the next character as terminals do.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for token in _TOKENS.findall(text):
            self._take(token)

    def _take(self, token: str) -> None:
        if token == "\r":
            self.column = 0
        elif token == "\n":
            self._down()
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                self.row = max(0, self.row - int(token[2:-1] or 1))
            elif token == "\x1b[K":
                del self.rows[self.row][self.column :]
            else:
                raise ValueError(f"no terminal of ours knows {token!r}")
        else:
            if self.column == self.columns:
                self._down()
                self.column = 0
            line = self.rows[self.row]
            line += " " * (self.column + 1 - len(line))
            line[self.column] = token
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]


def run_on_terminal(
    command: Sequence[str], columns: int, environment: dict[str, str]
) -> tuple[int, str]:
    """Exit code, and all that came to a terminal that both stdout and stderr are.

    0 columns is a terminal that does not know its size.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0)
    )
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65_536):
            written += chunk
    except OSError:  # how Linux says that nobody writes any more
        pass
    finally:
        os.close(ours)
    return process.wait(timeout=LIMIT), written.decode()
