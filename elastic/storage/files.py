"""Files that are whole or not there: temporary name, fsync, rename. No torch."""

import errno
import fcntl
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


def _temporary(path: Path, whose: str | None = None) -> Path:
    """A name beside `path`, on the same file system, that only this process uses."""
    return path.with_name(f".{path.name}.tmp-{os.getpid() if whose is None else whose}")


def _old(path: Path) -> Path:
    """Where a directory waits while its successor takes its name."""
    return path.with_name(f".{path.name}.old")


LEFTOVERS = ".*.tmp-*"
"""Names of files and directories that were not finished."""


def sweep(directory: Path) -> None:
    """Remove what killed processes have left of files and directories not yet renamed, at any
    depth.

    No other process may be writing there.
    """
    for leftover in list(directory.rglob(LEFTOVERS)):
        _remove(leftover)


def _remove(leftover: Path) -> None:
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
    """Errors of the disk as OSErrors that name the file, which those of a write and of safetensors
    do not."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        named = getattr(error, "filename", None) is not None
        if named or isinstance(error, FileExistsError):
            raise
        raise OSError(f"{path}: could not be written ({error})") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write; it becomes `path` if the block ends well, else it is gone.

    Raises:
        OSError: for example a full disk; names `path`.
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

    A directory cannot be renamed over one that is not empty: with `replace` the old one is moved
    aside first, as `.<name>.old`, and comes back if this was stopped right then (see `recover`).
    One process writes at a time: with `replace` others wait for it, without they are refused. What
    killed ones have left of `path` is removed.

    Raises:
        FileExistsError: `path` exists, or another process is writing it, and `replace` is false;
            nothing is written.
        OSError: for example a full disk; names `path`.
    """
    _refuse_existing(path, replace)
    made = next((p for p in (path.parent, *path.parent.parents) if p.exists()), path.parent)
    done = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(path, wait=replace):
            recover(path)
            _refuse_existing(path, replace)
            temporary = _temporary(path)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                with _named(path):
                    yield temporary
                    for file in (*temporary.rglob("*"), temporary):
                        sync(file)
                    _refuse_existing(path, replace)
                    if path.exists():
                        os.rename(path, _old(path))
                    os.rename(temporary, path)
                    sync(path.parent)
                done = True
            finally:
                recover(path)
                if not done:
                    shutil.rmtree(temporary, ignore_errors=True)
    finally:
        parent = path.parent
        while not done and parent != made and parent.exists() and not any(parent.iterdir()):
            parent.rmdir()  # folders that only this attempt had made
            parent = parent.parent


def _refuse_existing(path: Path, replace: bool) -> None:
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; nothing was written")


@contextmanager
def _only_writer(path: Path, wait: bool) -> Iterator[None]:
    """Lock for writing `path`, on this machine or another of the same file system; temporary
    files of writers that were killed are removed.

    The lock is the kernel's (flock) on a file beside `path`, which a killed process gives up. Where
    the file system has no locks no process is kept out, and nothing of others is removed.
    """
    lock = _temporary(path, "lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        except OSError as error:
            alone = False
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise FileExistsError(
                    f"{path} is being written by another process; nothing was written"
                ) from None
        if _has_name(descriptor, lock):
            break
        os.close(descriptor)  # its owner took it away between our opening and locking it
    try:
        for leftover in list(path.parent.iterdir()) if alone else []:
            if leftover.name.startswith(_temporary(path, "").name) and leftover != lock:
                _remove(leftover)
        yield
    finally:
        lock.unlink(missing_ok=True)  # while locked: no other process can hold this file
        os.close(descriptor)


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def require_space(path: Path, size: int) -> None:
    """Stop before so many bytes are written where they do not fit.

    Raises:
        OSError: the file system of `path`, which need not exist yet, has less left.
    """
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise OSError(
            f"{path}: needs {_in_words(size)}, but only {_in_words(free)} are free there; make "
            "room or write elsewhere"
        )


def _in_words(size: int) -> str:
    """Bytes for people: 17.8 GB."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:,} bytes"


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def run_folders(run_dir: Path) -> list[Path]:
    """Folders of a run that are replaced whole, or whose every file is the run's own."""
    names = ("parent", "sorted", "elastic", "data", "importance", "checkpoints")
    return [*(run_dir / name for name in names), *kept_stages(run_dir)]


def elastic_directory(run_dir: Path, stage: str | None = None) -> Path:
    """Where a run writes its elastic checkpoint, and where it keeps that of a stage's end."""
    return run_dir / ("elastic" if stage is None else f"elastic-{stage}")


def kept_stages(run_dir: Path) -> list[Path]:
    """Elastic checkpoints of stages' ends that a run has kept."""
    return sorted(run_dir.glob(elastic_directory(run_dir, "*").name))


def refuse_inside(key: str, output: Path, *inputs: Path) -> None:
    """Stop before something is written into what it is made from.

    Links are followed, so that no other name of a directory hides it.

    Raises:
        ValueError: `output` is one of `inputs`, or lies in one.
    """
    place = output.expanduser().resolve()
    for directory in inputs:
        inner = directory.expanduser().resolve()
        if place == inner or inner in place.parents:
            raise ValueError(
                f"{key}={output}: lies in {directory}, which it is made from or which a run "
                "replaces whole; must be elsewhere"
            )


def require_writable(key: str, output: Path) -> None:
    """Stop before work whose result could not be written.

    Raises:
        ValueError: `output` is a directory, or no file can be made where it is to lie.
    """
    if output.is_dir():
        raise ValueError(f"{key}={output}: is a directory; must be the name of a file")
    require_place(key, output)


def require_place(key: str, output: Path) -> None:
    """Stop before work whose result, a file or a directory, would have no place.

    Raises:
        ValueError: nothing can be made where it is to lie.
    """
    place = next(p for p in output.expanduser().absolute().parents if p.exists())
    if not place.is_dir():
        raise ValueError(f"{key}={output}: {place} is no directory; must lie in one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={output}: nothing can be written into {place}; must be elsewhere")


def digest(value: Any) -> str:
    """Short stable hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
