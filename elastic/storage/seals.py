"""seals.json: sizes and checksums of files, so that damage is named before it is used. No torch.

It lies beside the files that it covers, with a checksum per block of 4 MiB of each: sizes are
compared at once, blocks as they are read.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64, xxh3_64_hexdigest

from elastic.storage.files import write_json

NAME = "seals.json"
FORMAT_VERSION = 1

BLOCK_BYTES = 4 << 20
"""Size of a block; the last one of a file is shorter."""

ALGORITHM = "xxh3_64"
"""Checksum of a block: as fast as memory, and 64 bits find what 32 may miss in a file of many
thousand blocks."""

REMEDY = "restore it from a copy, or start its run again, which writes it anew"
"""What to do about a directory of ours that differs, where nothing else is said."""


class SealBroken(ValueError):
    """A file differs from what was sealed. The message is one line that names it."""


@dataclass(frozen=True)
class FileSeal:
    """Size and checksums of one file."""

    bytes: int
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> "FileSeal":
        """The seal of a file as it is."""
        sealing = Sealing()
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(BLOCK_BYTES))
            while count := file.readinto(buffer):
                sealing.update(buffer[:count])
        return sealing.seal()

    @property
    def digest(self) -> str:
        """One checksum for the whole file."""
        return xxh3_64_hexdigest(f"{self.bytes} {' '.join(self.blocks)}".encode())

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "blocks": list(self.blocks)}

    @classmethod
    def from_json(cls, entry: Any) -> "FileSeal":
        """Inverse of `to_json`; `ValueError` for anything else."""
        try:
            size, blocks = entry["bytes"], entry["blocks"]
        except (KeyError, TypeError) as error:
            raise ValueError("an entry is malformed") from error
        legal = type(size) is int and size >= 0 and isinstance(blocks, list)
        if not legal or len(blocks) != -(-size // BLOCK_BYTES):
            raise ValueError("size and number of blocks disagree")
        if not all(isinstance(block, str) for block in blocks):
            raise ValueError("a checksum is not a text")
        return cls(size, tuple(blocks))

    def difference(self, path: Path) -> str | None:
        """How a file differs, read whole: one phrase, or None."""
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"has {size:,} bytes, {self.bytes:,} were sealed"
            found = FileSeal.of(path).blocks
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        for number, (now, then) in enumerate(zip(found, self.blocks, strict=True)):
            if now != then:
                return self.block_differs(number)
        return None

    def block_differs(self, number: int) -> str:
        """The phrase for a block that has another checksum."""
        first, last = number * BLOCK_BYTES, min(self.bytes, (number + 1) * BLOCK_BYTES)
        return f"block {number} (bytes {first:,} to {last:,}) differs from what was sealed"


class Sealing:
    """The seal of a file that is made from its first byte to its last."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._size = 0
        self._hash = xxh3_64()

    def update(self, data: memoryview) -> None:
        """What comes next in the file."""
        while len(data):
            part = data[: BLOCK_BYTES - self._size % BLOCK_BYTES]
            self._hash.update(part)
            self._size += len(part)
            data = data[len(part) :]
            if self._size % BLOCK_BYTES == 0:
                self._blocks.append(self._hash.hexdigest())
                self._hash.reset()

    def seal(self) -> FileSeal:
        last = [self._hash.hexdigest()] if self._size % BLOCK_BYTES else []
        return FileSeal(self._size, (*self._blocks, *last))


