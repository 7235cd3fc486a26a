"""Ranges of rows and columns, and the copy that picks them out of rows as they are stored.

No file is opened here: `StoredTensor.blocks` reads, these say what of it is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from elastic.members.cut import Ranges


def merged(ranges: Ranges, gap: int) -> Ranges:
    """Ascending ranges, joined where no more than `gap` lies between two."""
    joined = [ranges[0]]
    for start, stop in ranges[1:]:
        if start - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def within(ranges: Ranges, spans: Ranges) -> Ranges:
    """Where ranges lie once only `spans`, in which they are, have been read: (start, stop) each in
    the spans one after the other. Both ascend."""
    places: list[tuple[int, int]] = []
    remaining, at = list(ranges), 0
    for left, right in spans:
        while remaining and remaining[0][1] <= right:
            start, stop = remaining.pop(0)
            places.append((at + start - left, at + stop - left))
        at += right - left
    assert not remaining, (ranges, spans)
    return tuple(places)


def grouped(ranges: Ranges, most: int) -> Iterator[list[tuple[int, int]]]:
    """The same ranges in groups of at most `most` rows."""
    group: list[tuple[int, int]] = []
    left = most
    for begin, stop in ranges:
        start = begin
        while start < stop:
            end = min(stop, start + left)
            group.append((start, end))
            left -= end - start
            start = end
            if left == 0:
                yield group
                group, left = [], most
    if group:
        yield group


@dataclass(frozen=True)
class Run:
    """Ranges of one width at equal steps, which one strided copy picks; all in bytes of a row."""

    start: int
    width: int
    step: int
    count: int


def runs_of(ranges: Ranges, item: int) -> list[Run]:
    """Ascending ranges of columns, `item` bytes each, as the runs that they form: the kept channels
    of a group's Mamba heads are one."""
    runs: list[Run] = []
    for start, stop in ranges:
        first, width = start * item, (stop - start) * item
        if runs and runs[-1].width == width:
            last = runs[-1]
            step = first - last.start if last.count == 1 else last.step
            if first == last.start + last.count * step:
                runs[-1] = Run(last.start, width, step, last.count + 1)
                continue
        runs.append(Run(first, width, 0, 1))
    return runs


def pick(out: np.ndarray, rows: np.ndarray, runs: list[Run]) -> None:
    """Copy these runs of every row, one after the other.

    Args:
        out: (rows, bytes kept of one) uint8.
        rows: (rows, bytes of one) uint8.

    The plain twin is indexing: tests/storage/test_picking.py.
    """
    at = 0
    for run in runs:
        end = at + run.width * run.count
        if run.count == 1:
            out[:, at:end] = rows[:, run.start : run.start + run.width]
        else:
            shape = (len(rows), run.count, run.width)
            line, byte = rows.strides
            kept = as_strided(rows[:, run.start :], shape, (line, run.step * byte, byte))
            line, byte = out.strides
            as_strided(out[:, at:end], shape, (line, run.width * byte, byte))[:] = kept
        at = end
    assert at == out.shape[1], (at, out.shape)


class Picker:
    """Picks columns of rows that come in pieces which end anywhere, as blocks of a file do.

    Args:
        out: (rows, bytes kept of one) uint8; filled from its first row on.
        row: bytes of a whole row.
    """

    def __init__(self, out: np.ndarray, row: int, runs: list[Run]) -> None:
        self._out, self._row, self._runs = out, row, runs
        self._at = 0
        self._torn = np.empty((1, row), np.uint8)  # a row that two or more pieces share
        self._have = 0

    def take(self, piece: memoryview) -> None:
        """What comes next of the rows, any number of bytes."""
        data = np.frombuffer(piece, np.uint8)
        if self._have:
            data = self._tear(data)
        count = len(data) // self._row
        if count:
            self._pick(data[: count * self._row].reshape(count, self._row))
            data = data[count * self._row :]
        if len(data):
            self._tear(data)

    def _tear(self, data: np.ndarray) -> np.ndarray:
        """Add to the torn row; what is not of it."""
        count = min(self._row - self._have, len(data))
        self._torn[0, self._have : self._have + count] = data[:count]
        self._have += count
        if self._have == self._row:
            self._pick(self._torn)
            self._have = 0
        return data[count:]

    def _pick(self, rows: np.ndarray) -> None:
        pick(self._out[self._at : self._at + len(rows)], rows, self._runs)
        self._at += len(rows)

    @property
    def done(self) -> bool:
        """Whether every row is there."""
        return self._at == len(self._out) and not self._have
