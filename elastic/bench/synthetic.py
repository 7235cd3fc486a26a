"""An elastic checkpoint of random weights of any size, written block by block."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic.bench.subjects import balanced_members, drop_order, key
from elastic.config import BudgetConfig, ParentShape, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cut import kept_shape, norm_cuts, tensor_shapes
from elastic.members.search import Choice
from elastic.members.targets import targets_of
from elastic.parent.stock import stock_config
from elastic.storage.files import atomic_directory, write_json
from elastic.storage.manifest import MEMBERS, Manifest, Member
from elastic.storage.progress import Progress
from elastic.storage.seals import Seals
from elastic.storage.writing import Pending, write_shards

WIDTHS = ("hidden_size", "vocab_size", "intermediate_size", "head_dim", "mamba_head_dim")
"""Sizes of a parent that scale; `ssm_state_size` does too. Numbers of heads, groups and layers
stay."""

FLOAT32 = ("A_log", "D")
"""Tensors that published checkpoints of bfloat16 keep in float32."""

BLOCK = 4 << 20
"""Values that are drawn at a time."""


def scaled_shape(shape: ParentShape, scale: float) -> ParentShape:
    """A parent with every width that many times as wide, at least 1."""
    names = (*WIDTHS, "ssm_state_size")
    sizes: dict[str, Any] = {name: _scaled(getattr(shape, name), scale) for name in names}
    return dataclasses.replace(shape, **sizes)


def scaled_space(space: SpaceConfig, scale: float) -> SpaceConfig:
    """The same choices of the widths that scale; choices that fall together are one."""
    axes: dict[str, Any] = {
        axis: sorted({_scaled(size, scale) for size in sizes}, reverse=True)
        for axis in ("hidden", "ffn", "mamba_head_dim")
        if (sizes := getattr(space, axis)) is not None
    }
    return dataclasses.replace(space, **axes)


def _scaled(size: int, scale: float) -> int:
    return max(1, round(size * scale))


def shares_of(budgets: Mapping[str, BudgetConfig], shape: ParentShape) -> dict[str, float]:
    """Budgets as shares of a parent's parameters, largest first."""
    return {name: target.goals[0].share for name, target in targets_of(budgets, shape).items()}


def family(
    space: SpaceConfig, shape: ParentShape, shares: Mapping[str, float]
) -> dict[str, Choice]:
    """For every share the member in which all axes shrink by about the same factor, nested.

    Raises:
        ConfigError: the space does not fit the parent, or reaches no member of such a size.
    """
    chosen = balanced_members(space, shape, list(shares.values()))
    return {name: chosen[key(share)] for name, share in shares.items()}


def write_checkpoint(
    directory: Path,
    shape: ParentShape,
    space: SpaceConfig,
    choices: Mapping[str, Choice],
    shard_bytes: int,
    seed: int,
) -> int:
    """Write config.json, random weights in bfloat16 and elastic.json; returns bytes of weights."""
    generator = torch.Generator().manual_seed(seed)
    pending = [
        Pending(name, size, dtype_of(name), partial(_draw, name, size, generator))
        for name, size in tensor_shapes(shape).items()
    ]
    total = sum(tensor.bytes for tensor in pending)
    built = Space.build(space, shape)
    members = {
        name: Member({"params": choice.params}, choice.params, choice.architecture)
        for name, choice in choices.items()
    }
    ranking = {"depth": list(drop_order(built))}
    provenance = {"parent": "random weights", "seed": seed}
    config = stock_config(shape) | {"torch_dtype": "bfloat16"}
    with atomic_directory(directory) as temporary:
        with Progress(total, "writing the checkpoint") as progress:
            sealed = write_shards(temporary, pending, shard_bytes, progress)
        write_json(temporary / "config.json", config)
        save_file(_own_norms(shape, members), temporary / MEMBERS)
        Manifest(members, built.to_json(), ranking, provenance).write(temporary)
        Seals.of(temporary, sealed).write()
    return total


def _own_norms(shape: ParentShape, members: Mapping[str, Member]) -> dict[str, Tensor]:
    """Norms of every smaller member's own, all ones."""
    sizes, whole = tensor_shapes(shape), Architecture.full(shape)
    return {
        f"{name}/{cut.source}": torch.ones(
            kept_shape(cut.cut, sizes[cut.source]), dtype=dtype_of(cut.source)
        )
        for name, member in members.items()
        if member.architecture != whole
        for cut in norm_cuts(shape, member.architecture)
    }


def bytes_of(shape: ParentShape) -> int:
    """Bytes of a parent's weights as they are written here."""
    return sum(
        math.prod(size) * dtype_of(name).itemsize for name, size in tensor_shapes(shape).items()
    )


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name.endswith(FLOAT32) else torch.bfloat16


def _draw(name: str, size: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    """Row blocks of a tensor, in the ranges of trained weights: norms and D near 1, decays of -1 to
    -16, step sizes of 0.001 to 0.1."""
    rows, row = size[0], math.prod(size[1:])
    at = 0
    while at < rows:
        count = min(rows - at, max(1, BLOCK // row))
        block = torch.empty((count, *size[1:]), dtype=dtype_of(name))
        if name.endswith("A_log"):
            block.uniform_(0.0, math.log(16.0), generator=generator)
        elif name.endswith("dt_bias"):
            block.uniform_(-6.9, -2.25, generator=generator)
        elif name.endswith(".D") or "norm" in name:
            block.normal_(1.0, 0.1, generator=generator)
        else:
            fan_in = row if len(size) > 1 else 16
            block.normal_(0.0, fan_in**-0.5, generator=generator)
        yield block
        at += count
