"""Real processes for tests of what several of them do; each is a fork of one that has imported
Lightning already, so that a process costs milliseconds and not seconds."""

import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        return (self.directory / f"{rank}.err").read_text()

    def wait_until(self, line: str, *ranks: int) -> None:
        """Return once these processes, else all, have told a line."""
        deadline = time.monotonic() + 60
        while not all(line in self.told(rank) for rank in ranks or range(len(self.all))):
            assert time.monotonic() < deadline, [self.told(rank) for rank in range(len(self.all))]
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        pid = self.all[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self, *ranks: int, within: float = 60) -> list[int | None]:
        """Exit codes of these processes, else of all, once they have left."""
        deadline = time.monotonic() + within
        for rank in ranks or range(len(self.all)):
            self.all[rank].join(max(0, deadline - time.monotonic()))
        return [self.all[rank].exitcode for rank in ranks or range(len(self.all))]


@contextmanager
def processes(directory: Path, body: Body, count: int, *arguments: object) -> Iterator[Processes]:
    """Start `body(rank, count, tell, *arguments)` in `count` processes; none outlives the block."""
    started = Processes(directory, body, count, *arguments)
    try:
        yield started
    finally:
        for process in started.all:
            process.kill()
            process.join()


def _begin(
    body: Body, directory: Path, rank: int, count: int, port: int, *arguments: object
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    error = os.open(directory / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)

    def tell(line: str) -> None:
        with (directory / f"{rank}.log").open("a") as file:
            file.write(line + "\n")

    body(rank, count, tell, *arguments)
