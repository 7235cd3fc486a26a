"""The most probable family, and what is reachable, against brute force over every combination.

The brute force lists all selections of a small space with their exact sizes, filters them, and
maximises the total log-probability; nesting is checked on the architectures themselves.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from helpers.goals import in_params
from helpers.spaces import FULL, SHAPE, everything, selection, space_of
from helpers.strategies import NANO_12B

from elastic.config import AXES, ConfigError, SpaceConfig
from elastic.members.architecture import Architecture, Selection, Space
from elastic.members.cost import parameters
from elastic.members.search import Choice, Search

DROP = (1, 3)
"""Layers to drop, least important first."""


Logs = dict[str, dict[str, np.ndarray]]


def homogeneous_space(seed: int) -> Space:
    """Random choices, up to three per axis."""
    rng = np.random.default_rng(seed)

    def some(full: int, unit: int = 1) -> list[int]:
        smaller = rng.choice(
            np.arange(1, full // unit), size=min(2, full // unit - 1), replace=False
        )
        return [full, *sorted((int(value) * unit for value in smaller), reverse=True)]

    return space_of(
        hidden=some(16), ffn=some(32), mamba_heads=some(6, 2), mamba_head_dim=some(7)[:2],
        attention_heads=some(6, 2)[:2], depth=[5, 4, 3],
    )  # fmt: skip


def random_logs(space: Space, names: Sequence[str], seed: int) -> Logs:
    """A random distribution per budget, axis and decision."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            axis: np.log(rng.dirichlet(np.ones(len(choices)), size=space.decisions(axis)))
            for axis, choices in space.choices.items()
            if len(choices) > 1
        }
        for name in names
    }


def score(logs: Mapping[str, np.ndarray], selection: Selection) -> float:
    """Total log-probability of a selection."""
    return sum(
        float(logs[axis][position, index])
        for axis in logs
        for position, index in enumerate(selection[axis])
    )


def allowed(members: list[Choice], target: int, tolerance: float, full: int) -> list[Choice]:
    """Members that meet a target; only the parent itself meets its own size."""
    if target == full:
        return [member for member in members if not any(map(any, member.selection.values()))]
    return [member for member in members if abs(member.params - target) <= tolerance * target]


def brute_force(
    members: list[Choice], targets: Mapping[str, int], logs: Logs, tolerance: float, nested: bool
) -> float | None:
    """Highest total log-probability of a family; None when there is no family."""
    full = max(member.params for member in members)
    scored = [
        [(score(logs[name], m.selection), m) for m in allowed(members, target, tolerance, full)]
        for name, target in targets.items()
    ]
    best: float | None = None
    for family in itertools.product(*scored):
        total = sum(part for part, _ in family)
        if best is not None and total <= best:
            continue
        pairs = itertools.pairwise(member.architecture for _, member in family)
        if not nested or all(inner.is_within(outer) for outer, inner in pairs):
            best = total
    return best


def total(logs: Logs, family: Mapping[str, Choice]) -> float:
    return sum(score(logs[name], choice.selection) for name, choice in family.items())


def assert_family(
    space: Space, targets: Mapping[str, int], family: Mapping[str, Choice], nested: bool
) -> None:
    """What every family must be, however it was found."""
    assert list(family) == list(targets)
    whole = Architecture.full(SHAPE)
    for name, choice in family.items():
        choice.architecture.check(SHAPE)
        assert choice.params == parameters(SHAPE, choice.architecture)
        assert choice.architecture == space.architecture(choice.selection, DROP)
        assert abs(choice.params - targets[name]) <= 0.03 * targets[name]
        if targets[name] == parameters(SHAPE, whole):
            assert choice.architecture == whole
    if nested:
        for outer, inner in itertools.pairwise(family.values()):
            assert inner.architecture.is_within(outer.architecture)


def some_targets(members: list[Choice], seed: int) -> dict[str, int]:
    """The parent, and two sizes near some member's."""
    rng = np.random.default_rng(seed)
    sizes = sorted({member.params for member in members})
    half = len(sizes) // 2
    return {
        "full": sizes[-1],
        "medium": round(int(rng.choice(sizes[half:-1])) * rng.uniform(0.98, 1.02)),
        "small": round(int(rng.choice(sizes[:half])) * rng.uniform(0.98, 1.02)),
    }


