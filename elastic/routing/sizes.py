"""The checks of sizes with which training, planning and benches start. No torch."""

from collections.abc import Mapping
from typing import NamedTuple

from elastic.config import BudgetConfig, ImportanceConfig, ParentShape, SpaceConfig, StageConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.targets import check_reachable, targets_of
from elastic.routing.curriculum import check_budgets


class Sizes(NamedTuple):
    """What the settings say of sizes, worked out for one parent."""

    space: Space
    targets: dict[str, int]
    """Parameters by budget, largest first."""
    drop_order: tuple[int, ...]
    """One under which every target is reached; it stands in until the layers are ranked."""


def check_sizes(
    shape: ParentShape,
    space: SpaceConfig,
    budgets: Mapping[str, BudgetConfig],
    importance: ImportanceConfig,
    stages: Mapping[str, StageConfig],
    in_place: bool = False,
) -> Sizes:
    """Work out the space and the targets; every budget must be reachable and every stage able to
    draw.

    Raises:
        ConfigError: a choice, a target or a stage that does not fit the parent; one line.
    """
    built = Space.build(space, shape)
    targets = targets_of(budgets, shape)
    check_budgets(stages, targets, parameters(shape, Architecture.full(shape)), in_place)
    order = check_reachable(built, targets, importance, space.tolerance, space.nested)
    return Sizes(built, targets, order)
