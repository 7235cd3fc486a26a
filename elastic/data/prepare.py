"""Text to token arrays, once: a run that resumes reads those that it prepared."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError, DataConfig
from elastic.data.corpus import load_corpus, text_batches
from elastic.data.packing import Tokens, load_tokens, save_tokens, sealed_tokens, tokenize
from elastic.data.text import Text
from elastic.data.tokenizer import load_tokenizer, train_tokenizer
from elastic.storage.files import atomic_directory, digest, write_json
from elastic.storage.seals import NAME as SEALS
from elastic.storage.seals import FileSeal, SealBroken, Seals, check_beside, damage

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
"""Of the saved directory; raise it when the same settings no longer give the same tokens."""

TEXTS = ("train", "validation", "report")
"""Fields of `Corpus` and of `PreparedData`, and names of the files."""


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the tokens it made, (tokens,) uint16 or uint32 each."""

    tokenizer: PreTrainedTokenizerBase
    train: Tokens
    validation: Tokens
    report: Tokens
    """See `Corpus`."""
    fingerprint: str
    """Of the settings, the text, the tokenizer and the library versions behind the tokens."""
    known: dict[str, Any] = field(default_factory=dict)
    """What the fingerprint is of, by name."""
    text: Text | None = None
    """The text behind them; None where it was not looked at."""
    stored: bool = False
    """Whether this was found on disk, whole."""

    @cached_property
    def sealed(self) -> dict[str, FileSeal]:
        """The seals of the files of tokens, by name; billions of tokens take a while, once."""
        return {f"{name}.npy": sealed_tokens(getattr(self, name)) for name in TEXTS}

    @property
    def digest(self) -> str:
        """Checksum of the tokens."""
        return digest([self.sealed[f"{name}.npy"].digest for name in TEXTS])

    def save(self, cache_dir: Path) -> None:
        """Write `tokenizer/`, an array of each of `TEXTS`, `text.json`, `data.json` and, last,
        `seals.json`, unless they were found there.

        `seals.json` is removed first and written last, so that, whenever this stops, `prepare_data`
        finds all of it or nothing. Only one process may save.
        """
        if self.stored:
            return
        (cache_dir / SEALS).unlink(missing_ok=True)
        with atomic_directory(cache_dir / "tokenizer", replace=True) as directory:
            self.tokenizer.save_pretrained(directory)
        for name in TEXTS:
            save_tokens(cache_dir / f"{name}.npy", getattr(self, name))
        write_json(
            cache_dir / "text.json", None if self.text is None else self.text.to_json(), None
        )
        summary = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "known": self.known,
            **{f"{name}_tokens": len(getattr(self, name)) for name in TEXTS},
        }
        write_json(cache_dir / "data.json", summary)
        Seals.of(cache_dir, self.sealed).write()


def prepare_data(
    config: DataConfig,
    cache_dir: Path,
    parent_path: str | None,
    trained: str | None = None,
    thorough: bool = True,
) -> PreparedData:
    """Read and tokenise the text of `config`, or find it in `cache_dir` from an earlier run.

    Writes nothing, so that a run that turns out impossible leaves no files; see
    `PreparedData.save`.

    Args:
        parent_path: the directory or hub id behind data.tokenizer=parent.
        trained: `PreparedData.digest` of the tokens that a model has been trained on, which goes on
            with the same tokens or not at all.
        thorough: compare every byte that is found with its seal; else sizes now, the rest as it is
            read.

    Raises:
        ConfigError: text or a tokenizer that cannot be read, or that a model is half trained on
            another.
    """
    source = _tokenizer_source(config, parent_path)
    text = Text.of(config, outside=cache_dir.parent)
    known = _known(config, source, text)
    saved = _saved(cache_dir)
    change = None
    if saved is not None:
        change = _change(saved.known, known, trained is not None) or text.change(saved.text)
        if change is not None and trained is not None:
            raise ConfigError(
                f"{change}, and the run in {cache_dir.parent} has trained on the text as it was; "
                "restore that, or choose another run_dir"
            )
    if saved is not None and change is None:
        problem = _problem(cache_dir, thorough)
        if problem is None:
            train, validation, report = (load_tokens(cache_dir / f"{n}.npy") for n in TEXTS)
            tokenizer = load_tokenizer(cache_dir / "tokenizer")
            return PreparedData(
                tokenizer, train, validation, report, saved.fingerprint, stored=True
            )
        log.warning("%s: the tokens are made from the text again", problem)
    made = _make(config, source, known, text)
    if trained is not None and made.digest != trained:
        raise ConfigError(
            f"{cache_dir}: is not as it was written, and the text gives other tokens now than "
            "this run has trained on; restore data/ or the text, or choose another run_dir"
        )
    return made


