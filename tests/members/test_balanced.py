"""The most balanced family, against every combination of members within tolerance."""

from collections.abc import Sequence

import pytest
from helpers.goals import in_params
from helpers.spaces import SHAPE, everything, space_of
from helpers.strategies import NANO_12B

from elastic.config import ImportanceConfig, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.balanced import balanced_family, common_factor
from elastic.members.cost import parameters
from elastic.members.goals import Goal, Target
from elastic.members.search import Choice, Unreachable
from elastic.members.targets import stand_in_drop_order

AXES_OF = {
    "hidden": [16, 14, 12, 10, 8],
    "ffn": [32, 24, 16],
    "mamba_heads": [6, 4, 2],
    "depth": [5, 4],
}
SPACE = space_of(**AXES_OF)
ORDER = stand_in_drop_order(SPACE, ImportanceConfig())
FULL = parameters(SHAPE, Architecture.full(SHAPE))


def goal(count: int) -> Goal:
    return Target.params(SHAPE, count).goals[0]


def unbalance(space: Space, target: int, choice: Choice) -> float:
    """Squared distances from the common factor, over all axes and decisions."""
    factor = common_factor(space, goal(target))
    return sum(
        (space.choices[axis][index] / space.choices[axis][0] - factor) ** 2
        for axis, indices in choice.selection.items()
        for index in indices
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shares", [(1.0, 0.75, 0.5), (0.8, 0.6), (0.8, 0.5), (0.72,), (0.9, 0.55)])
def test_no_family_within_tolerance_is_more_balanced(shares: Sequence[float], nested: bool) -> None:
    targets = {f"{share:g}": round(share * FULL) for share in shares}
    groups = [
        [c for c in everything(SPACE, ORDER) if abs(c.params - target) <= 0.05 * target]
        if target != FULL
        else everything(SPACE, ORDER)[:1]
        for target in targets.values()
    ]
    names = list(targets)

    def best(position: int, outer: Choice | None) -> float:
        if position == len(groups):
            return 0.0
        sums = [
            unbalance(SPACE, targets[names[position]], c) + best(position + 1, c)
            for c in groups[position]
            if not nested or outer is None or c.architecture.is_within(outer.architecture)
        ]
        return min(sums, default=float("inf"))

    chosen = balanced_family(SPACE, ORDER, in_params(SHAPE, targets), 0.05, nested)
    assert list(chosen) == names
    found = sum(unbalance(SPACE, targets[name], choice) for name, choice in chosen.items())
    assert found == pytest.approx(best(0, None))
    family = list(chosen.values())
    for outer, inner in zip(family, family[1:], strict=False):
        assert not nested or inner.architecture.is_within(outer.architecture)


def test_an_unreachable_target_is_named() -> None:
    with pytest.raises(Unreachable, match=r"budgets\.tiny"):
        balanced_family(SPACE, ORDER, in_params(SHAPE, {"tiny": 10}), 0.01, True)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.3])
def test_the_common_factor_meets_the_target_on_the_elastic_axes_alone(share: float) -> None:
    """Hidden size alone: a member of that size has as many parameters."""
    space = space_of(hidden=list(range(16, 0, -1)))
    factor = common_factor(space, goal(round(share * FULL)))
    below, above = (
        parameters(SHAPE, Architecture(hidden, Architecture.full(SHAPE).layers))
        for hidden in (int(16 * factor - 1e-9), min(16, int(16 * factor) + 1))
    )
    assert below <= share * FULL * (1 + 1e-9) and share * FULL <= above * (1 + 1e-9)


def test_what_no_size_reaches_has_the_smallest_factor() -> None:
    assert common_factor(space_of(ffn=[32, 16]), goal(1)) == pytest.approx(0, abs=1e-9)


def test_a_family_of_the_12b_shrinks_on_every_elastic_axis() -> None:
    """Layer by layer too, where the search must not give up."""
    config = SpaceConfig(
        hidden=[5120, 4480, 4096, 3584],
        ffn=[20_480, 17_920, 15_360, 12_288, 10_240],
        mamba_heads=[128, 112, 96],
        depth=list(range(62, 45, -1)),
        heterogeneous=["ffn", "mamba_heads"],
    )
    space = Space.build(config, NANO_12B)
    targets = {"12b": 12_310_001_152, "9b": 9_000_000_000, "6b": 6_000_000_000}
    order = stand_in_drop_order(space, ImportanceConfig())
    small = balanced_family(space, order, in_params(NANO_12B, targets), 0.01, True)["6b"]
    assert abs(small.params - targets["6b"]) <= 0.01 * targets["6b"]
    full = Architecture.full(NANO_12B)
    assert small.architecture.hidden_size < full.hidden_size
    assert len(small.architecture.layers) < len(full.layers)
