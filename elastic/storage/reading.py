"""Read parts of the tensors of a safetensors checkpoint, and little more than they need."""

import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.members.cut import Cut, Ranges, size_of
from elastic.storage import seals as sealing
from elastic.storage.opened import OpenFile

log = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
"""Size of the row blocks in which data moves: memory of more than 32 MiB is new from the system
every time, which costs more than reading it."""

GAP_BYTES = 256
"""Gaps between kept columns up to this size are read too: cheaper than another system call."""

PAGE_BYTES = 4096
"""Rows up to this are read whole and picked in memory: whole pages come from the disk anyway."""
SPARE = 0.1
"""Longer rows are read whole too, a block at a time, where that is at most this share more."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""Stored types that can be read, by their name in safetensors."""

EXACT = re.compile(r".*\.(A_log|D|dt_bias)")
"""Numbers that the scan feeds to an exponential or adds up over a sequence: a few per layer, which
published checkpoints keep in float32, and no conversion rounds."""


def converted(name: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Type of a tensor when a checkpoint is converted to `wanted`; None converts nothing."""
    if wanted is None or (EXACT.fullmatch(name) and wanted.itemsize < stored.itemsize):
        return stored
    return wanted


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk; nothing of it is in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: OpenFile
    offset: int
    """Byte of the file at which it begins."""

    def blocks(
        self, cut: Cut | None = None, block_bytes: int = BLOCK_BYTES, once: bool = False
    ) -> Iterator[Tensor]:
        """The kept part in blocks of consecutive rows, each in memory of its own; all are finite.

        Row ranges may come in any order, so that a permutation of rows is a cut too; the column
        ranges (of the second dimension) ascend. A block has at most `block_bytes`, or one row. With
        `once`, for rows that ascend, nothing of it stays in the system's cache.

        Raises:
            ValueError: the file ends before, or a value is NaN or infinite.
        """
        rows, columns = (None, None) if cut is None else (*cut, None)[:2]
        assert cut is None or not any(ranges for ranges in cut[2:]), "only rows and columns are cut"
        height, *rest = self.shape
        inner = math.prod(rest[1:])
        width, item = (rest[0] if rest else 1), self.dtype.itemsize * inner
        kept = size_of(columns, width)
        spans = _merged(((0, width),) if columns is None else columns, GAP_BYTES // item)
        row = width * item
        checked = self.file.sealed and row <= sealing.BLOCK_BYTES  # read anyway, for its seal
        if checked or row <= PAGE_BYTES or row <= (1 + SPARE) * kept * item:
            spans = ((0, width),)
        most = max(1, block_bytes // max(1, size_of(spans, width) * item))
        for group in _grouped(((0, height),) if rows is None else rows, most):
            count = sum(stop - start for start, stop in group)
            read = self._rows(group, count, spans, row, item)  # (rows, spans)
            if once:
                first, last = group[0][0], group[-1][1]
                self.file.forget(self.offset + first * row, (last - first) * row)
            values = read.view(self.dtype).view(count, -1, inner)  # (rows, columns, inner)
            if columns is not None:
                values = _picked(values, spans, columns)
            if not all_finite(values):
                raise ValueError(self._not_finite(values, group))
            yield values.reshape(count, kept, *rest[1:]) if rest else values.reshape(count)

    def _not_finite(self, values: Tensor, group: list[tuple[int, int]]) -> str:
        """What is wrong with a block (rows, columns, inner) of these rows."""
        row, *place = torch.nonzero(~values.isfinite())[0].tolist()
        rows = [index for start, stop in group for index in range(start, stop)]
        return (
            f"{self.file.path}: tensor {self.name} has {float(values[row, *place])} in row "
            f"{rows[row]}; weights must be finite: take a checkpoint from before they were lost"
        )

    def prefetch(self) -> None:
        """For readers of rows in any order."""
        self.file.prefetch(self.offset, math.prod(self.shape) * self.dtype.itemsize)

    def forget(self) -> None:
        """After all of it has been read once."""
        self.file.forget(self.offset, math.prod(self.shape) * self.dtype.itemsize)

    def read(self, cut: Cut | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The kept part whole, in memory of its own."""
        sizes = [size_of(r, n) for r, n in zip(cut or [None] * len(self.shape), self.shape)]  # noqa: B905
        return assembled(self.blocks(cut), torch.empty(sizes, dtype=dtype or self.dtype))

    def _rows(
        self, group: list[tuple[int, int]], count: int, spans: Ranges, row: int, item: int
    ) -> Tensor:
        """The bytes of these spans of these rows: (rows, bytes)."""
        width = sum(stop - start for start, stop in spans) * item
        out = torch.empty((count, width), dtype=torch.uint8)
        buffer = out.numpy().data.cast("B")
        at = 0
        for start, stop in group:
            if width == row:
                size = (stop - start) * row
                self._read(buffer[at : at + size], start * row)
                at += size
                continue
            for index in range(start, stop):
                for left, right in spans:
                    size = (right - left) * item
                    self._read(buffer[at : at + size], index * row + left * item)
                    at += size
        return out

    def _read(self, buffer: memoryview, offset: int) -> None:
        self.file.read_into(buffer, self.offset + offset, f"tensor {self.name}")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in a tenth of the time of `isfinite().all()`: NaN is the
    smallest and the largest of any values that it is among."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def assembled(blocks: Iterable[Tensor], out: Tensor) -> Tensor:
    """`out`, filled with these row blocks from its first row to its last."""
    at = 0
    for block in blocks:
        out[at : at + len(block)] = block
        at += len(block)
    assert at == len(out), (at, tuple(out.shape))
    return out


def _merged(ranges: Ranges, gap: int) -> Ranges:
    """Ascending ranges, joined where no more than `gap` lies between two."""
    merged = [ranges[0]]
    for start, stop in ranges[1:]:
        if start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _picked(values: Tensor, spans: Ranges, columns: Ranges) -> Tensor:
    """Of columns read in `spans` those in `columns`: the gaps that were read too fall away."""
    if spans == columns:
        return values
    parts, at = [], 0
    remaining = list(columns)
    for left, right in spans:
        while remaining and remaining[0][1] <= right:
            start, stop = remaining.pop(0)
            parts.append(values[:, at + start - left : at + stop - left])
        at += right - left
    return torch.cat(parts, dim=1)


def _grouped(ranges: Ranges, most: int) -> Iterator[list[tuple[int, int]]]:
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
