"""Records of JSON Lines and Parquet files: every one has text in its column, or is named."""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import Dataset

from elastic.config import ConfigError, DataConfig

log = logging.getLogger(__name__)

_TEXT = ("string", "large_string", "string_view")
"""Arrow's types of text."""


def check_parquet_types(paths: Iterable[Path], config: DataConfig) -> None:
    """Every file's column holds text. Where one has numbers, the reader of several files would turn
    them into text, or text into numbers.

    Raises:
        ConfigError: names the first file that has no such column, or another type.
    """
    column = config.text_column
    for path in paths:
        schema = pyarrow.parquet.read_schema(path)
        if column not in schema.names:
            raise ConfigError(
                f"data.text_column={column}: there is no such column in {path}; must be one of "
                + ", ".join(schema.names)
            )
        kind = str(schema.field(column).type)
        if kind.startswith("dictionary<values=string"):
            continue
        if kind not in _TEXT:
            raise ConfigError(
                f"data.text_column={column}: holds {kind} values in {path}; must hold text"
            )


def check_records(paths: list[Path], config: DataConfig) -> None:
    """Every record of these files has text.

    Raises:
        ConfigError: names file, row and field of the first that has not, and the setting that
            permits it.
    """
    missing, first = 0, ""
    for path in paths:
        rows = _json_rows(path, config) if path.suffix == ".jsonl" else _parquet_rows(path, config)
        for number, present in rows:
            if not present:
                missing += 1
                first = first or f"row {number} of {path} has none"
    _settle(missing, first, config)


def check_column(documents: Dataset, column: str, config: DataConfig) -> None:
    """The same for a data set of the hub, whose rows are counted over all of it."""
    missing, first = documents.data.column(column).null_count, ""
    if missing and not config.skip_missing:
        texts = (text for rows in documents.iter(batch_size=1024) for text in rows[column])
        number = next(i for i, text in enumerate(texts, start=1) if text is None)
        first = f"row {number} of {config.path} has none"
    _settle(missing, first, config)


def _settle(missing: int, first: str, config: DataConfig) -> None:
    if not missing:
        return
    if not config.skip_missing:
        more = f" ({missing} in all)" if missing > 1 else ""
        raise ConfigError(
            f"data.text_column={config.text_column}: {first}{more}; must be in every record, or "
            "set data.skip_missing=true to leave those out"
        )
    log.warning(
        "%d records without data.text_column=%s are left out (data.skip_missing)",
        missing,
        config.text_column,
    )


def _json_rows(path: Path, config: DataConfig) -> Iterator[tuple[int, bool]]:
    """Number of each line from 1, and whether it has text; blank lines are none."""
    column = config.text_column
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"data.path={config.path}: row {number} of {path}"
            try:
                record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where} is not JSON ({error}); must be an object") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{where} is not a JSON object; must be one")
            value = record.get(column)
            if value is not None and not isinstance(value, str):
                kind = {bool: "a boolean", list: "a list", dict: "an object"}
                raise ConfigError(
                    f"data.text_column={column}: holds {kind.get(type(value), 'a number')} in row "
                    f"{number} of {path}; must hold text"
                )
            yield number, value is not None


def _parquet_rows(path: Path, config: DataConfig) -> Iterator[tuple[int, bool]]:
    """Number of each row from 1, and whether it has text."""
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[config.text_column]):
            column = batch.column(0)
            if column.null_count == 0:
                number += len(column)
                continue
            for present in column.is_valid().to_pylist():
                number += 1
                yield number, present
