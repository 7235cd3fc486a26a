"""Real processes for tests of what several of them do; each is a fork of one that has imported
Lightning already, so that a process costs milliseconds and not seconds."""

import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.waiting import LIMIT, until

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["elastic.cluster.signals", "elastic.cluster.watchdog", "pytest"])

Body = Callable[..., None]


class Processes:
    """Some processes of one body; what each tells is in `directory`."""

    def __init__(self, directory: Path, body: Body, count: int, *arguments: object) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.all = [
            SERVER.Process(target=_begin, args=(body, directory, rank, count, port, *arguments))
            for rank in range(count)
        ]
        for process in self.all:
            process.start()

    def told(self, rank: int) -> list[str]:
        """Lines of one process."""
        path = self.directory / f"{rank}.log"
        return path.read_text().splitlines() if path.exists() else []

    def errors(self, rank: int) -> str:
        """What one process wrote to stderr."""
        path = self.directory / f"{rank}.err"
        return path.read_text() if path.exists() else ""

    def wait_until(self, line: str, *ranks: int) -> None:
        """Return once these processes, else all, have told a line."""
        until(
            lambda: all(line in self.told(rank) for rank in ranks or range(len(self.all))),
            lambda: [(self.told(rank), self.errors(rank)) for rank in range(len(self.all))],
        )

    def allow(self, what: str) -> None:
        """Let the processes that wait in `allowed` go on."""
        (self.directory / f"{what}.allowed").touch()

    def send(self, rank: int, number: int) -> None:
        """A signal; returns when the kernel has handed it over."""
        pid = self.all[rank].pid
        assert pid is not None
        os.kill(pid, number)
        until(lambda: not _pending(pid, number))

    def freeze(self, pid: int | None) -> None:
        """SIGSTOP; returns when the process does nothing more."""
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state(pid) == "T")

    def codes(self, *ranks: int) -> list[int | None]:
        """Exit codes of these processes, else of all, once they have left."""
        for rank in ranks or range(len(self.all)):
            self.all[rank].join(LIMIT)
        return [self.all[rank].exitcode for rank in ranks or range(len(self.all))]


def state(pid: int) -> str:
    """What the kernel says of a process: T for a frozen one, Z or nothing for a dead one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_allowed(what: str) -> bool:
    """In one of the processes: whether `Processes.allow` has been called."""
    return (Path(os.environ["TOLD"]) / f"{what}.allowed").exists()


def wait_until_allowed(what: str) -> None:
    """In one of the processes: what is never allowed is waited for until somebody ends it."""
    until(lambda: is_allowed(what))


@contextmanager
def processes(directory: Path, body: Body, count: int, *arguments: object) -> Iterator[Processes]:
    """Start `body(rank, count, tell, *arguments)` in `count` processes; none outlives the block."""
    started = Processes(directory, body, count, *arguments)
    try:
        yield started
    finally:
        for rank, process in enumerate(started.all):
            process.kill()
            process.join()
            if error := started.errors(rank):  # shown where the test fails
                print(f"stderr of process {rank}:\n{error}")


def _begin(
    body: Body, directory: Path, rank: int, count: int, port: int, *arguments: object
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOLD": str(directory)}
    error = os.open(directory / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)

    def tell(line: str) -> None:
        with (directory / f"{rank}.log").open("a") as file:
            file.write(line + "\n")

    body(rank, count, tell, *arguments)


def _pending(pid: int, number: int) -> bool:
    """Whether a process has not received a signal yet that was sent to it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    waiting = re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    return waiting is not None and bool(int(waiting[1], 16) & 1 << number - 1)
