"""Files that are whole or not there: temporary name, fsync, rename. No torch."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A name beside `path`, on the same file system, that only this process uses."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _old(path: Path) -> Path:
    """Where a directory waits while its successor takes its name."""
    return path.with_name(f".{path.name}.old")


LEFTOVERS = ".*.tmp-*"
"""Names of files and directories that were not finished."""


def sweep(directory: Path) -> None:
    """Remove what killed processes have left of files and directories not yet renamed, at any
    depth.

    Nobody else may be writing there.
    """
    for leftover in list(directory.rglob(LEFTOVERS)):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def recover(path: Path) -> None:
    """Bring back a directory that had stepped aside when its successor failed to arrive; if that
    has arrived, be done with the old one."""
    if path.exists():
        shutil.rmtree(_old(path), ignore_errors=True)
    elif _old(path).is_dir():
        os.rename(_old(path), path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the disk are OSErrors that say where: a write does not know, and safetensors has
    errors of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise OSError(f"{path}: could not be written ({error})") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write; it becomes `path` if the block ends well, else it is gone.

    Raises:
        OSError: the disk is full, say; names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with _named(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory to fill; it becomes `path` if the block ends well, else it is
    gone.

    A directory cannot be renamed over one that is not empty: with `replace` the old one steps aside
    first, as `.<name>.old`, and comes back if this was stopped right then (see `recover`).

    Raises:
        FileExistsError: `path` exists and `replace` is false; nothing is written.
        OSError: the disk is full, say; names `path`.
    """
    recover(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; nothing was written")
    made = next((p for p in (path.parent, *path.parent.parents) if p.exists()), path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    done = False
    try:
        with _named(path):
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                sync(file)
            if path.exists():
                os.rename(path, _old(path))
            os.rename(temporary, path)
            sync(path.parent)
        done = True
    finally:
        recover(path)
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            parent = path.parent
            while parent != made and parent.exists() and not any(parent.iterdir()):
                parent.rmdir()  # folders that only this attempt had made
                parent = parent.parent


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def digest(value: Any) -> str:
    """Short stable hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
