"""One run per run directory, held by a lock that dies with its process. No torch."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from elastic.config import ConfigError

log = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file in `run_dir`. What a killed run leaves of it means nothing."""

REQUEUE_SECONDS = 180.0
"""How long a requeued Slurm job waits for the file system to notice that its first life is over."""


class RunLock:
    """The right to write into `run_dir`; rank 0 alone takes it, for as long as the run lasts.

    The lock is the kernel's (flock) on an open file, so that it goes with the process however that
    ends. Neither programs started by the process (close-on-exec) nor forks of it keep it.

    Raises:
        ConfigError: there is a file in the way; or another run holds the lock: names the directory,
            the host and process, and since when. A requeued Slurm job waits `patience` seconds
            first where the holder is itself: a file server may need a while to see that a node is
            gone.
    """

    def __init__(self, run_dir: Path, patience: float = REQUEUE_SECONDS) -> None:
        self.run_dir, self.patience = run_dir, patience
        self.path = run_dir / LOCK
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> Self:
        """Take the lock, or raise with its holder; makes the directory where there is none."""
        assert self._descriptor is None
        self._make_directory()
        deadline = time.monotonic() + self.patience
        waits = False
        while not self._try():
            holder = self._holder()
            if not _is_earlier_life(holder, os.environ) or time.monotonic() > deadline:
                raise ConfigError(_refusal(self.run_dir, holder))
            if not waits:
                log.info("waiting for the lock of this job's earlier life on %s", holder["host"])
                waits = True
            time.sleep(min(1.0, self.patience / 10))
        return self

    def release(self) -> None:
        """Give the lock back, and take away the file and what directories are empty without it."""
        if self._descriptor is None:
            return
        self.path.unlink(missing_ok=True)  # while locked: no other process can hold this file
        os.close(self._descriptor)
        self._descriptor = None
        for directory in self._made:
            try:
                directory.rmdir()
            except OSError:  # it is in use by now
                break

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _make_directory(self) -> None:
        missing = [path for path in (self.run_dir, *self.run_dir.parents) if not path.exists()]
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"run_dir={self.run_dir}: exists and is not a directory") from None
        self._made = missing

    def _try(self) -> bool:
        """Lock the file that has the name now; false if another process holds it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(descriptor)
                    return False
                log.warning(
                    "%s: this file system has no locks (%s); do not start a second run here",
                    self.run_dir,
                    os.strerror(error.errno or 0),
                )
            if _same_file(descriptor, self.path):
                break
            os.close(descriptor)  # its owner took it away between our opening and locking it
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_myself(os.environ)).encode())
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(own()))
        return True

    def _holder(self) -> dict[str, str | int]:
        """What the holder wrote about itself; empty if it has not come to that yet."""
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError):
            return {}


def _forget(lock: RunLock | None) -> None:
    """In a fork: close its copy, which would outlive the run."""
    if lock is not None and lock._descriptor is not None:
        os.close(lock._descriptor)
        lock._descriptor = None


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        now = os.stat(path)
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (opened.st_dev, opened.st_ino) == (now.st_dev, now.st_ino)


def _myself(environment: Mapping[str, str]) -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": environment.get("SLURM_JOB_ID", ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _is_earlier_life(holder: Mapping[str, str | int], environment: Mapping[str, str]) -> bool:
    """Whether the holder is this Slurm job before it was requeued."""
    requeued = int(environment.get("SLURM_RESTART_COUNT") or 0) > 0
    job = environment.get("SLURM_JOB_ID")
    return requeued and bool(job) and holder.get("slurm_job") == job


def _refusal(run_dir: Path, holder: Mapping[str, str | int]) -> str:
    """One line: the holder, and the way out."""
    who = "another run"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if holder.get("slurm_job"):
            who += f" (Slurm job {holder['slurm_job']})"
        who += f" since {holder.get('since')}"
    return f"run_dir={run_dir}: in use by {who}; wait until it has ended, or choose another run_dir"
