"""Where text comes from: this Python's own library, local files, or a data set on the hub.

Every source ends as two data sets with the one column `text`, in an order that does not depend on
the file system. Text is never executed: data sets that need their own code are refused.
"""

import glob
import logging
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled

from elastic.config import ConfigError, DataConfig
from elastic.data.records import check_column, check_parquet_types, check_records
from elastic.storage.files import digest

log = logging.getLogger(__name__)

SKIPPED_DIRECTORIES = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
}  # fmt: skip
"""Not the library's own code, or tests full of deliberately broken text."""

_DOCUMENT: tuple[str, dict[str, Any]] = ("text", {"sample_by": "document"})
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": _DOCUMENT,
    ".md": _DOCUMENT,
    ".py": _DOCUMENT,
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
"""File suffix -> builder of the datasets library and its options."""


@dataclass(frozen=True)
class Corpus:
    """Documents of three texts that share none, each with the one column `text`."""

    train: Dataset
    validation: Dataset
    """To choose by: early looks, and the comparison of members."""
    report: Dataset
    """For figures that are reported: nothing was chosen by them."""
    fingerprint: str
    """Changes when the source does: see `corpus_fingerprint`."""


def load_corpus(config: DataConfig) -> Corpus:
    """Read the text of `config`; every `validation_every`-th document is held out, for validation
    and for the report in turns.

    Raises ConfigError when the source is missing, unreadable, lacks the text column, or has too
    few documents to hold out two.
    """
    with _quiet():
        if config.source == "stdlib":
            documents = _read_stdlib()
        elif config.source == "files":
            documents = _read_files(config)
        else:
            documents = _read_hub(config)
    every, count = config.validation_every, len(documents)
    if count < 2 * every:
        raise ConfigError(
            f"data.validation_every={every}: the corpus has only {count} document(s), so that not "
            "one each would be held out for validation and for the report; must be at most half "
            "the number of documents, and at least 2 (data.path can name more or smaller files)"
        )
    empty = sum(text == "" for rows in documents.iter(batch_size=1024) for text in rows["text"])
    if empty:
        log.warning("%d of %d documents are empty and left out", empty, count)
    held_out = np.arange(every - 1, count, every)
    validation, report = held_out[::2], held_out[1::2]
    return Corpus(
        train=documents.select(np.setdiff1d(np.arange(count), held_out)),
        validation=documents.select(validation),
        report=documents.select(report),
        fingerprint=corpus_fingerprint(config),
    )


def corpus_fingerprint(config: DataConfig) -> str:
    """A hash of what `load_corpus` would read, without reading it.

    Names and sizes (and, for local files, times of change) stand for contents; a hub data set is
    identified by its id, so a run that resumes keeps its text although the hub's has changed.
    """
    known: list[Any]
    if config.source == "stdlib":
        root = stdlib_root()
        sizes = [[name, (root / name).stat().st_size] for name in stdlib_files(root)]
        known = [platform.python_version(), sizes]
    elif config.source == "files":
        stats = [(str(path), path.stat()) for path in matching_files(config)]
        known = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    else:
        known = [config.path, config.subset, config.split]
    return digest([config.source, known])


def stdlib_files(root: Path) -> list[str]:
    """Relative paths of the Python files under `root`, sorted; tests and packages are left out."""
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in SKIPPED_DIRECTORIES]
        relative = Path(directory).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def text_batches(texts: Dataset, characters: int = 1 << 20) -> Iterator[list[str]]:
    """The non-empty documents of `texts` in order, in lists of about `characters` characters.

    Batches are bounded by size, not by count: a few long documents must not fill the memory.
    """
    batch: list[str] = []
    size = 0
    for rows in texts.iter(batch_size=64):
        for text in rows["text"]:
            if not text:  # null or empty
                continue
            batch.append(text)
            size += len(text)
            if size >= characters:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def reason(error: BaseException) -> str:
    """First line of the root cause of `error`, which libraries wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _read_stdlib() -> Dataset:
    root = stdlib_root()
    texts = []
    for name in stdlib_files(root):
        try:
            texts.append((root / name).read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            continue  # a few files declare another encoding
    if not texts:
        raise ConfigError(
            f"data.source=stdlib: there are no .py files in {root}; "
            "must be files or hub for this Python"
        )
    return Dataset.from_dict({"text": texts})  # in memory: no cache file


def matching_files(config: DataConfig) -> list[Path]:
    """Files that match data.path, absolute and sorted."""
    assert config.path is not None  # DataConfig has checked it
    found = glob.glob(os.path.expanduser(config.path), recursive=True)
    paths = sorted(Path(path).absolute() for path in found if os.path.isfile(path))
    if not paths:
        raise ConfigError(
            f"data.path={config.path}: no such file; must be a glob of .txt, .jsonl or .parquet "
            "files, for example 'texts/**/*.txt'"
        )
    suffixes = sorted({path.suffix for path in paths})
    if len(suffixes) > 1 or suffixes[0] not in BUILDERS:
        raise ConfigError(
            f"data.path={config.path}: matches {', '.join(s or 'suffixless' for s in suffixes)} "
            f"files; must match files of one kind, one of {', '.join(BUILDERS)}"
        )
    return paths


def _read_files(config: DataConfig) -> Dataset:
    paths = matching_files(config)
    suffix = paths[0].suffix
    builder, options = BUILDERS[suffix]
    column = "text" if builder == "text" else config.text_column
    records = builder != "text"
    try:
        if suffix == ".parquet":  # a column store: other columns need not be read, or cached
            check_parquet_types(paths, config)
            options = {**options, "columns": [column]}
        documents = datasets.load_dataset(
            builder,
            # the library takes names for patterns once more
            data_files=[glob.escape(str(path)) for path in paths],
            split="train",
            **options,
        )
    except ConfigError:
        raise
    except Exception as error:
        if suffix == ".jsonl":
            check_records(paths, config)  # names the row, where it is one
        raise ConfigError(
            f"data.path={config.path}: cannot read these {suffix} files: {reason(error)}"
        ) from error
    if records:
        _require_column(documents.column_names, column, config)
        check_records(paths, config)
    return _only_text(documents, column, config)


def _read_hub(config: DataConfig) -> Dataset:
    try:
        documents = datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:
        raise ConfigError(
            f"data.path={config.path} (data.subset={config.subset}, data.split={config.split}): "
            f"cannot load this data set: {reason(error)}"
        ) from error
    chosen = _only_text(documents, config.text_column, config)
    check_column(chosen, "text", config)
    return chosen


def _require_column(columns: list[str], column: str, config: DataConfig) -> None:
    if column not in columns:
        raise ConfigError(
            f"data.text_column={column}: there is no such column in {config.path}; "
            f"must be one of {', '.join(columns)}"
        )


def _only_text(documents: Dataset, column: str, config: DataConfig) -> Dataset:
    """Keep the column with the text, and call it `text`."""
    _require_column(documents.column_names, column, config)
    kind = getattr(documents.features[column], "dtype", "nested")
    if kind not in ("string", "large_string"):
        raise ConfigError(
            f"data.text_column={column}: holds {kind} values in {config.path}; must hold text"
        )
    chosen = documents.select_columns([column])
    return chosen if column == "text" else chosen.rename_column(column, "text")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars in log files, and no library's own log of an error that we report."""
    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    if hide:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if hide:
            datasets.enable_progress_bars()
