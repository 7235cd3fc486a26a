"""Text -> tokens on disk, once: sources are read, tokenised by many processes, and sealed.

A directory of prepared text has `tokenizer/`, `parts/`, `packs/`, `text.json` (which files it was
made from), `data.json` and, last, `seals.json`. Parts are named by what they are made from, so that
whatever was done before is found again.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.config import ConfigError, DataConfig
from elastic.data.known import change_of, changed, known_of, template_file, tokenizer_source
from elastic.data.make import make
from elastic.data.prepared import PreparedData
from elastic.data.sources import (
    SourceFiles,
    find_sources,
)
from elastic.data.tokenizer import load_tokenizer
from elastic.data.tokens import TokenStore, read_summary
from elastic.storage.seals import NAME as SEALS
from elastic.storage.seals import SealBroken, Seals, check_beside, damage

log = logging.getLogger(__name__)

THOROUGH_BYTES = 4 << 30
"""Tokens up to this size are compared with their seals at every start; more, as they are read."""


def prepare_data(
    config: DataConfig,
    run_dir: Path,
    parent_path: str | None,
    trained: str | None = None,
    inline: bool = True,
    vocabulary: int | None = None,
    lengths: Mapping[str, int] | None = None,
) -> PreparedData:
    """Find the prepared text of `config`, or prepare it. Processes of several runs may do so
    at once: each part is written whole or not at all.

    Args:
        run_dir: whose `data` it is, unless data.prepared names another directory.
        parent_path: the directory or hub id behind data.tokenizer=parent.
        trained: `PreparedData.digest` of what a model has been trained on, which goes on with the
            same or not at all.
        inline: whether a run is waiting for it, which data.prepare_inline_tokens bounds.
        vocabulary: as in `PreparedData`.
        lengths: setting -> tokens of a sequence, which must not be more than all the text has.

    Raises:
        ConfigError: text or a tokenizer that cannot be read, too much of it to be prepared while a
            run waits, or a model is half trained on another text.
    """
    directory = Path(config.prepared) if config.prepared else run_dir / "data"
    source = tokenizer_source(config, parent_path)
    found = find_sources(config, outside=run_dir)
    template = None if config.chat_template is None else template_file(config.chat_template)
    _require_long_enough(config, found, lengths or {})
    known = known_of(config, source, template)
    saved = _saved(directory)
    change = None
    if saved is not None:
        change = change_of(saved.known, known, trained is not None) or changed(found, saved.text)
        if change is not None and trained is not None:
            raise ConfigError(
                f"{change}, and the run in {run_dir} has trained on the text as it was; "
                "restore that, or choose another run_dir"
            )
    data = None
    if saved is not None and change is None:
        data, problem = _stored(config, directory, saved, vocabulary)
        if data is None:
            log.warning("%s: the tokens are made from the text again", problem)
    made = data is None
    if data is None:
        data = make(config, directory, source, template, known, found, inline, vocabulary)
    if trained is not None and data.digest != trained:
        if not made:
            raise ConfigError(
                f"data.packing={config.packing}, data.validation_every={config.validation_every}: "
                f"the run in {run_dir} has trained on other rows of these tokens; must be as they "
                "were, or choose another run_dir"
            )
        raise ConfigError(
            f"{directory}: is not as it was written, and the text gives other tokens now than "
            "this run has trained on; restore data/ or the text, or choose another run_dir"
        )
    return data


def open_prepared(config: DataConfig, run_dir: Path, vocabulary: int | None = None) -> PreparedData:
    """The text of a run that has trained, as it was; its sources are not looked at.

    Raises:
        ConfigError: it is not there, or not as it was written.
    """
    directory = Path(config.prepared) if config.prepared else run_dir / "data"
    saved = _saved(directory)
    data, problem = None, f"{directory}: is not there, or damaged"
    if saved is not None:
        data, problem = _stored(config, directory, saved, vocabulary)
    if data is None:
        raise ConfigError(f"{problem}; run the command that made the run again, which restores it")
    return data


@dataclass(frozen=True)
class _Saved:
    """What lies in the directory from before."""

    fingerprint: str
    known: dict[str, Any]
    text: Any
    parts: dict[str, list[str]]


def _saved(directory: Path) -> _Saved | None:
    """None where nothing was finished, or what was cannot be read."""
    try:
        check_beside(directory, "data.json", "text.json")
        value = json.loads((directory / "data.json").read_bytes())
        text = json.loads((directory / "text.json").read_bytes())
        return _Saved(value["fingerprint"], dict(value["known"]), dict(text), dict(value["parts"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _stored(
    config: DataConfig, directory: Path, saved: _Saved, vocabulary: int | None
) -> tuple[PreparedData | None, str]:
    """What is there, or what is wrong with it."""
    try:
        seals = Seals.read(directory)
        if seals is None:
            return None, f"{directory / SEALS}: is missing"
        seals.check_all()
    except SealBroken as error:
        return None, str(error)
    stores = {}
    for name in config.sources:
        paths = [directory / "parts" / part for part in saved.parts[name]]
        summaries = [read_summary(path) for path in paths]
        for path, summary in zip(paths, summaries, strict=True):
            if summary is None:
                return None, damage(path) or f"{path}: is damaged"
        stores[name] = TokenStore(paths, [each for each in summaries if each is not None])
    parts = [path for store in stores.values() for path in store.directories]
    if sum(each.stat().st_size for path in parts for each in path.iterdir()) <= THOROUGH_BYTES:
        for path in parts:
            problem = damage(path)
            if problem is not None:
                return None, problem
    tokenizer = load_tokenizer(directory / "tokenizer")
    return PreparedData(config, directory, tokenizer, stores, saved.fingerprint, vocabulary), ""


def _require_long_enough(
    config: DataConfig, found: dict[str, SourceFiles], lengths: Mapping[str, int]
) -> None:
    """Refuse what cannot be long enough, before it is read: a token is of a byte at least, and each
    document ends with one more."""
    most = 0
    for each in found.values():
        if each.kind not in ("files", "stdlib"):
            return
        if any(not name.endswith(PLAIN) for name in each.files):
            return
        most += sum(file.bytes for file in each.files.values()) + len(each.files)
    for setting, length in lengths.items():
        if length > most:
            raise ConfigError(
                f"{setting}={length}: a sequence longer than all the text, of {most:,} bytes; must "
                "be less, or give more text (data.sources)"
            )


PLAIN = (".py", ".txt", ".md", ".jsonl")
"""Suffixes of files that are as long as they say."""
