"""What budgets ask for, and whether a space can reach it before any layer ranking is known. No
torch."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from elastic.config import BudgetConfig, ConfigError, ImportanceConfig, ParentShape, SpaceConfig
from elastic.members.architecture import Architecture, Space, droppable_layers
from elastic.members.cost import parameters
from elastic.members.search import LogProbabilities, Search, Unreachable


def target_params(name: str, budget: BudgetConfig, shape: ParentShape) -> int:
    """Parameters that a budget asks for; those of its member where only that is given.

    Raises:
        ConfigError: that member cannot be read, or is none of this parent.
    """
    if budget.params is None:
        return parameters(shape, _given(name, budget, shape))
    full = parameters(shape, Architecture.full(shape))
    return round(budget.params * full) if budget.params <= 1 else round(budget.params)


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
    left = [name for name in smaller_budgets(shape, targets) if name not in given]
    if given and left:
        raise ConfigError(
            f"budgets.{left[0]}.architecture: must be given, as that of budgets.{given[0]} is: the "
            "router decides over all budgets below the parent, or over none"
        )
    found: dict[str, Architecture] = {}
    for name in given:
        key, member = f"budgets.{name}.architecture", _given(name, budgets[name], shape)
        size, target = parameters(shape, member), targets[name]
        if abs(size - target) > space.tolerance * target:
            raise ConfigError(
                f"{key}: has {size:,} parameters, not within {space.tolerance:.1%} of "
                f"budgets.{name}.params, {target:,}; change either, or set params to null"
            )
        outer = next(reversed(found), None)
        if space.nested and outer is not None and not member.is_within(found[outer]):
            raise ConfigError(
                f"{key}: must be within that of budgets.{outer} on every axis and layer, or set "
                "space.nested=false"
            )
        found[name] = member
    return found


def targets_of(budgets: Mapping[str, BudgetConfig], shape: ParentShape) -> dict[str, int]:
    """Targets by name, largest first; `ConfigError` for one above the parent or given twice."""
    full = parameters(shape, Architecture.full(shape))
    targets = {name: target_params(name, budget, shape) for name, budget in budgets.items()}
    for name, target in targets.items():
        if target > full:
            raise ConfigError(
                f"budgets.{name}.params={budgets[name].params:g}: must be at most the parent's "
                f"{full:,}"
            )
    if len(set(targets.values())) < len(targets):
        raise ConfigError(f"budgets: targets must differ, got {targets}")
    return dict(sorted(targets.items(), key=lambda item: -item[1]))


def smaller_budgets(shape: ParentShape, targets: Mapping[str, int]) -> list[str]:
    """Budgets that have a choice; the whole parent has none."""
    full = parameters(shape, Architecture.full(shape))
    return [name for name, target in targets.items() if target < full]


def check_reachable(
    space: Space,
    targets: Mapping[str, int],
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
                below = max(first.closest[0], error.closest[0])
                above = min(filter(None, (first.closest[1], error.closest[1])), default=0)
                closest = (below, above)
                first = Unreachable(first.name, first.target, closest, tolerance, first.nested)
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
