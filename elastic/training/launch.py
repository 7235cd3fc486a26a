"""Config -> the processes of a run."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from elastic.cluster.lock import RunLock
from elastic.cluster.place import find_device, find_place, first_alone
from elastic.cluster.rendezvous import joined
from elastic.cluster.signals import EXIT_CODES, AgreedExit, StopSignals
from elastic.cluster.start import check_started, launched
from elastic.cluster.watchdog import Watchdog
from elastic.config import RunConfig, parse
from elastic.console import clear_of_bars, keep_going, say
from elastic.training.module import TrainingDiverged
from elastic.training.resume import CheckpointFailed
from elastic.training.run import Run

log = logging.getLogger(__name__)


def launch(config: RunConfig) -> Path:
    """Run with as many processes as the settings ask for; returns the elastic checkpoint.

    srun and torchrun have started them already; on a single machine they are started here.

    Raises:
        ConfigError: several machines, and no launcher.
    """
    trainer = config.trainer
    check_started(trainer)
    if trainer.world_size == 1 or launched():
        return _run(config)
    with _others(config):
        return _run(config)


def _run(config: RunConfig) -> Path:
    """This process' part."""
    place = find_place(config.trainer)
    if place.rank != 0:  # its lines would be the same
        logging.getLogger("elastic").setLevel(logging.WARNING)
    patience = config.trainer.patience
    with (
        StopSignals() as signals,
        joined(place, find_device(config.trainer), run=config.run_dir),
        Watchdog(place, patience),
        signals.kept(),
        ExitStack() as held,
    ):
        with first_alone(place):
            if place.rank == 0:
                held.enter_context(RunLock(Path(config.run_dir)))
            run = Run(config, place, signals)
            run.begin()
        return run.execute()


@contextmanager
def _others(config: RunConfig) -> Iterator[None]:
    """The other processes of this machine, for as long as this one runs; rank 0 is this one."""
    world_size = config.trainer.devices
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}

    def numbered(rank: int) -> dict[str, str]:
        return {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}

    settings = json.dumps(asdict(config))
    children = []
    for rank in range(1, world_size):
        with _interrupts_held():
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD],
                env={**os.environ, **numbered(rank)},
                stdin=subprocess.PIPE,
                text=True,
            )
        assert child.stdin is not None
        child.stdin.write(settings)
        child.stdin.close()
        children.append(child)
    before = dict(os.environ)
    os.environ.update(numbered(0))
    ended = threading.Event()
    threading.Thread(target=_watch, args=(children, ended), daemon=True).start()
    try:
        yield
    except AgreedExit:
        raise
    except SystemExit as left:
        if left.code in INTERRUPTED:  # by `kill`, perhaps, of which the others do not know
            for child in children:
                child.send_signal(signal.SIGINT)
        raise
    finally:
        ended.set()
        for name in numbered(0):  # the next run of a sweep starts processes of its own
            os.environ.pop(name, None)
        os.environ.update(before)
        deadline = time.monotonic() + GRACE
        try:
            for child in children:
                child.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for child in children:
                child.kill()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """What is started here holds Ctrl-C back until it has imported: in the midst of its start an
    interpreter dies of it with exit code 1, as of a fault."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


CHILD = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
from elastic.training.launch import main
main()
"""
"""Another process of a run. Ctrl-C reaches all of a terminal: while this one imports, it exits
quietly."""

GRACE = 20.0
"""Seconds that the processes of a machine have to leave one after another."""

INTERRUPTED = (-signal.SIGINT, EXIT_CODES[signal.SIGINT])
"""Exit codes of a process that Ctrl-C has ended."""


def _watch(children: list[subprocess.Popen], ended: threading.Event) -> None:
    """Take this process down when another one of the machine has died.

    The watchdog is quicker and sees other machines too, once all processes have met. Ctrl-C reaches
    this process as well, but only when what it waits for has come.
    """
    while not ended.wait(0.5):
        for rank, child in enumerate(children, start=1):
            code = child.poll()
            if not code:
                continue
            interrupted = code in INTERRUPTED
            if ended.wait(GRACE if code > 0 and not interrupted else 1.0):
                return  # it was the first to leave, and we are leaving too
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            line = f"error: process {rank} of {len(children) + 1} died ({how}); stopping the others"
            if interrupted:
                line = "interrupted"
            say(f"{line}. The same command goes on from the last checkpoint", sys.stderr)
            for other in children:
                other.kill()
            os._exit(EXIT_CODES[signal.SIGINT] if interrupted else 1)


def main() -> None:
    """One of the processes that `launch` starts; its settings come on standard input."""
    keep_going()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    clear_of_bars(beside=True)
    try:
        _run(parse(json.load(sys.stdin), RunConfig))
    except (CheckpointFailed, TrainingDiverged):
        sys.exit(1)  # on all processes alike; rank 0 reports it
