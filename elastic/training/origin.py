"""What a model is trained from: its parent, its ranking and its tokens, by checksum.

Every resume checkpoint says so, and a run goes on from the same only.
"""

import json
from pathlib import Path
from typing import Any

from elastic.config import ConfigError

ORIGIN = "made_from"
"""Key in a resume checkpoint's state."""

_WAYS = {
    "tokens": "the tokens in data/ are not those",
    "parent": "the parent is not the one",
    "ranking": "the ranking in importance/ is not the one, and cannot be made the same again here,",
}


def require_same(state: dict[str, Any], now: dict[str, str], run_dir: Path) -> None:
    """Raise `ConfigError` unless a checkpoint was trained from the same things."""
    then = state.get(ORIGIN, {})
    for name, way in _WAYS.items():
        if name in now and then.get(name, now[name]) != now[name]:
            raise ConfigError(
                f"run_dir={run_dir}: {way} that this run has trained with; restore it, or choose "
                "another run_dir"
            )


def trained_tokens(checkpoints: Path) -> str | None:
    """Checksum of the tokens that the newest checkpoint was trained on, as it says, which nobody
    has verified; None where nothing was trained."""
    for path in sorted(checkpoints.glob("[!.]*/state.json"), reverse=True):
        try:
            return str(json.loads(path.read_bytes())[ORIGIN]["tokens"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None
