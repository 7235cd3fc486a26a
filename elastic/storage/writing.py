"""Write safetensors shards block by block, so that no tensor need be in memory whole."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic.storage.behind import behind
from elastic.storage.files import write_json
from elastic.storage.index import INDEX
from elastic.storage.reading import DTYPES, assembled
from elastic.storage.seals import FileSeal, Sealing

WRITE_BYTES = 256 << 10
"""Size of a system call: Linux takes several times as long over the same data in pieces of 32
MiB, for which it looks for large stretches of free memory."""

BEHIND_BYTES = 32 << 20
"""Size of the parts of a file that go to the disk while the next are written."""

LAG = 8
"""Parts after which one has reached the disk and can be forgotten."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Pending:
    """A tensor yet to be written: its size is known before anything of it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]
    """Its rows in blocks, first to last, in any dtype; may be called again."""

    @classmethod
    def of(
        cls, name: str, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]
    ) -> "Pending":
        """A tensor that is read whole."""
        return cls(name, tuple(shape), dtype, lambda: (read(),))

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The whole tensor, in memory of its own on a device; each block goes there on its own."""
        return assembled(self.blocks(), torch.empty(self.shape, dtype=self.dtype, device=device))


def write_shards(
    directory: Path,
    tensors: Iterable[Pending],
    max_shard_bytes: int,
    written: Callable[[int], object] = lambda count: None,
) -> dict[str, FileSeal]:
    """Write tensors as `model.safetensors`, or as several shards with an index.

    A shard has at most `max_shard_bytes` of data, or one tensor. `written` is called for every
    block with its number of bytes. Returns the seals of the shards, by name.
    """
    shards: list[list[Pending]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    if len(shards) == 1:
        name = "model.safetensors"
        return {name: write_shard(shards[0], directory / name, written)}
    weight_map, seals = {}, {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        seals[file] = write_shard(shard, directory / file, written)
        weight_map.update({tensor.name: file for tensor in shard})
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX, index)
    return seals


def write_shard(
    tensors: list[Pending],
    path: Path,
    written: Callable[[int], object] = lambda count: None,
    metadata: Mapping[str, str] | None = None,
) -> FileSeal:
    """One file: the length of the header, the header, the data without gaps; the same bytes for
    the same tensors. Returns its seal.

    A thread writes while this one makes the next block.
    """
    # Wider types first: then every tensor is aligned to its own type.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for tensor in ordered:
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = entry | {"data_offsets": [at, at + tensor.bytes]}
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        out = _Stream(file.fileno())
        out.write(memoryview(len(text).to_bytes(8, "little") + text))
        with behind(out.write) as write:
            for tensor in ordered:
                for data in _bytes_of(tensor):
                    write(data)
                    written(len(data))
    return out.sealing.seal()


def _bytes_of(tensor: Pending) -> Iterator[memoryview]:
    """The data of a tensor as it is stored, block by block."""
    rows = 0
    for block in tensor.blocks():
        assert block.shape[1:] == tensor.shape[1:], (tensor.name, tuple(block.shape), tensor.shape)
        rows += len(block)
        stored = block.detach().to("cpu", tensor.dtype).contiguous().flatten()
        yield stored.view(torch.uint8).numpy().data.cast("B")
    assert rows == tensor.shape[0], (tensor.name, rows, tensor.shape)


class _Stream:
    """A file that is written once from its first byte to its last.

    What is written goes to the disk at once and is then dropped from the system's cache, instead of
    filling memory until the system must stop to make room.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = self._flushed = 0
        self.sealing = Sealing()

    def write(self, data: memoryview) -> None:
        self.sealing.update(data)
        while len(data):
            count = os.write(self._descriptor, data[:WRITE_BYTES])
            data = data[count:]
            self._size += count
            while self._size - self._flushed >= BEHIND_BYTES:
                self._forget(self._flushed)
                self._forget(self._flushed - LAG * BEHIND_BYTES)
                self._flushed += BEHIND_BYTES

    def _forget(self, start: int) -> None:
        """The kernel starts writing what is to leave the cache, and drops what is written."""
        if start >= 0 and hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, start, BEHIND_BYTES, os.POSIX_FADV_DONTNEED)