# Homogeneous


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "free"])
@pytest.mark.parametrize("seed", range(8))
def test_a_homogeneous_family_is_the_most_probable_one(seed: int, nested: bool) -> None:
    space = homogeneous_space(seed)
    members = everything(space, DROP)
    targets = some_targets(members, seed)
    logs = random_logs(space, list(targets), seed)
    expected = brute_force(members, targets, logs, 0.03, nested)
    search = Search(space, DROP, 0.03)
    if expected is None:
        with pytest.raises(ConfigError):
            search.family(in_params(SHAPE, targets), logs, nested)
        return
    family = search.family(in_params(SHAPE, targets), logs, nested)
    assert_family(space, targets, family, nested)
    assert total(logs, family) == pytest.approx(expected, abs=1e-9)


def test_the_brute_force_sees_reachable_and_unreachable_and_what_nesting_costs() -> None:
    """Guards the guard: the cases above cover all three."""
    found, costs = [], 0
    for seed in range(8):
        space = homogeneous_space(seed)
        members = everything(space, DROP)
        targets = some_targets(members, seed)
        logs = random_logs(space, list(targets), seed)
        nested, free = (brute_force(members, targets, logs, 0.03, n) for n in (True, False))
        found.append(nested is not None)
        costs += nested is not None and free is not None and nested < free - 1e-6
    assert any(found) and costs > 0


def test_nesting_gives_up_the_best_small_member_for_the_best_pair() -> None:
    """The medium budget wants a narrow MLP, the small one a wide MLP: they must agree."""
    space = space_of(hidden=[16, 12, 8], ffn=[32, 20, 8])
    members = everything(space, DROP)
    sizes = {m.architecture: m.params for m in members}
    targets = {"full": max(sizes.values()), "medium": 6500, "small": 5000}
    logs = random_logs(space, list(targets), 0)
    for name, likes in (("medium", 2), ("small", 0)):
        logs[name]["ffn"] = np.log(np.array([[0.01, 0.01, 0.01]]))
        logs[name]["ffn"][0, likes] = np.log(0.98)
    search = Search(space, DROP, 0.2)
    free = search.family(in_params(SHAPE, targets), logs, False)
    nested = search.family(in_params(SHAPE, targets), logs, True)
    assert not free["small"].architecture.is_within(free["medium"].architecture)
    assert nested["small"].architecture.is_within(nested["medium"].architecture)
    assert total(logs, nested) == pytest.approx(brute_force(members, targets, logs, 0.2, True))


def test_a_choice_is_not_the_bare_argmax() -> None:
    """The most probable choice of every axis would be the parent, far above the target."""
    space = space_of(hidden=[16, 12, 8], ffn=[32, 20, 8])
    logs = {"small": {axis: np.log([[0.9, 0.06, 0.04]]) for axis in ("hidden", "ffn")}}
    target = parameters(SHAPE, space.architecture(selection(space, hidden=1, ffn=1), DROP))
    choice = Search(space, DROP, 0.01).family(in_params(SHAPE, {"small": target}), logs, True)[
        "small"
    ]
    assert choice.params == target and choice.architecture.hidden_size == 12


def test_an_axis_without_probabilities_counts_as_flat() -> None:
    space = space_of(hidden=[16, 12], ffn=[32, 20])
    target = parameters(SHAPE, space.architecture(selection(space, hidden=1, ffn=1), DROP))
    family = Search(space, DROP, 0.01).family(
        in_params(SHAPE, {"small": target}), {"small": {}}, True
    )
    assert family["small"].params == target


@pytest.mark.parametrize("heterogeneous", [[], ["ffn", "mamba_heads"]])
def test_the_full_budget_is_the_parent_however_improbable(heterogeneous: list[str]) -> None:
    space = space_of(heterogeneous, hidden=[16, 15], ffn=[32, 31], mamba_heads=[6, 4], depth=[5, 4])
    full = parameters(SHAPE, Architecture.full(SHAPE))
    logs = {"full": {}, "small": {}}  # type: Logs
    for axis in ("hidden", "ffn", "mamba_heads", "depth"):
        never = np.tile(np.log([[1e-9, 1 - 1e-9]]), (space.decisions(axis), 1))
        logs["full"][axis] = logs["small"][axis] = never
    family = Search(space, DROP, 0.2).family(
        in_params(SHAPE, {"full": full, "small": full - 1}), logs, True
    )
    assert family["full"].architecture == Architecture.full(SHAPE)
    assert family["full"].params == full
    assert family["small"].architecture != Architecture.full(SHAPE)


