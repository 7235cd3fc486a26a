"""Rows of Parquet and Arrow: of the columns that were asked for, whatever the others hold."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import ipc
from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

from elastic.config import ConfigError
from elastic.config.checks import visible
from elastic.data.bad import BadRecord
from elastic.data.units import Unit, kind_of, reading

ROWS = 64
"""Rows of Parquet that are decoded at one time: each may be a long chat."""


def rows(
    unit: Unit, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[dict[str, Any] | BadRecord]:
    """The rows of a unit of Parquet or Arrow, of each the columns that the file has; text that is
    no UTF-8 is `not_utf8`, and what Python has no value for `wrong_type`.

    Raises:
        ConfigError: the file is damaged, or has not all of `columns`.
    """
    read = _parquet_batches if kind_of(unit.path).reader == "parquet" else _arrow_batches
    with reading(unit.path):
        for batch in read(unit, columns, optional):
            for row in range(len(batch)):
                try:
                    found: dict[str, Any] | BadRecord = _row(batch, row)
                except BadRecord as bad:
                    found = bad
                yield found


def _wanted(
    unit: Unit, names: Sequence[str], columns: Sequence[str], optional: Sequence[str]
) -> list[str]:
    for column in columns:
        if column not in names:
            raise ConfigError(
                f"{visible(unit.path)}: there is no column {visible(column)}; must be one of "
                + visible(", ".join(names))
            )
    return [name for name in dict.fromkeys((*columns, *optional)) if name in names]


def _parquet_batches(
    unit: Unit, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    assert unit.groups is not None
    with ParquetFile(unit.path, page_checksum_verification=True) as file:
        wanted = _wanted(unit, file.schema_arrow.names, columns, optional)
        yield from file.iter_batches(ROWS, row_groups=range(*unit.groups), columns=wanted)


def _arrow_batches(
    unit: Unit, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Of a file or a stream, which have the same suffix."""
    with pa.memory_map(str(unit.path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        names = (ipc.open_file if is_file else ipc.open_stream)(source).schema.names
        wanted = _wanted(unit, names, columns, optional)
        options = ipc.IpcReadOptions(included_fields=[names.index(name) for name in wanted])
        source.seek(0)
        if is_file:
            reader = ipc.open_file(source, options=options)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            yield from ipc.open_stream(source, options=options)


def _row(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = _without_null(column[row].as_py())
        except UnicodeDecodeError as error:
            said = f"byte {error.start} of the field {name} is not UTF-8 ({error.reason})"
            raise BadRecord("not_utf8", said) from error
        except (ValueError, OverflowError) as error:  # a time too far away
            raise BadRecord("wrong_type", f"the field {name} has no value ({error})") from error
    return value


def _without_null(value: Any) -> Any:
    """An Arrow struct has every field that any row has; null is how the others lack it."""
    if isinstance(value, dict):
        return {name: _without_null(part) for name, part in value.items() if part is not None}
    return [_without_null(part) for part in value] if isinstance(value, list) else value
