"""Small texts on disk, and the settings that read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from elastic.config import DataConfig, SourceConfig
from elastic.data import PreparedData


def source(path: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(**({"kind": "files", "path": str(path)} | settings))


def text_config(*paths: Path | str | SourceConfig, **settings: Any) -> DataConfig:
    """Files, as sources a, b, ...; every second document is held out."""
    sources = [each if isinstance(each, SourceConfig) else source(each) for each in paths]
    named = {chr(97 + number): each for number, each in enumerate(sources)}
    defaults: dict[str, Any] = {"validation_every": 2, "tokenizer_vocab": 300}
    return DataConfig(sources=named, **(defaults | settings))


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def json_lines(path: Path, *records: object) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def parquet(path: Path, columns: dict[str, Any], rows_per_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


def numbered_texts(path: Path, count: int, words: int = 20, first: int = 0) -> Path:
    """JSON Lines with so many different documents."""
    texts = (f"document {n} " + "word " * (n % words) for n in range(first, first + count))
    return json_lines(path, *({"text": text} for text in texts))


def documents_of(data: PreparedData, name: str = "a", split: str | None = None) -> list[str]:
    """Text of a source's documents, as it was tokenised."""
    store = data.stores[name]
    numbers = np.arange(store.documents) if split is None else data.documents(name, split)
    places = [each.tolist() for each in store.places(numbers)]
    ends = [store.read(start + size - 1, 1)[0] for start, size in zip(*places, strict=True)]
    assert all(each.tolist() == [data.tokenizer.eos_token_id] for each in ends)
    return [
        data.tokenizer.decode(store.read(start, size - 1)[0])
        for start, size in zip(*places, strict=True)
    ]