def _make(
    config: DataConfig, source: tuple[str, str] | None, known: dict[str, Any], text: Text
) -> PreparedData:
    """Tokens from the text itself."""
    # an unusable tokenizer should stop the run before a long download does
    tokenizer = None if source is None else load_tokenizer(*source)
    corpus = load_corpus(config)
    if tokenizer is None:
        texts = (text for batch in text_batches(corpus.train) for text in batch)
        tokenizer = train_tokenizer(texts, config.tokenizer_vocab)
    train, validation, report = (tokenize(getattr(corpus, name), tokenizer) for name in TEXTS)
    for name, tokens in zip(TEXTS, (train, validation, report), strict=True):
        if not len(tokens):
            raise ConfigError(
                f"data.source={config.source}: every document of the {name} part is empty; "
                "must have text"
            )
    fingerprint = digest(known | {"corpus": corpus.fingerprint})
    return PreparedData(
        tokenizer, train, validation, report, fingerprint, known, text.with_checksums()
    )


@dataclass(frozen=True)
class _Saved:
    """What lies in the directory from an earlier run."""

    fingerprint: str
    known: dict[str, Any]
    text: Any


def _saved(cache_dir: Path) -> _Saved | None:
    """None where nothing was finished, or what was cannot be read."""
    try:
        check_beside(cache_dir, "data.json", "text.json")
        value = json.loads((cache_dir / "data.json").read_bytes())
        text = json.loads((cache_dir / "text.json").read_bytes())
        return _Saved(value["fingerprint"], dict(value["known"]), text)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _problem(cache_dir: Path, thorough: bool) -> str | None:
    """What differs from the seals: one line, or None."""
    if thorough:
        return damage(cache_dir)
    try:
        seals = Seals.read(cache_dir)
        if seals is not None:
            seals.check_sizes()
        return f"{cache_dir / SEALS}: is missing" if seals is None else None
    except SealBroken as error:
        return str(error)


def _change(before: dict[str, Any], now: dict[str, Any], trained: bool) -> str | None:
    """What is another than it was, beside the text: one phrase, or None.

    Libraries of another version do not count where a model goes on with the tokens that it has.
    """
    settings = before.get("settings", {}), now["settings"]
    for name in sorted(settings[0].keys() | settings[1].keys()):
        was, value = (each.get(name) for each in settings)
        if was != value:
            return f"data.{name}={value}: was {was}"
    if before.get("tokenizer") != now["tokenizer"]:
        return f"data.tokenizer={now['settings']['tokenizer']}: its files have changed"
    for name in ("format_version", *(() if trained else ("versions",))):
        if before.get(name) != now[name]:
            return f"{name.replace('_', ' ')}: {now[name]}, was {before.get(name)}"
    return None


def _tokenizer_source(config: DataConfig, parent_path: str | None) -> tuple[str, str] | None:
    """Where the tokenizer is, and the setting that gives it; None when it is trained here."""
    if config.tokenizer == "train":
        return None
    if config.tokenizer != "parent":
        return config.tokenizer, "data.tokenizer"
    if parent_path is None:
        raise ConfigError(
            "data.tokenizer=parent: there is no parent.path to take it from; "
            "must be train, or a path or hub id"
        )
    return parent_path, "parent.path"


def _known(config: DataConfig, source: tuple[str, str] | None, text: Text) -> dict[str, Any]:
    """All that the tokens depend on beside the contents of the text."""
    settings = asdict(config)
    for name in ("validation_sequences", "separate_documents"):  # matter to the tokens' use alone
        del settings[name]
    files = {}
    if source is not None:
        names = ("*token*", "vocab*", "merges.txt")
        directory = Path(source[0]).expanduser()  # a hub id matches nothing
        for path in sorted(path for name in names for path in directory.glob(name)):
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "tokenizer": [*source, files] if source else None,
        "versions": {name: version(name) for name in ("datasets", "tokenizers", "transformers")},
    }
