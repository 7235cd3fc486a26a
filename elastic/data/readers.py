"""Units to raw records: lines of JSON, rows of Parquet and Arrow, or a text as a whole.

A record that cannot be read comes as what is wrong with it, and the next one follows; a file that
cannot is an error.
"""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

import pyarrow as pa  # type: ignore[import-untyped]

from elastic.data.bad import BadRecord, check_unicode, named
from elastic.data.tables import rows
from elastic.data.units import CHUNK, KINDS, Kind, Unit, kind_of, reading, units

__all__ = ["KINDS", "Kind", "Record", "Unit", "kind_of", "parsed", "records", "units"]

MAX_CHARACTERS = 64 << 20
"""Characters of a line, a row's texts or a document, where nothing else is said."""

BOM = b"\xef\xbb\xbf"
"""May start a file or, where files were joined, a line; it is no text."""

Record = dict[str, Any] | str | BadRecord
"""The columns that were asked for, a whole text, or what is wrong."""


def records(
    unit: Unit,
    columns: Sequence[str] = (),
    optional: Sequence[str] = (),
    max_characters: int = MAX_CHARACTERS,
) -> Iterator[tuple[int, Record]]:
    """The records of a unit, each with its number in the unit from 1: see `Unit.line_of`.

    A record holds `columns`, and those of `optional` that it has and that are not null; a text
    file is one record, its text. What is wrong with a record comes in its place as a `BadRecord`:
    `not_json`, `not_utf8`, `not_object`, `missing_field`, `too_long` or, in a table, `wrong_type`.
    Blank lines count, and are none. Types of columns that were not asked for do not matter.

    Args:
        max_characters: of a line, a row's texts, or a document; what is longer is not parsed.

    Raises:
        ConfigError: the file is damaged, or is Parquet or Arrow without one of `columns`.
    """
    kind = kind_of(unit.path)
    found: Iterator[tuple[int, Record | bytes]]
    if kind.reader == "text":
        found = _document(unit, kind, max_characters)
    elif kind.reader == "lines":
        found = _lines(unit, kind, max_characters)
    else:
        found = enumerate(rows(unit, columns, optional), start=1)
    for number, value in found:
        try:
            if isinstance(value, bytes):
                value = _object(value, max_characters)
            if isinstance(value, dict):
                value = _chosen(value, columns, optional)
                if kind.reader != "lines" and _characters(value) > max_characters:
                    raise _too_long("the row's texts have", max_characters)
        except BadRecord as bad:
            value = bad
        assert not isinstance(value, bytes)
        yield number, value


def parsed(text: str) -> Any:
    """The value of a JSON text; NaN and Infinity are none.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


_JSON = json.JSONDecoder(parse_constant=_constant)


def _opened(unit: Unit, kind: Kind) -> BinaryIO:
    """The bytes of a unit's file, as they were before they were compressed."""
    if kind.compression == "gzip":
        return cast(BinaryIO, gzip.open(unit.path))
    if kind.compression == "bz2":
        return cast(BinaryIO, bz2.open(unit.path))
    if kind.compression == "xz":
        return cast(BinaryIO, lzma.open(unit.path))
    if kind.compression == "zstd":  # Python has it from 3.14
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(str(unit.path), "zstd")))
    file = unit.path.open("rb")
    file.seek(unit.begin)
    return file


def _document(unit: Unit, kind: Kind, limit: int) -> Iterator[tuple[int, Record | bytes]]:
    longest = len(BOM) + 4 * limit  # bytes: a character has at most 4
    with reading(unit.path), _opened(unit, kind) as file:
        data = file.read(longest + 1)
    try:
        text = _decoded(data.removeprefix(BOM)) if len(data) <= longest else None
        if text is None or len(text) > limit:
            raise _too_long("the text has", limit)
        yield 1, text
    except BadRecord as bad:
        yield 1, bad


def _lines(unit: Unit, kind: Kind, limit: int) -> Iterator[tuple[int, Record | bytes]]:
    """The lines of a unit that are not blank; of one that is far too long no more than a part is
    ever in memory."""
    longest = len(BOM) + 4 * limit + len(b"\r\n")
    left = unit.end - unit.begin if kind.compression is None else None
    number = 0
    with reading(unit.path), _opened(unit, kind) as file:
        while (left is None or left > 0) and (line := file.readline(longest + 1)):
            number += 1
            size = len(line)
            whole, last = size <= longest, line
            while not last.endswith(b"\n") and (last := file.readline(CHUNK)):
                size += len(last)
            left = None if left is None else left - size
            line = line.removeprefix(BOM).strip()
            if not whole:
                yield number, _too_long("the line has", limit)
            elif line:
                yield number, line


def _object(line: bytes, limit: int) -> dict[str, Any]:
    """The object of one line."""
    text = _decoded(line)
    if len(text) > limit:
        raise _too_long("the line has", limit)
    try:
        value = parsed(text)
    except ValueError as error:
        raise BadRecord("not_json", f"the line is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadRecord("not_object", f"the line is {named(value)}, no object")
    return value


def _chosen(
    value: dict[str, Any], columns: Sequence[str], optional: Sequence[str]
) -> dict[str, Any]:
    for name in columns:
        if value.get(name) is None:
            said = "is null" if name in value else "is absent"
            raise BadRecord("missing_field", f"the field {name} {said}")
    names = dict.fromkeys((*columns, *optional))
    chosen = {name: value[name] for name in names if value.get(name) is not None}
    for text in _texts(chosen):
        check_unicode(text)
    return chosen


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, names of fields included."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += part.keys()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _characters(value: dict[str, Any]) -> int:
    return sum(len(text) for field in value.values() for text in _texts(field))


def _too_long(what: str, limit: int) -> BadRecord:
    return BadRecord("too_long", f"{what} more than {limit:,} characters")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"byte {error.start} is not UTF-8 ({error.reason})") from error
