"""Standard output and error that never end a run: a terminal may go away, a disk may be full."""

import contextlib
import errno
import io
import os
import sys
from typing import Any

OUTPUT, ERROR = 1, 2
"""Descriptors of the two."""

_lost: dict[int, int] = {}
"""Descriptors that take nothing any more, and the number of the error that said so."""


class _Lasting(io.FileIO):
    """Writes to a descriptor as long as that takes it, then into nothing.

    Below the buffers, so that no part of a line waits there for another attempt: `print`, logging,
    bars, and Python's own flush at the end all find a stream that works.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)  # None: a terminal that is stopped
        except OSError as error:
            _lose(self.fileno(), error.errno or errno.EIO)
            return len(data)


def _lose(descriptor: int, reason: int) -> None:
    """Send what comes to a descriptor into nothing, that of C libraries and of children too."""
    _lost[descriptor] = reason
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing == descriptor:  # it was closed
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(nothing, descriptor)
        os.close(nothing)


def lost(descriptor: int) -> int | None:
    """Number of the error with which a write to it has failed (EBADF: it was closed at the start);
    None while it lasts."""
    return _lost.get(descriptor)


def write_now(text: str) -> None:
    """Straight to standard error, from a signal's handler, which may have interrupted a print."""
    with contextlib.suppress(OSError):
        os.write(ERROR, text.encode())


def keep_going() -> None:
    """Let no write to standard output or error fail from now on, in this process.

    One that was closed before the start goes into nothing: the next file that is opened would get
    its number, and what C libraries print would go into that file. Streams that somebody has put in
    place of Python's own are left alone.
    """
    for descriptor, name in ((OUTPUT, "stdout"), (ERROR, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(descriptor)
            except OSError:
                _lose(descriptor, errno.EBADF)
                setattr(sys, name, _stream(descriptor, "utf-8", "backslashreplace", False))
        elif type(stream) is io.TextIOWrapper and type(_raw(stream)) is io.FileIO:
            try:
                stream.flush()
            except OSError as error:
                _lose(descriptor, error.errno or errno.EIO)
            lines = stream.line_buffering or stream.write_through
            errors = "backslashreplace"  # no character ends a run either
            setattr(sys, name, _stream(stream.fileno(), stream.encoding, errors, lines))


def _raw(stream: io.TextIOWrapper) -> object:
    return getattr(stream.buffer, "raw", stream.buffer)  # PYTHONUNBUFFERED: no buffer between


def _stream(descriptor: int, encoding: str, errors: str, lines: bool) -> io.TextIOWrapper:
    raw = _Lasting(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors, line_buffering=lines or descriptor == ERROR
    )
