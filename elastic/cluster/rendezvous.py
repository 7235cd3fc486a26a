"""Rendezvous of the processes of one run, kept apart from other runs.

A launcher computes MASTER_PORT from a job's number, so that it may be taken, even by another run:
torch's own rendezvous then joins the processes of two runs silently. So rank 0 listens at that
port or the next free one, and answers with the run's name and the port of its store; the others
connect until the answer is their own run's name.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from elastic.cluster.place import Place, listen

log = logging.getLogger(__name__)

PORTS = 16
"""Ports to try, from MASTER_PORT on."""

PATIENCE = 600.0
"""Seconds in which all processes must have come. Their starts may lie minutes apart where hundreds
of them import from one file server."""

ANSWER_SECONDS = 5.0
"""Seconds that a listener has to answer with its name."""

TIMEOUT = timedelta(hours=1)
"""Of a collective. Long, since rank 0 may write for minutes while the others wait; that a process
has died is the watchdog's to see."""

SLURM_LIFE = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
"""A requeued job has the number, the port and the run directory of its first life."""


class RendezvousError(OSError):
    """Processes of the run are missing. The message is one line."""


@contextmanager
def joined(place: Place, device: torch.device, run: str) -> Iterator[None]:
    """The process group of a run, for as long as it lasts; nothing for a single process.

    Args:
        place: this process among all of the run.
        device: what it computes on: NCCL for GPUs, else gloo.
        run: a name that all processes of the run know and no other run has.

    Raises:
        RendezvousError: see `meet`.
    """
    if place.world_size == 1:
        yield
        return
    for key, value in (
        ("RANK", place.rank),
        ("LOCAL_RANK", place.local_rank),
        ("WORLD_SIZE", place.world_size),
    ):
        os.environ[key] = str(value)
    if device.type == "cuda":
        torch.cuda.set_device(place.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has a store of its own
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(
            backend,
            store=meet(place, run),
            rank=place.rank,
            world_size=place.world_size,
            timeout=TIMEOUT,
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


def meet(place: Place, run: str, patience: float = PATIENCE) -> dist.Store:
    """The store of this run, once all of its processes have come to it.

    Args:
        place: this process among all of the run.
        run: a name that all processes of the run know and no other run has.
        patience: seconds.

    Raises:
        RendezvousError: rank 0 or others have not come in time: names the address or the ranks.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name = "|".join([run, *(os.environ.get(key, "") for key in SLURM_LIFE)])
    if place.rank == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        with _listener(port, name, store.port):
            _wait_for_ranks(store, place.world_size, patience)
        return store
    store_port = _find_store(address, port, name, time.monotonic() + patience)
    try:
        store = dist.TCPStore(address, store_port, wait_for_workers=False)
        store.set(f"rank{place.rank}", "here")
        store.wait(["everyone"], timedelta(seconds=2 * patience))
    except RuntimeError:
        raise RendezvousError(
            f"rank {place.rank} of {place.world_size}: rank 0 on {address} has left while the "
            "processes gathered; its own message has the reason"
        ) from None
    return store


def _wait_for_ranks(store: dist.Store, world_size: int, patience: float) -> None:
    """Wait until every process has connected, and confirm."""
    keys = {rank: f"rank{rank}" for rank in range(1, world_size)}
    try:
        store.wait(list(keys.values()), timedelta(seconds=patience))
    except RuntimeError:
        missing = [str(rank) for rank, key in keys.items() if not store.check([key])]
        few = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise RendezvousError(
            f"{len(missing)} of {world_size} processes have not come within {patience:g} s "
            f"(rank {few}); see their logs"
        ) from None
    store.set("everyone", "here")


@contextmanager
def _listener(first: int, name: str, store_port: int) -> Iterator[None]:
    """Answer connections with the run's name and its store's port, while the block lasts."""
    listener = _listen(first)
    port = listener.getsockname()[1]
    if port != first:
        log.warning("port %d is taken; the processes of this run meet at port %d", first, port)
    message = json.dumps([name, store_port]).encode() + b"\n"

    def answer() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed
                return
            with client:
                try:
                    client.sendall(message)
                except OSError:  # gone already
                    pass

    thread = threading.Thread(target=answer, daemon=True, name="listener")
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        listener.close()
        thread.join()


def _listen(first: int) -> socket.socket:
    """The first free port of some, on every address of this machine."""
    for port in range(first, first + PORTS):
        try:
            return listen(port, 1024)
        except OSError:
            continue
    raise RendezvousError(
        f"MASTER_PORT={first}: all of the ports {first} to {first + PORTS - 1} are taken on "
        f"{socket.gethostname()}; set another MASTER_PORT"
    )


def _find_store(address: str, first: int, name: str, end: float) -> int:
    """The port of the store of the run; rank 0 may not be there yet."""
    while time.monotonic() < end:
        for port in range(first, first + PORTS):
            try:
                with (
                    socket.create_connection((address, port), ANSWER_SECONDS) as connection,
                    connection.makefile() as answer,
                ):
                    connection.settimeout(ANSWER_SECONDS)
                    found, store_port = json.loads(answer.readline(65536))
            except (OSError, TypeError, ValueError):  # no listener, or another program
                continue
            if found == name:
                return int(store_port)
        time.sleep(0.2)
    raise RendezvousError(
        f"rank 0 was not found within the time: no listener at {address}, ports {first} to "
        f"{first + PORTS - 1}, belongs to this run; see its log"
    )
