"""What a run directory may hold when a run begins, and the settings that it is a run of."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from elastic.cluster.lock import LOCK
from elastic.config import ConfigError, RunConfig
from elastic.storage.files import LEFTOVERS, atomic_file

MAY_CHANGE = ("run_dir", "resume", "trainer", "logger", "parent.activation_checkpointing")
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
    before, now = _flat(yaml.safe_load(stored.read_text())), _flat(asdict(config))
    for key in sorted(before.keys() | now.keys()):
        may_change = any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE)
        if may_change or before.get(key) == now.get(key):
            continue
        if key not in now:
            what = f"{key}: not set, but run_dir={run_dir} was started with {_shown(before[key])}"
            way = f"must be set to that (+{key}=...)"
        elif key not in before:
            what = f"{key}={_shown(now[key])}: run_dir={run_dir} was started without it"
            way = "must be left out"
        else:
            what = f"{key}={_shown(now[key])}: run_dir={run_dir} was started with "
            what, way = what + _shown(before[key]), "must be that"
        raise ConfigError(f"{what}; {way}, or choose another run_dir")


def _shown(value: object) -> str:
    """A value as one writes it on the command line."""
    names = {"None": "null", "True": "true", "False": "false"}
    return names.get(str(value), str(value))


def _matters(path: Path) -> bool:
    """False for what is left of a run that was killed before it had written its settings."""
    return path.name != LOCK and not path.match(LEFTOVERS)


def write_config(config: RunConfig) -> None:
    """Write the settings, for those who read the run and for the check of the next start."""
    with atomic_file(Path(config.run_dir) / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat = {}
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            flat.update(_flat(entry, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = entry
    return flat
