"""A checkout of its own for a test: what git has, and nothing that lies around."""

import shutil
from pathlib import Path

from helpers.paths import ROOT

FOLDERS = ("conf", "docs", "elastic", "slurm", "tests")
LITTER = shutil.ignore_patterns("__pycache__", ".*_cache", "*.egg-info")


def checkout(where: Path) -> Path:
    """Copy the repository's own files to a directory that does not exist yet."""
    where.mkdir(parents=True)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, where / name, symlinks=True, ignore=LITTER)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, where)
    return where
