"""An open file of which any part is read, checked against its seal block by block."""

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from elastic.storage import seals as sealing
from elastic.storage.seals import Seals


class OpenFile:
    """A file for reading; closed when nothing refers to it any more.

    With seals its size is compared now, and each block once, when something of it is read first. A
    block of which only a part is wanted is read whole for that, and kept until another is: what
    streams through a file reads no byte twice.

    Raises:
        ValueError: the file is of another size than was sealed, or was not sealed.
    """

    def __init__(self, path: Path, seals: Seals | None = None) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.bytes = os.fstat(self.descriptor).st_size
        self._seals = seals
        self._seal = None if seals is None else seals.seal_of(path)
        self._held = -1
        self._block = memoryview(b"")
        self._lock = threading.Lock()  # the block held is one for all threads
        if self._seal is None:
            return
        assert seals is not None
        if self.bytes != self._seal.bytes:
            raise seals.broken(path, f"has {self.bytes:,} bytes, {self._seal.bytes:,} were sealed")
        self._checked = bytearray(len(self._seal.blocks))

    @property
    def seal(self) -> sealing.FileSeal | None:
        return self._seal

    @property
    def sealed(self) -> bool:
        """Whether blocks are read whole and checked."""
        return self._seal is not None

    def read_into(self, buffer: memoryview, offset: int, what: str = "") -> None:
        """Fill `buffer` from that place of the file; `what` is named where a block differs.

        Raises:
            SealBroken: a block that this touches differs from what was sealed.
            ValueError: the file ends before.
        """
        if self._seal is None:
            self._read(buffer, offset)
            return
        with self._lock:
            while len(buffer):
                number, begin, count = self._within(offset, len(buffer))
                self._part(buffer[:count], number, begin, what)
                buffer, offset = buffer[count:], offset + count

    def scan(
        self, offset: int, size: int, take: Callable[[memoryview], object], what: str = ""
    ) -> None:
        """Have `take` called with `size` bytes from that place of the file, in consecutive pieces
        that are its own until it returns; for what is copied on in part: nothing is copied here.

        Raises:
            SealBroken, ValueError: as `read_into`.
        """
        with self._lock:
            while size:
                number, begin, count = self._within(offset, size)
                if number == self._held or (self.sealed and not self._checked[number]):
                    take(self._hold(number, what)[begin : begin + count])
                else:
                    self._held = -1
                    piece = self._room()[:count]
                    self._read(piece, offset)
                    take(piece)
                offset, size = offset + count, size - count

    def _part(self, buffer: memoryview, number: int, begin: int, what: str) -> None:
        """Fill `buffer` from within one block."""
        if number == self._held:
            buffer[:] = self._block[begin : begin + len(buffer)]
        elif self._checked[number]:
            self._read(buffer, number * sealing.BLOCK_BYTES + begin)
        elif len(buffer) == self._size(number):
            self._read(buffer, number * sealing.BLOCK_BYTES)
            self._check(buffer, number, what)
        else:
            buffer[:] = self._hold(number, what)[begin : begin + len(buffer)]

    def _hold(self, number: int, what: str) -> memoryview:
        """A block, checked; kept until another is."""
        block = self._room()[: self._size(number)]
        if number != self._held:
            self._held = -1
            self._read(block, number * sealing.BLOCK_BYTES)
            self._check(block, number, what)
            self._held = number
        return block

    def _room(self) -> memoryview:
        """Memory for one block."""
        if not len(self._block):
            self._block = memoryview(bytearray(min(sealing.BLOCK_BYTES, self.bytes)))
        return self._block

    def _within(self, offset: int, size: int) -> tuple[int, int, int]:
        """The block of a place, the place in it, and how many of `size` bytes from there it has."""
        number, begin = divmod(offset, sealing.BLOCK_BYTES)
        count = min(size, self._size(number) - begin)
        if count <= 0:
            raise ValueError(f"{self.path}: shard is truncated")
        return number, begin, count

    def _size(self, number: int) -> int:
        """Bytes of a block."""
        return min(sealing.BLOCK_BYTES, self.bytes - number * sealing.BLOCK_BYTES)

    def _check(self, block: memoryview, number: int, what: str) -> None:
        assert self._seals is not None and self._seal is not None
        if xxh3_64_hexdigest(block) != self._seal.blocks[number]:
            difference = self._seal.block_differs(number) + (f", seen in {what}" if what else "")
            raise self._seals.broken(self.path, difference)
        self._checked[number] = 1

    def _read(self, buffer: memoryview, offset: int) -> None:
        while len(buffer):
            count = os.preadv(self.descriptor, [buffer], offset)
            if count == 0:
                raise ValueError(f"{self.path}: shard is truncated")
            buffer, offset = buffer[count:], offset + count

    def forget(self, offset: int, size: int) -> None:
        """Let the system drop its copy of a part that was read.

        Whoever streams a checkpoint once has no use for it, and fresh memory for all of it costs
        more than using a little of it again and again.
        """
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    def prefetch(self, offset: int, size: int) -> None:
        """Let the system read a part from the disk in its order, whatever ours will be."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
