"""The checks of sizes with which training, planning and benches start. No torch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from elastic.config import (
    BudgetConfig,
    ConfigError,
    ImportanceConfig,
    ParentShape,
    SpaceConfig,
    StageConfig,
)
from elastic.members.architecture import Architecture, Space
from elastic.members.goals import Target
from elastic.members.targets import (
    check_reachable,
    given_members,
    stand_in_drop_order,
    targets_of,
)
from elastic.routing.curriculum import check_budgets
from elastic.storage.foreign import read_object


class Sizes(NamedTuple):
    """What the settings say of sizes, worked out for one parent."""

    space: Space
    targets: dict[str, Target]
    """By budget, largest first."""
    drop_order: tuple[int, ...]
    """One under which every target is reached; it stands in until the layers are ranked."""
    given: dict[str, Architecture]
    """The family that settings give, largest first; empty where the router decides."""


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
        ConfigError: a choice, a target, a member or a stage that does not fit the parent; one line.
    """
    built = Space.build(space, shape)
    budgets = with_members_read(budgets)
    targets = targets_of(budgets, shape)
    check_budgets(stages, targets, in_place)
    given = given_members(budgets, shape, space)
    if given:
        whole = Architecture.full(shape)
        family = {name: given.get(name, whole) for name in targets}
        return Sizes(built, targets, stand_in_drop_order(built, importance), family)
    order = check_reachable(built, targets, importance, space.tolerance, space.nested)
    return Sizes(built, targets, order, {})


def with_members_read(budgets: Mapping[str, BudgetConfig]) -> dict[str, BudgetConfig]:
    """The same budgets, members as objects: a file holds the entry alone, or as `architecture`, as
    the provenance.json of an export does.

    Raises:
        ConfigError: a file that cannot be read.
    """
    found = {}
    for name, budget in budgets.items():
        value = budget.architecture
        if isinstance(value, str):
            try:
                read = read_object(Path(value).expanduser())
            except (ValueError, OSError) as error:
                raise ConfigError(f"budgets.{name}.architecture={value}: {error}") from error
            value = read.get("architecture", read)
            if not isinstance(value, dict):
                raise ConfigError(
                    f"budgets.{name}.architecture={value}: must hold an object with hidden_size "
                    "and layers"
                )
        found[name] = replace(budget, architecture=value)
    return found
