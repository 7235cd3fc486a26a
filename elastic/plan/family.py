"""Which members a budget may become, and what each costs to store and to run."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.config import AXES, ParentShape
from elastic.members import cost
from elastic.members.architecture import (
    AXIS_FIELD,
    AXIS_KIND,
    WIDTH_AXIS,
    Architecture,
    Space,
)
from elastic.members.cost import LayerSize
from elastic.members.goals import Target


@dataclass(frozen=True)
class Candidate:
    """A homogeneous member: its size on every axis."""

    sizes: tuple[int, ...]
    """In the order of `AXES`."""
    layers: tuple[LayerSize, ...]
    """One per kind, its gate the number of layers."""

    @property
    def hidden(self) -> int:
        return self.sizes[AXES.index("hidden")]


def candidates(space: Space, drop_order: Sequence[int]) -> list[Candidate]:
    """Every homogeneous member of a space."""
    shape, total = space.shape, len(space.shape.pattern)
    layers = [Counter(shape.kinds)]  # how many of each kind are kept when so many are dropped
    for layer in drop_order:
        layers.append(layers[-1] - Counter([shape.kinds[layer]]))
    found = []
    for sizes in itertools.product(*(space.choices[axis] for axis in AXES)):
        at = dict(zip(AXES, sizes, strict=True))
        channels = {"mamba": at["mamba_head_dim"]}
        alike = [
            LayerSize(kind, at[WIDTH_AXIS[kind]], channels.get(kind, 1), gate=count)
            for kind, count in layers[total - at["depth"]].items()
        ]
        found.append(Candidate(sizes, tuple(alike)))
    return found


def within_tolerance(
    space: Space, drop_order: Sequence[int], targets: Mapping[str, Target], tolerance: float
) -> dict[str, list[Candidate]]:
    """Every homogeneous member within tolerance of each budget, the nearest first.

    The parent is the only member of its own size.
    """
    full = tuple(space.choices[axis][0] for axis in AXES)
    every = candidates(space, drop_order)
    parent = next(candidate for candidate in every if candidate.sizes == full)
    found = {}
    for name, target in targets.items():
        legal = [parent] if target.whole else every
        off = {c: abs(target.off(c.hidden, c.layers)) for c in legal}
        found[name] = sorted((c for c in off if off[c] <= tolerance), key=off.__getitem__)
    return found


def ranges_of(space: Space, members: Sequence[Candidate]) -> dict[str, tuple[int, int]]:
    """Smallest and largest size on every elastic axis over some members."""
    spans = {}
    for axis in space.elastic_axes:
        values = [member.sizes[AXES.index(axis)] for member in members]
        spans[axis] = min(values), max(values)
    return spans


def sizes_of(space: Space, member: Architecture) -> dict[str, Any]:
    """axis -> smallest and largest size over the kept layers, and how many layers of each kind."""
    sizes: dict[str, Any] = {axis: (space.choices[axis][0],) * 2 for axis in AXES}
    sizes["hidden"] = (member.hidden_size,) * 2
    sizes["depth"] = (len(member.layers),) * 2
    for axis, kind in AXIS_KIND.items():
        values = [getattr(layer, AXIS_FIELD[axis]) for layer in member.layers if layer.kind == kind]
        if values:
            sizes[axis] = min(values), max(values)
    return sizes | {"layers": dict(Counter(layer.kind for layer in member.layers))}


def describe_member(
    shape: ParentShape, member: Architecture, contexts: Sequence[int], batch: int
) -> dict[str, Any]:
    """What a member costs, and its expected speed beside the parent's.

    Prefill and training go by FLOPs, decoding by the bytes that one step moves.
    """
    parent = Architecture.full(shape)
    params = cost.parameters(shape, member)
    entry: dict[str, Any] = {
        "parameters": params,
        "share": params / cost.parameters(shape, parent),
        "weight_bytes": cost.weight_bytes(shape, member),
        "ssm_state_bytes": cost.ssm_state_bytes(shape, member, batch),
        "conv_state_bytes": cost.conv_state_bytes(shape, member, batch),
        "contexts": {},
    }
    for context in contexts:
        flops, whole = (cost.flops_per_token(shape, a, context) for a in (member, parent))
        moved, all_moved = (cost.decode_bytes(shape, a, context, batch) for a in (member, parent))
        entry["contexts"][str(context)] = {
            "kv_cache_bytes": cost.kv_cache_bytes(shape, member, context, batch),
            "flops_per_token": flops,
            "prefill_speed": whole / flops,
            "decode_bytes": moved,
            "decode_speed": all_moved / moved,
        }
    return entry
