"""Rank and world size of this process, and small objects exchanged between ranks."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from torch import Tensor

from elastic.config import ConfigError, TrainerConfig


@dataclass(frozen=True)
class Place:
    """This process among all of a run."""

    rank: int = 0
    """Over all nodes; 0 writes."""
    local_rank: int = 0
    """On this node: the index of its device."""
    world_size: int = 1
    devices: int = 1
    """Processes per node."""

    @property
    def node(self) -> int:
        return self.rank // self.devices


ALONE = Place()
"""The only process of a run."""


def find_place(trainer: TrainerConfig) -> Place:
    """Read rank and world size from the launcher's environment.

    Raises:
        ConfigError: it has started another number of processes than the settings ask for.
    """
    if trainer.world_size == 1:
        return Place()
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "WORLD_SIZE" not in os.environ:
        keys = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    rank, local_rank, started = (
        int(os.environ.get(key, default)) for key, default in zip(keys, (0, 0, 1), strict=True)
    )
    if started != trainer.world_size:
        raise ConfigError(
            f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}: asks for "
            f"{trainer.world_size} processes, but {started} started ({keys[2]}); must be the same"
        )
    return Place(rank, local_rank, started, trainer.devices)


def from_first(value: Any) -> Any:
    """What rank 0 holds, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: object) -> list:
    """What every process holds, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def add_up(values: Tensor) -> None:
    """Put the sum over all processes in the place of a tensor, on every process.

    gloo and NCCL add in an order that follows from sizes and places, not from which process comes
    first.
    """
    if dist.is_initialized():
        dist.all_reduce(values)


def wait_for_all() -> None:
    """Return once every process has come here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_alone(place: Place) -> Iterator[None]:
    """Rank 0 passes the block before the others enter it; they leave where it fails.

    What rank 0 finds wrong it alone reports; what it writes the others can read.
    """
    if place.rank != 0:
        if not from_first(None):
            raise SystemExit(2)
        yield
        return
    done = False
    try:
        yield
        done = True
    finally:
        from_first(done)


def listen(port: int, visitors: int) -> socket.socket:
    """A port for other processes, on every address of this machine; 0 is any free one.

    Raises:
        OSError: it is taken.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=visitors, dualstack_ipv6=dual)


class PlaceEnvironment(ClusterEnvironment):
    """Tells Lightning what is known already, so that it neither guesses nor launches."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", 0))

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.place.world_size

    def set_world_size(self, size: int) -> None:
        assert size == self.place.world_size

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.place.rank

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.node


def find_device(trainer: TrainerConfig) -> torch.device:
    """Where a run computes.

    Raises:
        ConfigError: on a GPU that is not there.
    """
    wanted = trainer.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu: no GPU is visible; must be cpu or auto here")
    on_gpu = wanted != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")
