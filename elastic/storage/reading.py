"""Read parts of the tensors of a safetensors checkpoint, and little more than they need."""

import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastic.members.cut import Cut, Ranges, size_of
from elastic.storage import seals as sealing
from elastic.storage.opened import OpenFile
from elastic.storage.picking import Picker, Run, grouped, merged, pick, runs_of, within
from elastic.storage.rooms import Rooms

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

INTEGERS = {
    torch.float64: (torch.int64, 0x7FF0 << 48),
    torch.float32: (torch.int32, 0x7F80 << 16),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""Stored type -> the integers of its size, and the bits of infinity among them."""

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
    rooms: Rooms
    """Where its blocks are put."""

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
        row = width * item
        checked = self.file.sealed and row <= sealing.BLOCK_BYTES  # read anyway, for its seal
        whole = checked or row <= PAGE_BYTES or row <= (1 + SPARE) * kept * item
        spans = None if columns is None or whole else merged(columns, GAP_BYTES // item)
        most = max(1, block_bytes // max(1, size_of(spans, kept) * item))
        for group in grouped(((0, height),) if rows is None else rows, most):
            count = sum(stop - start for start, stop in group)
            out = self.rooms.take(count * kept * item).reshape(count, kept * item)
            if columns is None:
                self._rows(out, group)
            elif spans is None:
                self._columns(out, group, runs_of(columns, item), row)
            else:
                self._spans(out, group, columns, spans, row)
            if once:
                first, last = group[0][0], group[-1][1]
                self.file.forget(self.offset + first * row, (last - first) * row)
            values = torch.from_numpy(out).view(self.dtype)  # (rows, kept of a row)
            values = values.view(count, kept, inner)
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

    def prefetch(self, most_bytes: int | None = None) -> None:
        """For readers of rows in any order."""
        size = math.prod(self.shape) * self.dtype.itemsize
        self.file.prefetch(self.offset, size if most_bytes is None else min(size, most_bytes))

    def forget(self) -> None:
        """After all of it has been read once."""
        self.file.forget(self.offset, math.prod(self.shape) * self.dtype.itemsize)

    def read(self, cut: Cut | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The kept part whole, in memory of its own."""
        sizes = [size_of(r, n) for r, n in zip(cut or [None] * len(self.shape), self.shape)]  # noqa: B905
        return assembled(self.blocks(cut), torch.empty(sizes, dtype=dtype or self.dtype))

    def _rows(self, out: np.ndarray, group: list[tuple[int, int]]) -> None:
        """Read these rows whole, straight to where they go: (rows, bytes) uint8."""
        at = 0
        for start, stop in group:
            rows = out[at : at + stop - start]
            self._read(rows.data.cast("B"), start * out.shape[1])
            at += len(rows)

    def _columns(
        self, out: np.ndarray, group: list[tuple[int, int]], runs: list[Run], row: int
    ) -> None:
        """Scan these rows, `row` bytes each, and pick columns: (rows, bytes) uint8."""
        picker = Picker(out, row, runs)
        for start, stop in group:
            place, size = self.offset + start * row, (stop - start) * row
            self.file.scan(place, size, picker.take, f"tensor {self.name}")
        assert picker.done, self.name

    def _spans(
        self,
        out: np.ndarray,
        group: list[tuple[int, int]],
        columns: Ranges,
        spans: Ranges,
        row: int,
    ) -> None:
        """Read `spans` of these rows one by one, and pick columns: (rows, bytes) uint8."""
        item = out.shape[1] // size_of(columns, 0)
        read = out
        if spans != columns:
            read = np.empty((len(out), size_of(spans, 0) * item), np.uint8)
        buffer, at = read.data.cast("B"), 0
        for index in (index for start, stop in group for index in range(start, stop)):
            for left, right in spans:
                size = (right - left) * item
                self._read(buffer[at : at + size], index * row + left * item)
                at += size
        if read is not out:
            pick(out, read, runs_of(within(columns, spans), item))

    def _read(self, buffer: memoryview, offset: int) -> None:
        self.file.read_into(buffer, self.offset + offset, f"tensor {self.name}")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in a tenth of the time of `isfinite().all()`.

    NaN is the smallest and the largest of any values that it is among. On the CPU, of the stored
    types, the bits are compared in one thread, since torch's wait for each other where the machine
    is busy: as integers with a sign what is positive and not finite comes from infinity on, without
    one what is negative. The plain twin is `isfinite().all()`.
    """
    if values.numel() == 0:
        return True
    if values.device.type != "cpu" or values.dtype not in INTEGERS or not values.is_contiguous():
        return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())
    signed, infinite = INTEGERS[values.dtype]
    bits = values.detach().view(signed).numpy()
    negative = infinite + (1 << (8 * bits.itemsize - 1))
    return bool(bits.max() < infinite and bits.view(f"u{bits.itemsize}").max() < negative)


def assembled(blocks: Iterable[Tensor], out: Tensor) -> Tensor:
    """`out`, filled with these row blocks from its first row to its last."""
    at = 0
    for block in blocks:
        out[at : at + len(block)] = block
        at += len(block)
    assert at == len(out), (at, tuple(out.shape))
    return out
