"""Files to units: parts of a file that are read by themselves, in any order and by any process."""

import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

from elastic.config import ConfigError
from elastic.config.checks import visible
from elastic.storage.seals import Sealing

CHUNK = 1 << 20
"""Bytes that are read at a time where lines do not matter."""


class Kind(NamedTuple):
    """How files of one suffix are read."""

    reader: str
    """`lines`, `parquet`, `arrow` or `text`."""
    compression: str | None = None


def _kinds() -> dict[str, Kind]:
    compressions = {"": None, ".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
    found = {".parquet": Kind("parquet"), ".arrow": Kind("arrow")}
    readers = {".jsonl": "lines", ".txt": "text", ".md": "text", ".py": "text"}
    for suffix, reader in readers.items():
        found |= {suffix + more: Kind(reader, how) for more, how in compressions.items()}
    return found


KINDS = _kinds()
"""Suffix -> how it is read. A text may be compressed too."""


@dataclass(frozen=True)
class Unit:
    """A part of a file that is read by itself. It can be sent to another process."""

    path: Path
    begin: int
    """First of its bytes."""
    end: int
    """One after the last of its bytes."""
    groups: tuple[int, int] | None = None
    """Of Parquet: the first of its row groups, and one after the last."""
    rows_before: int = 0
    """Of Parquet: rows of the file before it."""

    @cached_property
    def lines_before(self) -> int:
        """Lines of the file before it: they are read and counted, at the first question."""
        count = 0
        with reading(self.path), self.path.open("rb") as file:
            for start in range(0, self.begin, CHUNK):
                count += file.read(min(CHUNK, self.begin - start)).count(b"\n")
        return count

    def line_of(self, number: int) -> int:
        """The number in the file, from 1, of the line or row that has `number` in this unit."""
        return number + (self.rows_before if self.groups else self.lines_before)

    def place(self, number: int) -> str:
        """Where that is, in words: "PATH, line 12"."""
        reader = kind_of(self.path).reader
        what = {"lines": "line", "parquet": "row", "arrow": "row"}.get(reader)
        return f"{self.path}, {what} {self.line_of(number)}" if what else str(self.path)

    def key(self) -> str:
        """Checksum of what this unit is read from: its bytes, and for Parquet its columns' types.

        Raises:
            ConfigError: the file cannot be read.
        """
        sealing, left = Sealing(), self.end - self.begin
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.begin)
            while left and (data := file.read(min(CHUNK, left))):
                sealing.update(memoryview(data))
                left -= len(data)
            if self.groups is not None:
                with ParquetFile(self.path) as parquet:
                    sealing.update(memoryview(str(parquet.schema_arrow).encode()))
        return sealing.seal().digest


def kind_of(path: Path) -> Kind:
    """How a file is read, by its suffix; of `.jsonl.gz` both count.

    Raises:
        ConfigError: there is no such kind.
    """
    for suffix in ("".join(path.suffixes[-2:]), path.suffix):
        if suffix in KINDS:
            return KINDS[suffix]
    raise ConfigError(
        f"{visible(path)}: there is no reader of {visible(path.suffix) or 'suffixless'} files; "
        "must be one of " + ", ".join(KINDS)
    )


def units(path: Path, bytes_per_unit: int) -> list[Unit]:
    """The parts of a file, in order, that are read by themselves; an empty file of lines has none.

    Args:
        bytes_per_unit: at least this many, unless the file ends: lines and row groups stay whole,
            and what is neither lines nor Parquet, or is compressed, is one unit.

    Raises:
        ConfigError: the file cannot be read, or is of no kind that is known.
    """
    assert bytes_per_unit > 0
    kind = kind_of(path)
    with reading(path):
        if kind.reader == "parquet":
            return _parquet_units(path, bytes_per_unit)
        size = path.stat().st_size
        if kind != Kind("lines"):
            return [Unit(path, 0, size)]
        ends = _line_ends(path, size, bytes_per_unit)
    begins = [0, *ends[:-1]]
    return [Unit(path, begin, end) for begin, end in zip(begins, ends, strict=False)]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file is one line that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigError(
            f"{visible(path)}: cannot be read ({visible(said[:200] or type(error).__name__)}); "
            "must be a whole file of the kind that its suffix says"
        ) from error


def _line_ends(path: Path, size: int, bytes_per_unit: int) -> list[int]:
    """Where units end: one after a line's end each, or the file's end."""
    ends: list[int] = []
    with path.open("rb") as file:
        while (ends[-1] if ends else 0) < size:
            end = (ends[-1] if ends else 0) + bytes_per_unit
            file.seek(end - 1)
            while end < size and (chunk := file.readline(CHUNK)):
                end = file.tell()
                if chunk.endswith(b"\n"):
                    break
            ends.append(min(end, size))
    return ends


def _parquet_units(path: Path, bytes_per_unit: int) -> list[Unit]:
    """Row groups, joined until they have that many bytes."""
    found: list[Unit] = []
    with ParquetFile(path) as file:
        metadata, first, rows, rows_before = file.metadata, 0, 0, 0
        begin, end = path.stat().st_size, 0
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for index in range(row_group.num_columns):
                column = row_group.column(index)
                offsets = column.dictionary_page_offset, column.data_page_offset
                start = min(offset for offset in offsets if offset is not None)
                begin = min(begin, start)
                end = max(end, start + column.total_compressed_size)
            rows += row_group.num_rows
            if end - begin >= bytes_per_unit or group + 1 == metadata.num_row_groups:
                found.append(Unit(path, begin, max(begin, end), (first, group + 1), rows_before))
                first, rows_before, rows = group + 1, rows_before + rows, 0
                begin, end = path.stat().st_size, 0
    return found