@dataclass(frozen=True)
class Seals:
    """The seals of a directory's files, by their names relative to it."""

    directory: Path
    files: Mapping[str, FileSeal]
    remedy: str = field(default=REMEDY, compare=False)
    """What to do about a difference; ends its message."""

    @classmethod
    def of(
        cls,
        directory: Path,
        known: Mapping[str, FileSeal] | None = None,
        names: Iterable[str] | None = None,
    ) -> "Seals":
        """The files of a directory as they are.

        Args:
            known: seals that were made while the files were written; those are not read again.
            names: the files; None takes all, at any depth.
        """
        if names is None:
            paths = (path for path in directory.rglob("*") if path.is_file())
            names = (path.relative_to(directory).as_posix() for path in paths)
        known = known or {}
        wanted = sorted(name for name in names if name != NAME)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sealed = pool.map(lambda name: known.get(name) or FileSeal.of(directory / name), wanted)
            return cls(directory, dict(zip(wanted, sealed, strict=True)))

    @classmethod
    def read(
        cls, directory: Path, path: Path | None = None, remedy: str = REMEDY
    ) -> "Seals | None":
        """What was sealed; None where nothing was.

        Args:
            path: the file of the seals; None is seals.json beside the files.

        Raises:
            SealBroken: the file of the seals is damaged itself.
        """
        path = path or directory / NAME
        try:
            value = json.loads(path.read_bytes())
            if value["format_version"] != FORMAT_VERSION or value["checksum"] != ALGORITHM:
                raise ValueError("another version of the format")
            if value["block_bytes"] != BLOCK_BYTES or value["own"] != _own(value["files"]):
                raise ValueError("its own checksum is another")
            files = {name: FileSeal.from_json(entry) for name, entry in value["files"].items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SealBroken(f"{path}: damaged ({_brief(error)}); {remedy}") from error
        return cls(directory, files, remedy)

    def write(self, path: Path | None = None) -> None:
        """Write seals.json beside the files, or another file."""
        files = {name: self.files[name].to_json() for name in sorted(self.files)}
        value = {"format_version": FORMAT_VERSION, "checksum": ALGORITHM}
        value |= {"block_bytes": BLOCK_BYTES, "own": _own(files), "files": files}
        write_json(path or self.directory / NAME, value, indent=None)

    def seal_of(self, path: Path) -> FileSeal:
        """The seal of one file.

        Raises:
            SealBroken: there is none.
        """
        name = path.relative_to(self.directory).as_posix()
        if name not in self.files:
            raise self.broken(path, "was not there when the directory was sealed")
        return self.files[name]

    def broken(self, path: Path, what: str) -> SealBroken:
        """The error about a file."""
        return SealBroken(f"{path}: {what}; {self.remedy}")

    def check_sizes(self) -> None:
        """Raise `SealBroken` for a file that is missing or of another size; contents are not
        read."""
        for name, seal in self.files.items():
            path = self.directory / name
            if not path.is_file():
                raise self.broken(path, "is missing")
            if path.stat().st_size != seal.bytes:
                raise self.broken(path, str(seal.difference(path)))

    def check(self, *names: str) -> None:
        """Raise `SealBroken` for one of these files that differs, each read whole; a name that was
        not sealed must not be there."""
        for name in names:
            if name not in self.files and (self.directory / name).exists():
                self.seal_of(self.directory / name)
        wanted = [name for name in names if name in self.files]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda n: self.files[n].difference(self.directory / n), wanted)
            for name, difference in zip(wanted, found, strict=True):
                if difference:
                    raise self.broken(self.directory / name, difference)

    def check_all(self) -> None:
        """Raise `SealBroken` for any file that differs; every byte is read."""
        self.check(*self.files)

    @property
    def digest(self) -> str:
        """One checksum for all files."""
        return _own({name: self.files[name].digest for name in sorted(self.files)})


def check_beside(directory: Path, *names: str) -> None:
    """Compare small files, which are read whole, with the seals.json beside them if there is one.

    Raises:
        SealBroken: one differs.
    """
    seals = Seals.read(directory)
    if seals is not None:
        seals.check(*names)


def damage(directory: Path) -> str | None:
    """What is wrong with a directory that ought to be sealed and whole: one line, or None. Every
    byte is read."""
    try:
        seals = Seals.read(directory, remedy="")
        if seals is None:
            there = directory.is_dir()
            return f"{directory / NAME if there else directory}: is missing"
        seals.check_all()
    except SealBroken as error:
        return str(error).removesuffix("; ")
    return None


def _own(files: Any) -> str:
    return xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode())


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:80] or type(error).__name__
