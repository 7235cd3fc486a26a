"""Processes of a run find one another, whoever else uses their port. Real processes."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.cluster_processes import processes
from helpers.waiting import LIMIT, until

from elastic.cluster import rendezvous
from elastic.cluster.place import Place, from_all
from elastic.cluster.rendezvous import RendezvousError, joined, meet

Tell = Callable[[str], None]


@contextmanager
def taken(port: int = 0) -> Iterator[int]:
    """Somebody who listens at a port of this machine and says nothing."""
    with socket.create_server(("", port)) as server:
        yield server.getsockname()[1]


def two_runs(rank: int, count: int, tell: Tell, port: int) -> None:
    """The first half of the processes is one run, the second another, and all have one port."""
    os.environ["MASTER_PORT"] = str(port)
    rendezvous.ANSWER_SECONDS = 0.5  # the stranger's silence
    size = count // 2
    if rank == 1:
        time.sleep(0.5)  # both runs gather at once
    run, place = f"run {rank // size}", Place(rank % size, rank % size, size, size)
    with joined(place, torch.device("cpu"), run):
        tell(" ".join(from_all(f"{run}.{place.rank}")))


@pytest.mark.parametrize("silent", [False, True])
def test_two_runs_with_one_port_do_not_mix(tmp_path: Path, silent: bool) -> None:
    """Nor does a stranger at that port stop them."""
    with taken() as port:
        if not silent:
            port += 1
        with processes(tmp_path / "told", two_runs, 4, port) as started:
            assert started.codes() == [0] * 4, started.errors(0)
            assert [started.told(rank)[0] for rank in range(4)] == [
                *["run 0.0 run 0.1"] * 2,
                *["run 1.0 run 1.1"] * 2,
            ]
            if silent:
                assert f"port {port} is taken" in started.errors(0)


def in_turn(rank: int, count: int, tell: Tell, name: str) -> None:
    """Two lives of a requeued job; the second begins before the first has left."""
    place = Place(rank % 2, rank % 2, 2, 2)
    os.environ["SLURM_RESTART_COUNT"] = str(rank // 2)
    with joined(place, torch.device("cpu"), name):
        dist.barrier()
        tell(" ".join(map(str, from_all(rank))))


def test_a_requeued_job_does_not_meet_its_earlier_life(tmp_path: Path) -> None:
    with processes(tmp_path / "told", in_turn, 4, "run") as started:
        assert started.codes() == [0] * 4
        assert [started.told(rank) for rank in range(4)] == [["0 1"], ["0 1"], ["2 3"], ["2 3"]]


def absent(rank: int, count: int, tell: Tell, missing: int) -> None:
    """The patience of who waits for the missing one ends; that of others does not. It begins once
    all others are there."""
    if rank == missing:
        return
    roll = rendezvous._wait_for_ranks

    def late(store: dist.Store, world_size: int, patience: float) -> None:
        until(lambda: all(store.check([f"rank{r}"]) for r in range(1, count) if r != missing))
        roll(store, world_size, patience)

    rendezvous._wait_for_ranks = late
    try:
        patience = 2.0 if rank == 0 or missing == 0 else LIMIT
        meet(Place(rank, rank, count, count), "run", patience)
    except RendezvousError as error:
        tell(str(error))


def test_those_who_do_not_come_are_named(tmp_path: Path) -> None:
    with processes(tmp_path / "told", absent, 3, 2) as started:
        assert started.codes() == [0] * 3
        assert "1 of 3 processes have not come within 2 s (rank 2)" in started.told(0)[0]
        assert "rank 0 on 127.0.0.1 has left" in started.told(1)[0]
    with processes(tmp_path / "first", absent, 2, 0) as started:
        assert started.codes() == [0] * 2
        assert "rank 0 was not found" in started.told(1)[0]


def test_no_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PORTS", 1)
    with (
        taken() as port,
        pytest.raises(RendezvousError, match=f"MASTER_PORT={port}: all of the ports"),
    ):
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        meet(Place(0, 0, 2, 2), "run")
