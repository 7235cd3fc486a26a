"""A .npy file of one dimension, of which slices are read and checked; its twin is numpy's load."""

from pathlib import Path

import numpy as np

from elastic.storage.opened import OpenFile
from elastic.storage.seals import FileSeal, Seals


class StoredArray:
    """An array on disk: what is indexed is read, and its blocks compared with the seals beside it.

    Raises:
        ValueError: the file is none, has several dimensions, or differs from its seal.
    """

    ndim = 1

    def __init__(self, path: Path, seals: Seals | None = None) -> None:
        seals = seals or Seals.read(path.parent)
        self._file = OpenFile(path, seals)
        if self._file.sealed:
            self._file.read_into(memoryview(bytearray(min(64, self._file.bytes))), 0, "the header")
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: not an array, or cut short ({error})") from error
        if not isinstance(found, np.memmap) or found.ndim != 1 or found.dtype.hasobject:
            raise ValueError(f"{path}: must be a .npy file of one dimension")
        self.path, self.dtype, self.shape = path, found.dtype, found.shape
        self._offset = int(found.offset)

    @property
    def seal(self) -> FileSeal | None:
        """Of its file."""
        return self._file.seal

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Consecutive entries, in memory of their own."""
        start, stop, step = part.indices(len(self))
        assert step == 1
        out = np.empty(max(stop - start, 0), self.dtype)
        if not len(out):
            return out
        place = self._offset + start * self.dtype.itemsize
        self._file.read_into(out.data.cast("B"), place, f"entries {start:,} to {stop:,}")
        return out

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        return self[:].astype(dtype or self.dtype, copy=False)