# Heterogeneous

LAYERED = {
    "ffn": space_of(["ffn"], hidden=[16, 12], ffn=[32, 20, 12], depth=[5, 4]),
    "ffn and attention": space_of(
        ["ffn", "attention_heads"],
        hidden=[16, 11], ffn=[32, 21, 12], attention_heads=[6, 4, 2], depth=[5, 4],
    ),
    "ffn, mamba and attention": space_of(
        ["ffn", "mamba_heads", "attention_heads"],
        ffn=[32, 20, 12], mamba_heads=[6, 4, 2], attention_heads=[6, 2], depth=[5, 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("seed", range(6))
def test_a_single_budget_gets_the_most_probable_layers(name: str, seed: int) -> None:
    """Dropped layers included: their choices count in the total as well."""
    space = LAYERED[name]
    members = everything(space, DROP)
    targets = some_targets(members, seed)
    search = Search(space, DROP, 0.03)
    logs = random_logs(space, list(targets), seed)
    for budget in ("medium", "small"):
        alone = {budget: targets[budget]}
        expected = brute_force(members, alone, logs, 0.03, True)
        assert expected is not None
        family = search.family(in_params(SHAPE, alone), logs, True)
        assert_family(space, alone, family, True)
        assert total(logs, family) == pytest.approx(expected, abs=1e-9)


def test_the_layers_can_outweigh_the_other_axes() -> None:
    """The likeliest hidden size needs unlikely layers, the next one worse ones, the last the best:
    the search may not stop at either."""
    space = space_of(["ffn"], hidden=[16, 15, 13], ffn=[32, 20, 12])
    logs = random_logs(space, ["small"], 0)
    logs["small"]["hidden"] = np.log([[0.5, 0.3, 0.2]])
    logs["small"]["ffn"] = np.tile(np.log([[0.9, 0.01, 0.09]]), (2, 1))
    target, members = 7637, everything(space, DROP)
    widths = {m.architecture.hidden_size for m in allowed(members, target, 0.022, FULL)}
    assert widths == {16, 15, 13}
    choice = Search(space, DROP, 0.022).family(in_params(SHAPE, {"small": target}), logs, True)[
        "small"
    ]
    assert choice.selection["hidden"] == (2,) and choice.selection["ffn"] == (0, 0)
    expected = brute_force(members, {"small": target}, logs, 0.022, True)
    assert score(logs["small"], choice.selection) == pytest.approx(expected)


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("seed", range(6))
def test_a_heterogeneous_family_is_nested_on_every_layer(name: str, seed: int) -> None:
    """In tolerance, nested, and without nesting the best of every budget."""
    space = LAYERED[name]
    members = everything(space, DROP)
    targets = some_targets(members, seed)
    logs = random_logs(space, list(targets), seed)
    search = Search(space, DROP, 0.03)
    free = search.family(in_params(SHAPE, targets), logs, False)
    assert_family(space, targets, free, False)
    separate = sum(
        brute_force(members, {n: t}, logs, 0.03, True) or 0.0 for n, t in targets.items()
    )
    assert total(logs, free) == pytest.approx(separate, abs=1e-9)
    try:
        nested = search.family(in_params(SHAPE, targets), logs, True)
    except ConfigError:
        assert brute_force(members, targets, logs, 0.03, True) is None
        return
    assert_family(space, targets, nested, True)
    for outer, inner in itertools.pairwise(nested.values()):
        for axis in AXES:
            pairs = zip(inner.selection[axis], outer.selection[axis], strict=True)
            assert all(small >= large for small, large in pairs)
    assert total(logs, nested) <= separate + 1e-9


def test_a_nested_family_that_exists_is_found_with_heterogeneous_axes() -> None:
    axes = {"hidden": [16, 12], "ffn": [32, 20, 12], "mamba_heads": [6, 4, 2]}
    space = space_of(["ffn", "mamba_heads"], **axes)
    targets = {"full": 9044, "medium": 8020, "small": 5232}
    flat: Logs = {name: {} for name in targets}
    search = Search(space, DROP, 0.02)
    search.family(in_params(SHAPE, targets), flat, True)  # what a run checks before it starts
    for seed in range(200):
        search.family(in_params(SHAPE, targets), random_logs(space, list(targets), seed), True)


# What cannot be reached


def closest(sizes: Sequence[int], target: int) -> str:
    """As the message should put it."""
    below = max((size for size in sizes if size <= target), default=None)
    above = min((size for size in sizes if size >= target), default=None)
    return " and ".join(f"{size:,}" for size in (below, above) if size is not None)


@pytest.mark.parametrize("name", ["homogeneous", *LAYERED])
def test_an_unreachable_target_names_the_closest_sizes(name: str) -> None:
    space = homogeneous_space(1) if name == "homogeneous" else LAYERED[name]
    sizes = sorted({member.params for member in everything(space, DROP)})
    gaps = sorted(zip(sizes, sizes[1:], strict=False), key=lambda pair: pair[0] - pair[1])
    targets = [sizes[0] // 2, *((low + high) // 2 for low, high in gaps[:4])]
    for target in targets:
        with pytest.raises(ConfigError) as error:
            Search(space, DROP, 1e-6).family(
                in_params(SHAPE, {"small": target}), {"small": {}}, True
            )
        assert str(error.value) == (
            f"budgets.small: no combination of space is within 0.0% of {target:,} parameters; "
            f"the closest reachable are {closest(sizes, target)}"
        )


def test_a_budget_that_only_fails_inside_the_larger_one_says_so() -> None:
    """Each target has one member: wide and shallow, narrow and deep."""
    space = space_of(hidden=[16, 8], ffn=[32, 8])
    members = everything(space, DROP)
    sizes = {(m.selection["hidden"][0], m.selection["ffn"][0]): m.params for m in members}
    narrow, thin = sizes[1, 0], sizes[0, 1]
    targets = {"medium": max(narrow, thin), "small": min(narrow, thin)}
    search = Search(space, DROP, 0.01)
    flat: Logs = {name: {} for name in targets}
    search.family(in_params(SHAPE, targets), flat, False)
    with pytest.raises(ConfigError, match=r"^budgets\.small: .*, nested$") as error:
        search.family(in_params(SHAPE, targets), flat, True)
    outer = next(m for m in members if m.params == targets["medium"])
    inside = [m.params for m in members if m.architecture.is_within(outer.architecture)]
    assert f"reachable are {closest(inside, targets['small'])}, nested" in str(error.value)


# Speed


@pytest.mark.parametrize("adverse", [False, True], ids=["random", "adverse"])
def test_the_12b_family_is_decided_in_seconds(
    adverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,020 combinations per budget, each a millisecond; adverse: the larger budget first wants
    what leaves no room."""
    config = SpaceConfig(
        hidden=[5120, 4480, 4096, 3584],
        ffn=[20_480, 17_920, 15_360, 12_288, 10_240],
        mamba_heads=[128, 112, 96],
        depth=list(range(62, 45, -1)),
    )
    space = Space.build(config, NANO_12B)
    droppable = [index for index, kind in enumerate(NANO_12B.kinds) if kind != "attention"]
    order = tuple(droppable[20:36])
    targets = {"12b": 12_310_001_152, "9b": 8_888_227_328, "6b": 6_200_000_000}
    logs = random_logs(space, list(targets), 0)
    if adverse:
        for axis in ("ffn", "mamba_heads", "depth"):
            middle = np.full(len(space.choices[axis]), -8.0)
            logs["9b"][axis], logs["6b"][axis] = middle.copy()[None], middle.copy()[None]
            logs["9b"][axis][0, -1] = logs["6b"][axis][0, 0] = 0.0
    search = Search(space, order, 0.01)
    fill, calls = search._fill_layers, itertools.count()
    monkeypatch.setattr(search, "_fill_layers", lambda *a: (next(calls), fill(*a))[1])
    family = search.family(in_params(NANO_12B, targets), logs, True)
    assert next(calls) < 5_000, "combinations that were looked at"
    assert family["12b"].architecture == Architecture.full(NANO_12B)
    for outer, inner in itertools.pairwise(family.values()):
        assert inner.architecture.is_within(outer.architecture)
