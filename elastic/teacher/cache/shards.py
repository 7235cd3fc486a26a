"""Files of a cache: safetensors with a checksum for every sequence, read through memory maps.

A checksum of a whole file would make a run that jumps to another file read all of it for one
sequence; by sequence, everything that is used is verified and nothing else is read.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from elastic.config import ConfigError
from elastic.storage.files import atomic_file
from elastic.teacher.cache.index import CacheIndex

Rows = dict[str, np.ndarray]
"""Some sequences: `indices` and `log_probs` (n, t, k), `text_log_probs` (n, t), `text` (n, 8)."""

PARTS = ("indices", "log_probs", "text_log_probs", "text")
"""What a checksum covers, in this order."""


@dataclass(frozen=True)
class ShardSet:
    """The files of one split of one stage."""

    directory: Path
    stage: str
    split: str
    key: str
    sequences: int
    """In all files."""
    shard_sequences: int
    sequence_length: int
    top_k: int
    vocabulary: int
    log_probs: str

    @classmethod
    def of(cls, directory: Path, index: CacheIndex, stage: str, split: str) -> "ShardSet":
        """The files as a cache's index describes them."""
        contents = index.contents
        here = contents.stages[stage]
        return cls(
            directory,
            stage,
            split,
            index.key(stage),
            here.train if split == "train" else here.validation,
            index.shard_sequences,
            here.sequence_length,
            contents.top_k,
            contents.vocabulary,
            index.log_probs,
        )

    def count(self, sequences: int | None = None) -> int:
        """Files that hold the first so many sequences, or all."""
        return -(-(self.sequences if sequences is None else sequences) // self.shard_sequences)

    def rows(self, number: int) -> range:
        """Sequences in file `number`."""
        start = number * self.shard_sequences
        return range(start, min(start + self.shard_sequences, self.sequences))

    def path(self, number: int) -> Path:
        return self.directory / self._place(number)

    def layout(self, rows: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of every array of a file with so many sequences."""
        named = (rows, self.sequence_length, self.top_k)
        index = np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)
        return {
            "indices": (index, named),
            "log_probs": (np.dtype(self.log_probs), named),
            "text_log_probs": (np.dtype(np.float32), named[:2]),
            "text": (np.dtype(np.uint8), (rows, 8)),
            "sha256": (np.dtype(np.uint8), (rows, 32)),
        }

    def bytes(self, number: int) -> int:
        """Bytes of a file, but for its header."""
        layout = self.layout(len(self.rows(number))).values()
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout)

    def write(self, number: int, rows: Rows) -> None:
        """Write a file, whole or not at all."""
        count = len(self.rows(number))
        arrays = {}
        for name, (dtype, shape) in self.layout(count).items():
            if name != "sha256":
                assert rows[name].shape == shape
                arrays[name] = np.ascontiguousarray(rows[name].astype(dtype, copy=False))
        sums = [_checksum(arrays, row) for row in range(count)]
        arrays["sha256"] = np.frombuffer(b"".join(sums), np.uint8).reshape(count, 32)
        with atomic_file(self.path(number)) as temporary:
            save_file(arrays, temporary, {"cache": self._belongs(number)})

    def fault(self, number: int) -> str | None:
        """What is wrong with a file, by its header and its size; None if nothing is."""
        try:
            self._offsets(number)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def open(self, number: int) -> Rows:
        """Maps of a file's arrays; what is read of them is not verified yet.

        Raises ConfigError, naming the file.
        """
        try:
            offsets = self._offsets(number)
        except (OSError, ValueError) as error:
            raise self.refusal(number, str(error)) from error
        layout, path = self.layout(len(self.rows(number))), self.path(number)
        return {
            name: np.memmap(path, dtype, "r", offset, shape)
            for (name, (dtype, shape)), offset in zip(layout.items(), offsets, strict=True)
        }

    def refusal(self, number: int, fault: str) -> ConfigError:
        """The error for a file that cannot be used."""
        return ConfigError(
            f"objective.teacher_cache={self.directory}: {self._place(number)} {fault}; "
            "delete it and run elastic cache-teacher again, which writes what is missing"
        )

    def verify(self, arrays: Rows, number: int, row: int) -> None:
        """Raise ConfigError when a sequence of an open file is not what was written."""
        if _checksum(arrays, row) != arrays["sha256"][row].tobytes():
            raise self.refusal(number, f"is damaged, by the checksum of its sequence {row}")

    def _place(self, number: int) -> str:
        return f"{self.stage}/{self.split}/{number:06d}.safetensors"

    def _belongs(self, number: int) -> str:
        """One entry of the header, since the order of several is undefined: the same contents
        give the same bytes."""
        return f"{self.key} {self._place(number)}"

    def _offsets(self, number: int) -> list[int]:
        """Where each array of `layout` begins; raises ValueError or OSError with the reason."""
        path = self.path(number)
        if not path.is_file():
            raise ValueError("is missing")
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                raise ValueError(f"is truncated, at {size} bytes")
            try:
                header = json.loads(file.read(length))
                belongs = header.pop("__metadata__")["cache"]
                found = {name: entry["data_offsets"] for name, entry in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError("is damaged: its header cannot be read") from error
        if belongs != self._belongs(number):
            raise ValueError(f"was written for another cache or place, {belongs}")
        layout = self.layout(len(self.rows(number)))
        sizes = {
            name: dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in layout.items()
        }
        if {name: end - start for name, (start, end) in found.items()} != sizes:
            raise ValueError("holds another number of sequences than its place in the cache")
        if size != 8 + length + sum(sizes.values()):
            raise ValueError(f"is truncated, at {size} bytes")
        return [8 + length + found[name][0] for name in layout]


def _checksum(arrays: Rows, row: int) -> bytes:
    total = hashlib.sha256()
    for name in PARTS:
        total.update(arrays[name][row].data)
    return total.digest()
