"""The seals of a parent from elsewhere, kept in the directory of the run that reads it."""

import logging
from pathlib import Path

from elastic.parent.small_files import small_files
from elastic.storage.index import INDEX
from elastic.storage.seals import Seals
from elastic.storage.store import shards

log = logging.getLogger(__name__)

NAME = "parent.seals.json"
"""File in the run directory."""

REMEDY = "restore the parent as it was when this run began, or choose another run_dir"


def parent_seals(source: Path, run_dir: Path) -> Seals | None:
    """What a run has sealed of its parent; None before it has.

    Raises:
        SealBroken: the file of the seals is damaged.
    """
    return Seals.read(source, run_dir / NAME, REMEDY)


def seal_parent(source: Path, run_dir: Path) -> None:
    """Seal every file of a parent that a run reads, once. Where the parent has seals of its own
    they are compared: what was damaged before is not taken for whole.

    Raises:
        SealBroken: a file differs from the parent's own seals.
    """
    if (run_dir / NAME).exists():
        return
    found = {
        path.relative_to(source).as_posix() for path in (*shards(source), *small_files(source))
    }
    found |= {name for name in ("config.json", INDEX, "README.md") if (source / name).is_file()}
    size = sum((source / name).stat().st_size for name in found)
    log.info("sealing the parent in %s: %.3g GB are read once", source, size / 1e9)
    seals = Seals.of(source, names=sorted(found))
    own = Seals.read(source)
    for name, seal in seals.files.items():
        if own is not None and own.files.get(name, seal) != seal:
            own.check(name)
    seals.write(run_dir / NAME)
