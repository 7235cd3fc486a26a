"""What prepared tokens depend on, and how that is another than it was."""

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from elastic.config import CONF, ConfigError, DataConfig
from elastic.data.sources import SourceFiles
from elastic.storage.files import digest

FORMAT_VERSION = 4
"""Of the directory."""

RUN_ONLY = (
    "validation_sequences validation_every packing on_error max_skip_fraction workers prepared "
    "loader_workers prepare_inline_tokens"
).split()
"""Settings of `data` that make no other tokens."""


def tokenizer_source(config: DataConfig, parent_path: str | None) -> tuple[str, str] | None:
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


def template_file(name: str) -> str:
    """A chat template from a file: a path, or the name of one of ours in conf/chat."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = CONF / "chat" / f"{name}.jinja"
    if not path.is_file():
        ours = sorted(each.stem for each in (CONF / "chat").glob("*.jinja"))
        raise ConfigError(
            f"data.chat_template={name}: there is no such file; must be a file with a Jinja "
            f"template, or one of {', '.join(ours)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template={name}: cannot be read ({error})") from error


def known_of(
    config: DataConfig, source: tuple[str, str] | None, template: str | None
) -> dict[str, Any]:
    """All that the tokens depend on beside the contents of the text."""
    settings = {name: value for name, value in asdict(config).items() if name not in RUN_ONLY}
    settings["sources"] = {
        name: {key: value for key, value in each.items() if key != "weight"}
        for name, each in settings["sources"].items()
    }
    if config.tokenizer == "train":  # it is trained on the text that is not held out
        settings["validation_every"] = config.validation_every
    settings["chat_template"] = template
    files = {} if source is None else _digests(Path(source[0]).expanduser())
    return {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "tokenizer": [*source, files] if source else None,
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _digests(directory: Path) -> dict[str, str]:
    """Checksums of a tokenizer's files; a hub id has none here."""
    names = ("*token*", "vocab*", "merges.txt", "chat_template*")
    paths = sorted({path for name in names for path in directory.glob(name) if path.is_file()})
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def change_of(before: dict[str, Any], now: dict[str, Any], trained: bool) -> str | None:
    """What is another than it was, beside the text: one phrase, or None.

    Libraries of another version do not count where a model goes on with the tokens that it has.
    """
    was, is_now = _flat(before.get("settings", {})), _flat(now["settings"])
    for name in sorted(was.keys() | is_now.keys()):
        if was.get(name) != is_now.get(name):
            return f"data.{name}={is_now.get(name)}: was {was.get(name)}"
    if before.get("tokenizer") != now["tokenizer"]:
        return f"data.tokenizer={now['settings']['tokenizer']}: its files have changed"
    for name in ("format_version", *(() if trained else ("versions",))):
        if before.get(name) != now[name]:
            return f"{name.replace('_', ' ')}: {now[name]}, was {before.get(name)}"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= _flat(each, f"{prefix}{name}.")
    return found


def changed(found: dict[str, SourceFiles], before: dict[str, Any]) -> str | None:
    """How the text is another than it was: one phrase, or None."""
    for name, each in found.items():
        what = "kind=stdlib" if each.kind == "stdlib" else "path"
        change = each.change(f"data.sources.{name}.{what}", before[name])
        if change is not None:
            return change
    return None


def directory_digest(directory: Path) -> str:
    return digest(_digests(directory))
