"""Tokenizer and config files that belong to a checkpoint beside its weights, and its licence."""

import logging
import shutil
from pathlib import Path

from elastic.storage.files import write_json
from elastic.storage.foreign import parse_yaml, read_json
from elastic.storage.seals import Seals

log = logging.getLogger(__name__)

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Files of a tokenizer."""

OTHERS = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*")
"""What else goes along."""

LEFT = (".safetensors", ".py", ".pyc", ".bin", ".pt", ".pth", ".pkl")
"""Endings of weights, code, and what runs code when it is loaded: never copied, whatever
their name."""


def small_files(directory: Path, tokenizer: bool = True) -> list[Path]:
    """Tokenizer and config files of a checkpoint; `tokenizer=False` leaves the tokenizer's out."""
    patterns = (*TOKENIZER, *OTHERS) if tokenizer else OTHERS
    found = {path for pattern in patterns for path in directory.glob(pattern)}
    files = sorted(path for path in found if path.is_file() and path.suffix not in LEFT)
    return [path for path in files if _stays(path, directory)]


def _stays(path: Path, directory: Path) -> bool:
    """Whether a file is one of its directory's, and no link to somebody else's; in the cache of the
    hub a checkpoint's files are links to `blobs`, beside it."""
    home = directory.resolve()
    owned = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    stays = any(path.resolve().is_relative_to(place) for place in owned)
    if not stays:
        log.warning("%s: a link that leaves the checkpoint; it is left out", path)
    return stays


def copy_small_files(
    source: Path, target: Path, tokenizer: bool = True, seals: Seals | None = None
) -> None:
    """Copy what is there and what `target` has not.

    Args:
        seals: what the files are compared with first; None takes seals.json beside them, if it is
            there.

    Raises:
        SealBroken: a file differs.
    """
    files = small_files(source, tokenizer)
    seals = seals or Seals.read(source)
    if seals is not None:
        seals.check(*(path.relative_to(source).as_posix() for path in files))
    for path in files:
        copy = target / path.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            _copy(path, copy)


def _copy(source: Path, target: Path) -> None:
    """Copy a file as it is, except that JSON loses its references to code (auto_map)."""
    if source.suffix == ".json":
        try:
            value = read_json(source)
        except ValueError:
            value = None  # then no loader can follow a reference in it either
        if isinstance(value, dict) and "auto_map" in value:
            del value["auto_map"]
            write_json(target, value)
            return
    shutil.copyfile(source, target)


def licence_of(directory: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a checkpoint's model card; empty if it has
    nothing, or is a link to somebody else's file."""
    card = directory / "README.md"
    if not card.is_file() or not _stays(card, directory):
        return {}
    parts = card.read_text(errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        fields = parse_yaml(parts[1])
    except (ValueError, RecursionError):
        return {}
    names = ("license", "license_name", "license_link")
    return {n: str(fields[n]) for n in names if n in fields} if isinstance(fields, dict) else {}
