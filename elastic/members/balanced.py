"""The most balanced members: every elastic axis shrinks by about the same factor. No torch.

They stand for a family that no router has chosen yet, in plans and benches.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from elastic.members.architecture import WIDTH_AXIS, Space, extents
from elastic.members.cost import LayerSize
from elastic.members.goals import Goal, Target
from elastic.members.search import Choice, LogProbabilities, Search, Unreachable


def balanced_family(
    space: Space,
    drop_order: Sequence[int],
    targets: Mapping[str, Target],
    tolerance: float,
    nested: bool,
) -> dict[str, Choice]:
    """The family with the smallest sum, over members, axes and layers of heterogeneous axes, of
    (size / parent's size - common factor of the member)^2; `targets` largest first.

    Raises:
        Unreachable: no family meets the targets under this drop order.
    """
    search = Search(space, drop_order, tolerance)
    scores = {name: _scores(space, target) for name, target in targets.items()}
    try:
        return search.family(targets, scores, nested)
    except Unreachable:  # the search for the best gives up; one that takes any family may not
        flat: dict[str, LogProbabilities] = {name: {} for name in targets}
        return search.family(targets, flat, nested)


def _scores(space: Space, target: Target) -> dict[str, np.ndarray]:
    """axis -> (decisions, choices): the nearer to the common factor, the higher; at most 0.

    Of several goals the one that asks for the smallest factor sets it.
    """
    factor = min(common_factor(space, goal) for goal in target.goals)
    return {
        axis: np.tile(-np.square(np.array(sizes) / sizes[0] - factor), (space.decisions(axis), 1))
        for axis, sizes in space.choices.items()
    }


def common_factor(space: Space, goal: Goal) -> float:
    """By how much all elastic axes have to shrink for a member of that cost, were all sizes
    possible; 0 where even that is too large."""
    shape, elastic = space.shape, space.elastic_axes

    def size(factor: float) -> float:
        full = {
            axis: whole * (factor if axis in elastic else 1.0)
            for axis, (whole, _) in extents(shape).items()
        }
        gate = factor if "depth" in elastic else 1.0
        channels = {"mamba": full["mamba_head_dim"]}
        layers = [
            LayerSize(kind, full[WIDTH_AXIS[kind]], channels.get(kind, 1), gate)
            for kind in shape.kinds
        ]
        return float(goal.measure.of(shape, full["hidden"], layers))

    low, high = 0.0, 1.0
    for _ in range(50):
        factor = (low + high) / 2
        low, high = (factor, high) if size(factor) < goal.value else (low, factor)
    return high
