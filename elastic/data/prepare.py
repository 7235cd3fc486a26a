"""Text to token arrays, once: a run that resumes reads those that it prepared."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError, DataConfig
from elastic.data.corpus import corpus_fingerprint, load_corpus, text_batches
from elastic.data.packing import load_tokens, save_tokens, tokenize
from elastic.data.tokenizer import load_tokenizer, train_tokenizer
from elastic.storage.files import atomic_directory, digest, write_json

FORMAT_VERSION = 1
"""Of the saved directory; raise it when the same settings no longer give the same tokens."""


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the tokens it made, (tokens,) uint16 or uint32 each."""

    tokenizer: PreTrainedTokenizerBase
    train: np.ndarray
    validation: np.ndarray
    fingerprint: str
    """Of the settings, the text, the tokenizer and the library versions behind the tokens."""

    def save(self, cache_dir: Path) -> None:
        """Write `tokenizer/`, `train.npy`, `validation.npy` and, last, `data.json`.

        `data.json` is removed first and written last, so that, whenever this stops, `prepare_data`
        finds all of it or nothing. Only one process may save.
        """
        names = ("tokenizer", "train.npy", "validation.npy")
        whole = all((cache_dir / name).exists() for name in names)
        if whole and _saved_fingerprint(cache_dir) == self.fingerprint:
            return
        (cache_dir / "data.json").unlink(missing_ok=True)
        with atomic_directory(cache_dir / "tokenizer", replace=True) as directory:
            self.tokenizer.save_pretrained(directory)
        save_tokens(cache_dir / "train.npy", self.train)
        save_tokens(cache_dir / "validation.npy", self.validation)
        summary = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
        }
        write_json(cache_dir / "data.json", summary)


def prepare_data(config: DataConfig, cache_dir: Path, parent_path: str | None) -> PreparedData:
    """Read and tokenise the text of `config`, or find it in `cache_dir` from an earlier run.

    Writes nothing, so that a run that turns out impossible leaves no files; see
    `PreparedData.save`.
    `parent_path` is the directory or hub id behind data.tokenizer=parent. Raises ConfigError for
    text or a tokenizer that cannot be read.
    """
    source = _tokenizer_source(config, parent_path)
    fingerprint = _fingerprint(config, source)
    if _saved_fingerprint(cache_dir) == fingerprint:
        try:
            return PreparedData(
                tokenizer=load_tokenizer(cache_dir / "tokenizer"),
                train=load_tokens(cache_dir / "train.npy"),
                validation=load_tokens(cache_dir / "validation.npy"),
                fingerprint=fingerprint,
            )
        except (OSError, ValueError):
            pass  # files were taken away; make them again
    # an unusable tokenizer should stop the run before a long download does
    tokenizer = None if source is None else load_tokenizer(*source)
    corpus = load_corpus(config)
    if tokenizer is None:
        texts = (text for batch in text_batches(corpus.train) for text in batch)
        tokenizer = train_tokenizer(texts, config.tokenizer_vocab)
    train, validation = (tokenize(part, tokenizer) for part in (corpus.train, corpus.validation))
    for name, tokens in (("train", train), ("validation", validation)):
        if not len(tokens):
            raise ConfigError(
                f"data.source={config.source}: every document of the {name} part is empty; "
                "must have text"
            )
    return PreparedData(tokenizer, train, validation, fingerprint)


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


def _fingerprint(config: DataConfig, source: tuple[str, str] | None) -> str:
    settings = asdict(config)
    for name in ("validation_sequences", "separate_documents"):  # matter to the tokens' use alone
        del settings[name]
    files = {}
    if source is not None:
        names = ("*token*", "vocab*", "merges.txt")
        directory = Path(source[0]).expanduser()  # a hub id matches nothing
        for path in sorted(path for name in names for path in directory.glob(name)):
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    known = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "corpus": corpus_fingerprint(config),
        "tokenizer": source and [source[0], files],
        "versions": {name: version(name) for name in ("datasets", "tokenizers", "transformers")},
    }
    return digest(known)


def _saved_fingerprint(cache_dir: Path) -> str | None:
    """Contents of `data.json`; None when there is none that can be read."""
    try:
        return json.loads((cache_dir / "data.json").read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
