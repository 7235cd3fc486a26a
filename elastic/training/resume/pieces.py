"""Weights and optimizer state as flat pieces, whatever the strategy keeps on which process.

A piece is a range of a weight's elements in storage order, with the same range of Adam's two
moments. Every strategy writes the pieces that it holds and reads those that it needs, so that a
checkpoint belongs to no strategy and to no number of processes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of Adam beside the number of steps."""


@dataclass(frozen=True)
class _Held:
    """A range of a weight that this process holds, and where."""

    name: str
    start: int
    """First element, of the flattened weight."""
    master: Tensor
    """(n,), what the optimizer steps: a view."""
    owner: Tensor
    """What the optimizer knows: the weight itself, or a flat group of many."""
    offset: int
    """First element, of the flattened owner."""


def _plain(model: nn.Module) -> Iterator[_Held]:
    for name, weight in model.named_parameters():
        yield _Held(name, 0, weight.detach().view(-1), weight, 0)


def _zero_1_2(model: nn.Module, optimizer: Any) -> Iterator[_Held]:
    """Optimizer state is partitioned: one flat range of each group per process."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    for weights, flat in zip(
        optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        for weight in weights:
            held = weight._hp_mapping
            if held is None:
                continue
            start, offset = held.lp_fragment_address.start, held.hp_fragment_address.start
            master = flat.detach().narrow(0, offset, held.lp_fragment_address.numel)
            yield _Held(names[id(weight)], start, master, flat, offset)


def _zero_3(model: nn.Module, optimizer: Any, rank: int) -> Iterator[_Held]:
    """Every weight is partitioned: one range of each per process, the last one padded."""
    weight: Any
    for name, weight in model.named_parameters():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(weight)]
        start = rank * size
        count = min(size, weight.ds_numel - start)
        if count > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield _Held(name, start, flat.detach().narrow(0, offset, count), flat, offset)


def _held(model: nn.Module, optimizer: Any, rank: int) -> tuple[list[_Held], Optimizer, bool]:
    """What this process holds, the optimizer that steps it, and whether all hold the same."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_zero_3(model, optimizer, rank)), optimizer.optimizer, False
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(_zero_1_2(model, optimizer)), optimizer.optimizer, False
    return list(_plain(model)), optimizer, True


def local_pieces(
    model: nn.Module, optimizer: Any, rank: int, world_size: int
) -> tuple[dict[str, Tensor], int]:
    """What this process writes: flat tensors by key, and how often the optimizer has stepped.

    Where all processes hold everything each writes its share. The tensors are views.
    """
    held, stepper, replicated = _held(model, optimizer, rank)
    pieces: dict[str, Tensor] = {}
    steps = 0
    for part in held:
        count = part.master.numel()
        first, last = 0, count
        if replicated:
            first, last = rank * count // world_size, (rank + 1) * count // world_size
        state = stepper.state.get(part.owner, {})
        steps = int(state.get("step", 0))
        if first == last:
            continue
        key = f"{part.name}:{part.start + first}"
        pieces[f"weight:{key}"] = part.master[first:last]
        if state:
            for moment in MOMENTS:
                flat = state[moment].view(-1)
                pieces[f"{moment}:{key}"] = flat[part.offset + first : part.offset + last]
    return pieces, steps


@torch.no_grad()
def load_state(model: nn.Module, optimizer: Any, pieces: "Pieces", steps: int, rank: int) -> None:
    """Set masters, moments and the number of steps, of whatever this process holds.

    The weights that the forward pass reads must have been loaded already (`Pieces.load_weights`).
    """
    held, stepper, _ = _held(model, optimizer, rank)
    for part in held:
        count = part.master.numel()
        part.master.copy_(pieces.read("weight", part.name, part.start, count))
        if not steps:
            continue
        if not stepper.state.get(part.owner):
            fused = stepper.param_groups[0].get("fused")
            device = part.owner.device if fused else "cpu"
            state = {moment: torch.zeros_like(part.owner) for moment in MOMENTS}
            stepper.state[part.owner] = state | {"step": torch.zeros((), device=device)}
        state = stepper.state[part.owner]
        state["step"].fill_(steps)
        for moment in MOMENTS:
            flat = state[moment].view(-1)
            values = pieces.read(moment, part.name, part.start, count)
            flat[part.offset : part.offset + count].copy_(values)


class Pieces:
    """The pieces in a checkpoint's files, read as they are wanted.

    Raises:
        ValueError: a range is in no file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for path in files:
            view = safe_open(path, framework="pt")
            for key in view.keys():
                kind, name, start = key.split(":")
                part = view.get_slice(key)
                stop = int(start) + part.get_shape()[0]
                self._where.setdefault((kind, name), []).append((int(start), stop, part))
        for parts in self._where.values():
            parts.sort(key=lambda part: part[0])

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a weight or moment, flat."""
        found, position = [], start
        for first, stop, part in self._where.get((kind, name), []):
            if first <= position < stop and position < start + count:
                until = min(stop, start + count)
                found.append(part[position - first : until - first])
                position = until
        if position != start + count:
            raise ValueError(f"checkpoint: {kind} of {name} has no elements from {position} on")
        return found[0] if len(found) == 1 else torch.cat(found)

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a weight is stored."""
        return self.read("weight", name, 0, 1).dtype

    def weight(self, name: str, shape: Iterable[int]) -> Tensor:
        """One whole weight."""
        size = torch.Size(shape)
        return self.read("weight", name, 0, size.numel()).view(size)

    @torch.no_grad()
    def load_weights(self, model: nn.Module) -> None:
        """Fill a model that is not partitioned, one weight at a time."""
        for name, weight in model.named_parameters():
            weight.copy_(self.weight(name, weight.shape))
