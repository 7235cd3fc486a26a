"""What a run directory may hold when a run begins, and the settings that it is a run of."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from elastic.cluster.lock import LOCK
from elastic.config import ConfigError, RunConfig
from elastic.storage.files import LEFTOVERS, atomic_file
from elastic.storage.foreign import read_yaml

MAY_CHANGE = (
    "run_dir",
    "resume",
    "trainer",
    "logger",
    "parent.activation_checkpointing",
    "data.workers",
    "data.loader_workers",
    "data.prepare_inline_tokens",
)
"""Settings, or groups of them, that a resumed run may set anew; the others would make it another
run."""


def check_run_dir(config: RunConfig, first: bool) -> None:
    """Resume only what is this run; refuse to write into anything else.

    Args:
        first: whether this is rank 0. The others come when it has looked, and has begun to write.

    Raises:
        ConfigError: the directory is another run's, or no run's at all.
    """
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir}: exists and is not a directory")
    if not run_dir.exists() or not any(_matters(path) for path in run_dir.iterdir()):
        return
    if not first:
        return
    if not config.resume:
        raise ConfigError(
            f"resume=false: run_dir={run_dir} is not empty; "
            "choose another run_dir, or leave resume=true to go on"
        )
    stored = run_dir / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"run_dir={run_dir}: not empty, and not a run; choose another")
    settings = read_yaml(stored)
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{stored}: must be settings by name; restore it, or choose another run_dir"
        )
    for key, before, now in _differences(settings, asdict(config)):
        if any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE):
            continue
        here = f"{key} is not set" if now is MISSING else f"{key}={_shown(now)}"
        then = "without this setting" if before is MISSING else f"with {_shown(before)}"
        way = "leave it out" if before is MISSING else "must be that"
        raise ConfigError(
            f"{here}: run_dir={run_dir} was started {then}; {way}, or choose another run_dir"
        )


MISSING = object()
"""In place of a setting that is not there; null is a value."""


def _differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values of what differs, by key; MISSING where there is none."""
    for name in sorted(before.keys() | now.keys(), key=str):
        was, is_now = before.get(name, MISSING), now.get(name, MISSING)
        if isinstance(was, dict) and isinstance(is_now, dict):
            yield from _differences(was, is_now, f"{prefix}{name}.")
        elif was != is_now:
            yield f"{prefix}{name}", was, is_now


def _shown(value: object) -> str:
    """A value as one writes it on the command line; of several settings those that are set."""
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _matters(path: Path) -> bool:
    """False for prepared text, and for what is left of a run that was killed before it had written
    its settings."""
    return path.name not in (LOCK, "data") and not path.match(LEFTOVERS)


def write_config(config: RunConfig) -> None:
    """Write the settings, for those who read the run and for the check of the next start."""
    with atomic_file(Path(config.run_dir) / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
