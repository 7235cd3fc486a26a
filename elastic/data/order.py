"""Which sequence comes when: a function of (seed, sources, shares, stage) and the place in it.

Nothing needs saving to resume, and no process asks another. Sources are mixed in blocks: each has
its share of every block, what is rounded is carried into the next. Within a source the slices of
its text come in random order, all of them once in an epoch, and the sequences of a slice in random
order. A stage begins with the first slice that no earlier stage has begun, so that no document is
seen twice before its epoch ends, whatever length a stage packs it to.
"""

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

BLOCK = 256
"""Sequences over which the sources have their shares."""

SOURCE_BITS = 40
"""A sequence's key has its row below, and the number of its source above."""


def generator(*where: object) -> np.random.Generator:
    """Random numbers that are a function of `where`."""
    key = hashlib.sha256("/".join(map(str, where)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big")))


class SourceOrder:
    """The draws of one source in one stage.

    Args:
        slice_rows: sequences of each slice, in the order of `joined` rows.
        begin: slices that earlier stages have begun.
    """

    def __init__(
        self, name: str, slice_rows: Sequence[int], seed: int, stage: str, begin: int
    ) -> None:
        assert sum(slice_rows) > 0
        self.name, self.seed, self.stage, self.begin = name, seed, stage, begin
        self.slice_rows = tuple(slice_rows)
        self.first_rows = np.cumsum([0, *slice_rows])
        self.rows_per_epoch = int(self.first_rows[-1])
        self._ends: list[int] = []
        """Draws up to the end of each slice that comes."""

    def rows(self, first: int, count: int) -> np.ndarray:
        """(count,) int64, the rows of consecutive draws."""
        parts = []
        while count:
            number = self._slice_at(first)
            start = first - (self._ends[number - 1] if number else 0)
            part = self._rows_of(number)[start : start + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def begun(self, draws: int) -> int:
        """Slices that are begun after so many draws, earlier stages' too."""
        return self.begin + (self._slice_at(draws - 1) + 1 if draws else 0)

    def _slice_at(self, draw: int) -> int:
        """The slice of a draw, counted from the stage's first one on."""
        while not self._ends or self._ends[-1] <= draw:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + self.slice_rows[self._slice(len(self._ends))])
        return bisect.bisect_right(self._ends, draw)

    def _slice(self, number: int) -> int:
        """Which of the slices it is."""
        epoch, place = divmod(self.begin + number, len(self.slice_rows))
        return int(self._epoch(epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        """The slices in the order of an epoch."""
        return _permutation(len(self.slice_rows), self.seed, "slices", self.name, epoch)

    def _rows_of(self, number: int) -> np.ndarray:
        """Rows of a slice in the order in which they come."""
        which = self._slice(number)
        place = self.seed, "rows", self.name, self.stage, self.begin + number
        return self.first_rows[which] + _permutation(self.slice_rows[which], *place)


@lru_cache(maxsize=64)
def _permutation(size: int, *where: object) -> np.ndarray:
    return generator(*where).permutation(size)


class StageOrder:
    """The sequences of a stage, over all processes.

    Args:
        sources: in the order of the settings; None where there is no row, and no share.
        shares: of each, which sum to 1.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceOrder | None],
        shares: Mapping[str, float],
        seed: int,
        stage: str,
    ) -> None:
        assert set(sources) == set(shares) and abs(sum(shares.values()) - 1) < 1e-9
        self.names = tuple(sources)
        self.sources = tuple(sources.values())
        self.shares = np.array([shares[name] for name in self.names])
        self.seed, self.stage = seed, stage
        self._counts = [np.zeros(len(self.names), np.int64)]
        """Draws of each source before each block."""
        self._blocks: dict[int, np.ndarray] = {}

    def known(self) -> list[Any]:
        """All that the order depends on beside seed and stage."""
        sources = [s and [s.name, s.begin, list(s.slice_rows)] for s in self.sources]
        return [BLOCK, self.shares.tolist(), sources]

    def keys(self, first: int, count: int) -> np.ndarray:
        """(count,) int64 of consecutive sequences: (number of the source << 40) + row."""
        blocks = [
            self._block(number) for number in range(first // BLOCK, -(-(first + count) // BLOCK))
        ]
        start = first % BLOCK
        return np.concatenate([np.empty(0, np.int64), *blocks])[start : start + count]

    def begun(self, sequences: int) -> dict[str, int]:
        """Slices of each source that are begun after so many sequences."""
        number, rest = divmod(sequences, BLOCK)
        drawn = self._before(number).copy()
        if rest:
            chosen = self._block(number)[:rest] >> SOURCE_BITS
            drawn += np.bincount(chosen, minlength=len(self.names))
        return {
            name: 0 if source is None else source.begun(int(count))
            for name, source, count in zip(self.names, self.sources, drawn, strict=True)
        }

    def first_uses(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the first `count` sequences: the (n,) places at which one comes that has not come
        before, and for every place (count,) the number of its sequence among those."""
        _, first, which = np.unique(self.keys(0, count), return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty(len(first), np.int64)
        rank[order] = np.arange(len(first))
        return first[order], rank[which]

    def _before(self, block: int) -> np.ndarray:
        """Draws of each source before a block."""
        while len(self._counts) <= block:
            # What is owed from the blocks before is less than one sequence of each.
            drawn = self._counts[-1]
            owed = self.shares * (len(self._counts) * BLOCK) - drawn
            whole = np.maximum(np.floor(owed + 1e-9).astype(np.int64), 0)
            rest = BLOCK - int(whole.sum())
            by_rest = np.argsort(whole - owed, kind="stable")  # largest remainder first
            if rest >= 0:
                whole[by_rest[:rest]] += 1
            else:
                for source in by_rest[::-1]:
                    if rest < 0 and whole[source] > 0:
                        whole[source], rest = whole[source] - 1, rest + 1
            assert whole.sum() == BLOCK
            self._counts.append(drawn + whole)
        return self._counts[block]

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            before = self._before(number)
            counts = self._before(number + 1) - before
            mixed = np.repeat(np.arange(len(self.names)), counts)
            generator(self.seed, "mix", self.stage, number).shuffle(mixed)
            keys = mixed << SOURCE_BITS
            for index, source in enumerate(self.sources):
                if counts[index]:
                    assert source is not None
                    drawn = source.rows(int(before[index]), int(counts[index]))
                    keys[mixed == index] += drawn
            if len(self._blocks) >= 4:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = keys
        return self._blocks[number]
