"""Which members a budget may become, and what each costs to store and to run."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic.config import AXES, ImportanceConfig, ParentShape
from elastic.members import cost
from elastic.members.architecture import Architecture, Space, droppable_layers
from elastic.members.cost import LayerSize, layer_parameters


@dataclass(frozen=True)
class Candidate:
    """A homogeneous member: its size on every axis."""

    sizes: tuple[int, ...]
    """In the order of `AXES`."""
    params: int
    unevenness: float
    """Variance over the elastic axes of the size as a share of the parent's."""

    def is_within(self, other: "Candidate") -> bool:
        return all(mine <= theirs for mine, theirs in zip(self.sizes, other.sizes, strict=True))


@dataclass(frozen=True)
class Reach:
    """What a budget can reach under the drop order that was assumed."""

    target: int
    candidates: tuple[Candidate, ...]
    """Every homogeneous member within tolerance, the most even first."""
    balanced: Candidate | None

    def range_of(self, axis: str) -> tuple[int, int]:
        """Smallest and largest size over all candidates."""
        values = [candidate.sizes[AXES.index(axis)] for candidate in self.candidates]
        return min(values), max(values)


def assumed_drop_order(space: Space, importance: ImportanceConfig) -> tuple[int, ...]:
    """Layers to drop before any ranking is known: the kinds in turns, from the front of each.

    Layers of one kind cost the same, so that only how many of each are dropped matters here.
    """
    layers = droppable_layers(
        space.shape, importance.drop_attention, importance.drop_ends, space.max_dropped
    )
    kinds = sorted({space.shape.kinds[layer] for layer in layers})
    parts = [[layer for layer in layers if space.shape.kinds[layer] == kind] for kind in kinds]
    turns = itertools.chain(*itertools.zip_longest(*parts))
    return tuple(layer for layer in turns if layer is not None)[: space.max_dropped]


def candidates(space: Space, drop_order: Sequence[int]) -> list[Candidate]:
    """Every homogeneous member of a space."""
    shape, total = space.shape, len(space.shape.pattern)
    elastic = [AXES.index(axis) for axis in space.elastic_axes]
    largest = [space.choices[axis][0] for axis in AXES]
    layers = [Counter(shape.kinds)]  # how many of each kind are kept when so many are dropped
    for layer in drop_order:
        layers.append(layers[-1] - Counter([shape.kinds[layer]]))
    found = []
    for sizes in itertools.product(*(space.choices[axis] for axis in AXES)):
        hidden, ffn, mamba_heads, channels, attention_heads, depth = sizes
        widths = {
            "mlp": LayerSize("mlp", ffn),
            "mamba": LayerSize("mamba", mamba_heads, channels),
            "attention": LayerSize("attention", attention_heads),
        }
        params = (2 * shape.vocab_size + 1) * hidden + sum(
            count * layer_parameters(shape, hidden, widths[kind])
            for kind, count in layers[total - depth].items()
        )
        shares = [sizes[position] / largest[position] for position in elastic] or [1.0]
        mean = sum(shares) / len(shares)
        variance = sum((share - mean) ** 2 for share in shares) / len(shares)
        found.append(Candidate(sizes, params, variance))
    return found


def reachable(
    space: Space,
    drop_order: Sequence[int],
    targets: dict[str, int],
    tolerance: float,
    nested: bool,
) -> dict[str, Reach]:
    """Members within tolerance of every budget, `targets` largest first, and the most even family.

    The family has the smallest sum of unevenness; nested, each member lies in the next larger one.
    The parent is the only member of its own size.
    """
    full = tuple(space.choices[axis][0] for axis in AXES)
    every = candidates(space, drop_order)
    parent = next(candidate for candidate in every if candidate.sizes == full)
    fitting: dict[str, list[Candidate]] = {}
    for name, target in targets.items():
        if target == parent.params:
            fitting[name] = [parent]
            continue
        met = [c for c in every if abs(c.params - target) <= tolerance * target]
        fitting[name] = sorted(met, key=lambda c: (c.unevenness, abs(c.params - target)))
    family = _most_even(list(fitting.values()), nested)
    return {
        name: Reach(targets[name], tuple(met), family[position] if family else None)
        for position, (name, met) in enumerate(fitting.items())
    }


def _most_even(choices: list[list[Candidate]], nested: bool) -> list[Candidate] | None:
    """One candidate per budget with the smallest sum of unevenness, by working upwards from the
    smallest budget; None where there is no family."""
    best: list[tuple[float, list[Candidate]]] = [(0.0, [])]
    for group in reversed(choices):
        grown = []
        for candidate in group:
            inner = [
                (score, family)
                for score, family in best
                if not (nested and family) or family[0].is_within(candidate)
            ]
            if inner:
                score, family = min(inner, key=lambda pair: pair[0])
                grown.append((score + candidate.unevenness, [candidate, *family]))
        best = grown
    return min(best, key=lambda pair: pair[0])[1] if best else None


def architecture_of(space: Space, drop_order: Sequence[int], candidate: Candidate) -> Architecture:
    """The member of a candidate, every layer of a kind alike."""
    selection = {
        axis: (space.choices[axis].index(size),) * space.decisions(axis)
        for axis, size in zip(AXES, candidate.sizes, strict=True)
    }
    return space.architecture(selection, tuple(drop_order))


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
