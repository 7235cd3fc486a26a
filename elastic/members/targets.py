"""What budgets ask for, and whether a space can reach it before any layer ranking is known. No
torch."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cmp_to_key

from elastic.config import BudgetConfig, ConfigError, ImportanceConfig, ParentShape, SpaceConfig
from elastic.members.architecture import Architecture, Space, droppable_layers
from elastic.members.cost import parameters
from elastic.members.goals import Goal, Measure, Target
from elastic.members.search import LogProbabilities, Search, Unreachable


def target_of(name: str, budget: BudgetConfig, shape: ParentShape) -> Target:
    """What a budget asks for; the parameters of its member where only that is given.

    Raises:
        ConfigError: that member cannot be read, or is none of this parent; a value above the
            parent's.
    """
    if not budget.asked:
        return Target.params(shape, parameters(shape, _given(name, budget, shape)))
    goals, whole = [], Architecture.full(shape)
    for unit, asked in budget.asked.items():
        measure = Measure(
            unit, budget.weight_dtype or "bfloat16", budget.context or 0, budget.batch or 1
        )
        parent = measure.exact(shape, whole)
        value = round(asked * parent) if asked <= 1 else round(asked)
        if not 0 < value <= parent:
            raise ConfigError(
                f"budgets.{name}.{unit}={asked:g}: must be at most the parent's "
                f"{measure.text(parent)}, and not round to 0"
            )
        goals.append(Goal(measure, value, parent))
    return Target(shape, tuple(goals))


def _given(name: str, budget: BudgetConfig, shape: ParentShape) -> Architecture:
    """`budgets.NAME.architecture`, which is an entry of elastic.json by now."""
    assert isinstance(budget.architecture, dict), "files are read before: routing.sizes"
    try:
        member = Architecture.from_json(budget.architecture)
        member.check(shape)
    except ValueError as error:
        reason = str(error).removeprefix("architecture: ")
        raise ConfigError(f"budgets.{name}.architecture: {reason}") from error
    return member


def given_members(
    budgets: Mapping[str, BudgetConfig], shape: ParentShape, space: SpaceConfig
) -> dict[str, Architecture]:
    """Members that settings give, by budget, the largest first; empty where the router decides.

    Raises:
        ConfigError: some budgets below the parent are given and some are not; a member that is
            none of this parent, misses its budget, or is not nested in the next larger one.
    """
    targets = targets_of(budgets, shape)
    given = [name for name in targets if budgets[name].architecture is not None]
    left = [name for name in smaller_budgets(targets) if name not in given]
    if given and left:
        raise ConfigError(
            f"budgets.{left[0]}.architecture: must be given, as that of budgets.{given[0]} is: the "
            "router decides over all budgets below the parent, or over none"
        )
    found: dict[str, Architecture] = {}
    for name in given:
        key, member = f"budgets.{name}.architecture", _given(name, budgets[name], shape)
        for goal in targets[name].goals:
            size = goal.measure.exact(shape, member)
            if abs(size - goal.value) > space.tolerance * goal.value:
                unit = goal.measure.unit
                raise ConfigError(
                    f"{key}: has {goal.measure.text(size)}, not within {space.tolerance:.1%} of "
                    f"budgets.{name}.{unit}, {goal.value:,}; change either, or set {unit} to null"
                )
        outer = next(reversed(found), None)
        if space.nested and outer is not None and not member.is_within(found[outer]):
            raise ConfigError(
                f"{key}: must be within that of budgets.{outer} on every axis and layer, or set "
                "space.nested=false"
            )
        found[name] = member
    return found


def targets_of(budgets: Mapping[str, BudgetConfig], shape: ParentShape) -> dict[str, Target]:
    """Targets by name, largest first: by the units that two of them share, else by the smallest
    share of the parent's that each asks for.

    Raises:
        ConfigError: a target above the parent or given twice; two of which each is the larger one
            in some unit.
    """
    targets = {name: target_of(name, budget, shape) for name, budget in budgets.items()}
    for one, two in itertools.combinations(targets, 2):
        signs = _signs(targets[one], targets[two])
        if {-1, 1} <= signs:
            raise ConfigError(
                f"budgets.{one} and budgets.{two}: each must be the larger one in every unit that "
                f"both have; they ask for {targets[one]} against {targets[two]}"
            )
        if targets[one].goals == targets[two].goals:
            raise ConfigError(
                f"budgets: targets must differ, {one} and {two} both ask for {targets[one]}"
            )
    by_size = cmp_to_key(_order)
    return dict(sorted(targets.items(), key=lambda item: by_size(item[1])))


def _signs(one: Target, two: Target) -> set[int]:
    """Of the differences in every measure that both have: -1 where the first is the larger."""
    values = {goal.measure: goal.value for goal in two.goals}
    shared = [goal for goal in one.goals if goal.measure in values]
    return {_sign(values[goal.measure] - goal.value) for goal in shared}


def _order(one: Target, two: Target) -> int:
    signs = _signs(one, two) - {0}
    if signs:
        return min(signs)
    tightest = [min(goal.share for goal in target.goals) for target in (one, two)]
    return _sign(tightest[1] - tightest[0])


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def smaller_budgets(targets: Mapping[str, Target]) -> list[str]:
    """Budgets that have a choice; the whole parent has none."""
    return [name for name, target in targets.items() if not target.whole]


def check_reachable(
    space: Space,
    targets: Mapping[str, Target],
    importance: ImportanceConfig,
    tolerance: float,
    nested: bool,
) -> tuple[int, ...]:
    """Stop before any work if some target cannot be met, whatever the depth ranking turns out to
    be; returns a drop order with which all are, to stand in for the ranking.

    The ranking is not known yet, so that orders of every composition stand for it, the kinds in
    turns first. The real one is checked again as soon as it is there.

    Raises:
        Unreachable: no drop order meets all targets; the message names the closest sizes.
    """
    flat: dict[str, LogProbabilities] = {name: {} for name in targets}
    first: Unreachable | None = None
    for order in _drop_orders(space, importance):
        try:
            Search(space, order, tolerance).family(targets, flat, nested)
            return order
        except Unreachable as error:
            if first is None:
                first = error
            elif (error.name, error.nested) == (first.name, first.nested):
                first = first.together(error)
    assert first is not None
    raise first


def stand_in_drop_order(space: Space, importance: ImportanceConfig) -> tuple[int, ...]:
    """Layers to drop before any ranking is known: the kinds in turns, from the front of each.

    Raises:
        ConfigError: the space drops more layers than may be dropped.
    """
    return next(_drop_orders(space, importance))


def _drop_orders(space: Space, importance: ImportanceConfig) -> Iterator[tuple[int, ...]]:
    """Orders that differ in cost: the kinds in turns as far as they go, then every number of layers
    per kind, kind by kind or in turns.

    Layers of one kind cost the same, so that the first ones stand for all.
    """
    count, kind_of = space.max_dropped, space.shape.kinds
    layers = droppable_layers(space.shape, importance.drop_attention, importance.drop_ends, count)
    kinds = list(dict.fromkeys(kind_of[layer] for layer in layers))
    by_kind = [[layer for layer in layers if kind_of[layer] == kind] for kind in kinds]
    usual = _in_turns(by_kind)[:count]
    yield usual
    seen = {usual}
    for numbers in itertools.product(*(range(len(group) + 1) for group in by_kind)):
        if sum(numbers) != count:
            continue
        parts = [group[:number] for group, number in zip(by_kind, numbers, strict=True)]
        blocks = [tuple(itertools.chain(*order)) for order in itertools.permutations(parts)]
        for order in (*blocks, _in_turns(parts)):
            if order not in seen:
                seen.add(order)
                yield order


def _in_turns(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The first of each part, then the second of each, and so on."""
    turns = itertools.chain(*itertools.zip_longest(*parts))
    return tuple(layer for layer in turns if layer is not None)
