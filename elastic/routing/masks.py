"""Distributions over choices -> keep masks. Pure functions of tensors, batch first, 1.0 keeps.

With prefix masks the expectation over choices is a staircase: unit i stays with the probability
that the kept prefix is longer than i (arXiv 2511.16664, section 3.2, soft masks).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from elastic.config import ParentShape
from elastic.members.architecture import (
    WIDTH_AXIS,
    Architecture,
    MambaLayer,
    MLPLayer,
    Space,
    extents,
)
from elastic.parent import Keep, LayerKeep

Distributions = Mapping[str, Tensor]
"""axis -> probabilities (b, decisions, choices); axes that are left alone are absent."""


def constant(build: Callable[..., Tensor], arguments: tuple, like: Tensor) -> Tensor:
    """build(*arguments) with the type and device of `like`, made once.

    A table that is made anew in every step is copied to the device in every step, and such a copy
    waits until the device has done all its work.
    """
    return _constant(build, arguments, like.dtype, like.device)


@lru_cache(maxsize=1024)
def _constant(
    build: Callable[..., Tensor], arguments: tuple, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return build(*arguments).to(device, dtype)


def prefix_masks(kept: Sequence[int], size: int, groups: int = 1) -> Tensor:
    """One row per choice: within each of `groups` equal groups the first kept / groups stay.

    (c,) sizes -> (c, size) of 0.0 or 1.0. For Mamba and attention heads the groups matter: every
    SSM or KV group keeps the same number of its own heads (arXiv 2504.11409).
    """
    position = torch.arange(size) % (size // groups)
    per_group = torch.tensor([value // groups for value in kept])
    return (position < per_group[:, None]).float()


def layer_gates(probabilities: Tensor, space: Space, drop_order: Sequence[int]) -> Tensor:
    """Probability that each layer is kept: (b, 1, c) over `depth` choices -> (b, l).

    The layer at position i of the drop order survives when at most i layers are dropped.
    """
    arguments = tuple(space.choices["depth"]), len(space.shape.pattern), tuple(drop_order)
    return probabilities[:, 0] @ constant(_kept_layers, arguments, probabilities)


def _kept_layers(depths: Sequence[int], total: int, drop_order: Sequence[int]) -> Tensor:
    """(c, l): 1.0 where a layer is kept at a depth."""
    rank = {layer: position for position, layer in enumerate(drop_order)}
    return torch.tensor(
        [
            [float(total - kept <= rank.get(layer, total)) for layer in range(total)]
            for kept in depths
        ]
    )


def soft_keep(space: Space, drop_order: Sequence[int], distributions: Distributions) -> Keep:
    """Expected masks under independent choices per axis; differentiable in the probabilities.

    One-hot distributions give the hard masks of the member they select.
    """
    shape = space.shape
    masks: dict[str, Tensor] = {}  # axis -> (b, decisions, size)
    for axis, (size, groups) in extents(shape).items():
        if axis in distributions and axis != "depth":
            probabilities = distributions[axis]
            arguments = tuple(space.choices[axis]), size, groups
            masks[axis] = probabilities @ constant(prefix_masks, arguments, probabilities)
    gates = None
    if "depth" in distributions:
        gates = layer_gates(distributions["depth"], space, drop_order)

    def mask_of(axis: str, layer: int) -> Tensor | None:
        if axis not in masks:
            return None
        position = space.layers_of(axis).index(layer) if axis in space.heterogeneous else 0
        return masks[axis][:, position]

    layers = tuple(
        LayerKeep(
            gate=None if gates is None else gates[:, index],
            width=mask_of(WIDTH_AXIS[kind], index),
            channels=mask_of("mamba_head_dim", index) if kind == "mamba" else None,
        )
        for index, kind in enumerate(shape.kinds)
    )
    return Keep(masks["hidden"][:, 0] if "hidden" in masks else None, layers)


def hard_keep(
    shape: ParentShape, architecture: Architecture, device: torch.device | str = "cpu"
) -> Keep:
    """Masks under which the whole parent computes exactly that member; (1, size) each."""
    kept = {layer.index: layer for layer in architecture.layers}
    layers = []
    for index in range(len(shape.pattern)):
        layer = kept.get(index)
        if layer is None:
            layers.append(LayerKeep(gate=torch.zeros(1, device=device)))
            continue
        channels = share = None
        if isinstance(layer, MLPLayer):
            width = prefix_masks([layer.intermediate_size], shape.intermediate_size)
        elif isinstance(layer, MambaLayer):
            width = prefix_masks([layer.num_heads], shape.mamba_num_heads, shape.n_groups)
            channels = prefix_masks([layer.head_dim], shape.mamba_head_dim).to(device)
            share = (
                layer.num_heads * layer.head_dim / (shape.mamba_num_heads * shape.mamba_head_dim)
            )
        else:
            groups = shape.num_key_value_heads
            width = prefix_masks([layer.num_heads], shape.num_attention_heads, groups)
        gate = torch.ones(1, device=device)
        layers.append(LayerKeep(gate, width.to(device), channels, share))
    hidden = prefix_masks([architecture.hidden_size], shape.hidden_size)
    return Keep(hidden.to(device), tuple(layers))
