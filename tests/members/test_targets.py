"""Targets and the start-up check: what is asked for, and whether any drop order can reach it."""

import itertools

import pytest
from helpers.goals import in_params
from helpers.spaces import FULL, SHAPE, selection, space_of
from helpers.strategies import NANO_12B, tiny_shape

from elastic.config import BudgetConfig, ConfigError, ImportanceConfig, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.goals import Target
from elastic.members.search import Search
from elastic.members.targets import (
    check_reachable,
    stand_in_drop_order,
    target_of,
    targets_of,
)

# Before the ranking is known


def importance(**fields: bool) -> ImportanceConfig:
    return ImportanceConfig(**fields)


SIDES = tiny_shape(pattern="M-M-M-M*", hidden_size=16, intermediate_size=40)
"""Layers 1 to 6 may be dropped: three MLPs and three Mamba layers of different sizes."""


@pytest.mark.parametrize(
    "order", [(1, 2, 3), (6, 5, 4), (1, 3, 5), (2, 4, 6)], ids=["front", "back", "mlp", "mamba"]
)
def test_what_some_drop_order_reaches_is_accepted(order: tuple[int, ...]) -> None:
    space = Space.build(SpaceConfig(depth=[8, 5]), SIDES)
    target = parameters(SIDES, Architecture.full(SIDES).without(set(order)))
    check_reachable(space, in_params(SIDES, {"small": target}), importance(), 1e-6, True)


def test_what_only_a_mixed_drop_order_reaches_is_accepted() -> None:
    """The real ranking may well drop four MLPs and two Mamba layers."""
    shape = tiny_shape(pattern="M-M-M-M-M-M-M-", hidden_size=16, intermediate_size=40)
    space = Space.build(SpaceConfig(depth=[14, 8]), shape)
    target = parameters(shape, Architecture.full(shape).without({1, 3, 5, 7, 2, 4}))
    Search(space, (1, 3, 5, 7, 2, 4), 0.01).family(
        in_params(shape, {"small": target}), {"small": {}}, True
    )
    check_reachable(space, in_params(shape, {"small": target}), importance(), 0.01, True)


def test_what_no_drop_order_reaches_is_refused() -> None:
    space = Space.build(SpaceConfig(depth=[8, 5]), SIDES)
    full = Architecture.full(SIDES)
    reached = {
        parameters(SIDES, full.without(set(layers)))
        for layers in itertools.combinations(range(1, 7), 3)
    }
    for target in (min(reached) - 100, max(reached) + 100):
        with pytest.raises(ConfigError, match="budgets.small: no combination"):
            check_reachable(space, in_params(SIDES, {"small": target}), importance(), 1e-6, True)


def test_dropping_more_than_may_be_dropped_is_refused_before_the_search() -> None:
    space = Space.build(SpaceConfig(depth=[8, 1]), SIDES)
    with pytest.raises(ConfigError, match="space.depth: drops up to 7 layers, but only 6"):
        check_reachable(space, in_params(SIDES, {"small": 5000}), importance(), 0.5, True)
    check_reachable(space, in_params(SIDES, {"small": 3000}), importance(drop_ends=True), 0.9, True)


def test_nesting_is_part_of_being_reachable() -> None:
    space = space_of(hidden=[16, 8], ffn=[32, 8])
    sizes = [
        parameters(SHAPE, space.architecture(selection(space, **taken), ()))
        for taken in ({"hidden": 1}, {"ffn": 1})
    ]
    targets = {"medium": max(sizes), "small": min(sizes)}
    check_reachable(space, in_params(SHAPE, targets), importance(), 0.01, False)
    with pytest.raises(ConfigError, match="nested$"):
        check_reachable(space, in_params(SHAPE, targets), importance(), 0.01, True)


# Targets


def budgets(**params: float) -> dict[str, BudgetConfig]:
    return {name: BudgetConfig(params=value) for name, value in params.items()}


def test_targets_are_sorted_largest_first() -> None:
    targets = targets_of(budgets(c=0.3, a=0.9, full=1.0, b=0.5), SHAPE)
    assert list(targets) == ["full", "a", "b", "c"]
    values = [target.values[0] for target in targets.values()]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("params", "target"),
    [(1.0, FULL), (1, FULL), (0.5, round(FULL / 2)), (1.5, 2), (5000, 5000), (FULL, FULL)],
)
def test_up_to_1_is_a_share_and_above_a_count(params: float, target: int) -> None:
    assert target_of("x", BudgetConfig(params=params), SHAPE) == Target.params(SHAPE, target)


def test_a_share_of_the_12b_parent_is_exact() -> None:
    assert target_of("x", BudgetConfig(params=1.0), NANO_12B).values[0] == 12_310_001_152
    assert target_of("x", BudgetConfig(params=0.5), NANO_12B).values[0] == 6_155_000_576


def test_a_target_above_the_parent_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        targets_of(budgets(small=0.5, huge=FULL + 1), SHAPE)
    assert str(error.value) == (
        f"budgets.huge.params={FULL + 1:g}: must be at most the parent's {FULL:,} parameters, "
        "and not round to 0"
    )


@pytest.mark.parametrize("other", [FULL, 1.0, 1 - 1e-9], ids=["count", "same", "rounds to it"])
def test_equal_targets_are_refused(other: float) -> None:
    with pytest.raises(ConfigError, match="budgets: targets must differ, one and two"):
        targets_of(budgets(one=1.0, two=other), SHAPE)


# The order that stands in


def test_kinds_are_dropped_in_turns_and_only_where_allowed() -> None:
    space = space_of(depth=[5, 4, 3])
    assert [SHAPE.kinds[layer] for layer in stand_in_drop_order(space, importance())] == [
        "mlp",
        "mamba",
    ]
    free = importance(drop_attention=True, drop_ends=True)
    assert sorted(
        SHAPE.kinds[layer] for layer in stand_in_drop_order(space_of(depth=[5, 2]), free)
    ) == [
        "attention",
        "mamba",
        "mlp",
    ]


def test_the_check_returns_an_order_that_reaches_the_targets() -> None:
    """Kinds in turns where that does, else another."""
    space = Space.build(SpaceConfig(depth=[8, 5]), SIDES)
    usual = stand_in_drop_order(space, importance())
    full = Architecture.full(SIDES)
    for dropped in (usual, (1, 3, 5), (2, 4, 6)):
        target = parameters(SIDES, full.without(set(dropped)))
        order = check_reachable(
            space, in_params(SIDES, {"small": target}), importance(), 1e-6, True
        )
        assert parameters(SIDES, full.without(set(order))) == target
        assert (order == usual) == (dropped == usual)
