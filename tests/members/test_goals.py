"""What budgets ask for: every unit counted in two ways, several units at once, and their order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from helpers.spaces import FULL, SHAPE, everything, selection, space_of
from helpers.strategies import NANO_12B, architectures, shapes
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import UNITS, WEIGHT_BYTES, BudgetConfig, ConfigError, SpaceConfig
from elastic.members import cost
from elastic.members.architecture import Architecture
from elastic.members.balanced import balanced_family
from elastic.members.goals import Goal, Measure, Target
from elastic.members.search import Choice, Search
from elastic.members.targets import given_members, smaller_budgets, targets_of

DROP = (1, 3)
WHOLE = Architecture.full(SHAPE)


@given(st.data())
def test_a_measure_is_what_the_closed_forms_of_cost_say(data: st.DataObject) -> None:
    """And these are held against the tensors of real models, their caches and a FLOP counter."""
    shape = data.draw(shapes())
    member = data.draw(architectures(shape))
    context, batch = data.draw(st.integers(1, 10**5)), data.draw(st.integers(1, 64))
    params = cost.parameters(shape, member)
    cache = cost.kv_cache_bytes(shape, member, context, batch)
    cache += cost.ssm_state_bytes(shape, member, batch)
    cache += cost.conv_state_bytes(shape, member, batch)
    expected = {
        "params": params,
        "active_params": params,
        "weight_bytes": 4 * params,
        "cache_bytes": cache,
        "flops": cost.flops_per_token(shape, member, context),
    }
    assert list(expected) == list(UNITS)
    for unit, value in expected.items():
        measure = Measure(unit, "float32", context, batch)
        assert measure.exact(shape, member) == value
        assert f"{value:,} " in measure.text(value)


def test_bytes_of_the_12b_are_those_that_are_published() -> None:
    """24.6 GB of weights; a cache of 3 GiB of keys and values and 147 MiB of states."""
    full = Architecture.full(NANO_12B)
    assert Measure("weight_bytes").exact(NANO_12B, full) == 2 * 12_310_001_152
    assert WEIGHT_BYTES["bfloat16"] == 2
    cache = Measure("cache_bytes", context=131_072).exact(NANO_12B, full)
    assert 3 * 2**30 + 140 * 2**20 < cache < 3 * 2**30 + 150 * 2**20


# The search


def goal(unit: str, value: int, **more: int) -> Goal:
    measure = Measure(unit, **more)  # type: ignore[arg-type]
    return Goal(measure, value, measure.exact(SHAPE, WHOLE))


SPACES = {
    "alike": space_of(
        hidden=[16, 14, 12, 10], ffn=[32, 24, 16], mamba_heads=[6, 4, 2],
        attention_heads=[6, 4], depth=[5, 4],
    ),
    "by layer": space_of(
        ["ffn", "mamba_heads"], hidden=[16, 13], ffn=[32, 24, 16], mamba_heads=[6, 4, 2],
        depth=[5, 4],
    ),
}  # fmt: skip

ASKED: dict[str, dict[str, dict[str, int]]] = {
    "flops": {"flops": {"context": 40}},
    "cache": {"cache_bytes": {"context": 10, "batch": 2}},
    "parameters and cache": {"params": {}, "cache_bytes": {"context": 10}},
    "all": {
        "params": {},
        "active_params": {},
        "weight_bytes": {},
        "cache_bytes": {"context": 10},
        "flops": {"context": 40},
    },
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("seed", range(3))
def test_the_most_probable_member_meets_all_goals(name: str, asked: str, seed: int) -> None:
    """Against every member of the space, each unit counted by `Measure.exact`."""
    space, tolerance = SPACES[name], 0.04
    rng = np.random.default_rng(seed)
    members = everything(space, DROP)
    wanted = members[rng.integers(1, len(members))].architecture
    goals = [
        goal(unit, Measure(unit, **more).exact(SHAPE, wanted), **more)  # type: ignore[arg-type]
        for unit, more in ASKED[asked].items()
    ]
    target = Target(SHAPE, tuple(goals))
    logs = {
        axis: np.log(rng.dirichlet(np.ones(len(choices)), size=space.decisions(axis)))
        for axis, choices in space.choices.items()
    }

    def score(choice: Choice) -> float:
        picked = choice.selection.items()
        return sum(
            logs[axis][i, index] for axis, indices in picked for i, index in enumerate(indices)
        )

    met = [m for m in members if abs(target.off_by(m.architecture)) <= tolerance]
    if not target.whole:
        search = Search(space, DROP, tolerance)
        found = search.family({"small": target}, {"small": logs}, True)["small"]
        assert abs(target.off_by(found.architecture)) <= tolerance
        assert score(found) == pytest.approx(max(map(score, met)))
        listed = {m.architecture for m in search.members(target, logs, 10**6)}
        assert listed <= {m.architecture for m in met}
        if name == "alike":
            assert listed == {m.architecture for m in met}


def test_goals_that_cannot_hold_together_name_the_nearest_member() -> None:
    """Each can be met alone: few parameters and the whole cache."""
    space = space_of(mamba_heads=[6, 4, 2], ffn=[32, 16])
    few = cost.parameters(SHAPE, space.architecture(selection(space, mamba_heads=2, ffn=1), ()))
    cache = goal("cache_bytes", Measure("cache_bytes", context=10).exact(SHAPE, WHOLE), context=10)
    target = Target(SHAPE, (goal("params", few), cache))
    search = Search(space, (), 0.01)
    with pytest.raises(ConfigError) as error:
        search.family({"small": target}, {"small": {}}, True)
    off = {m.architecture: abs(target.off_by(m.architecture)) for m in everything(space, DROP)}
    nearest = min(off, key=off.__getitem__)
    sizes = " with ".join(g.measure.text(g.measure.exact(SHAPE, nearest)) for g in target.goals)
    assert str(error.value) == (
        f"budgets.small: no combination of space is within 1.0% of {few:,} parameters and "
        f"{cache.value:,} bytes of cache at 10 tokens; the closest reachable has {sizes}"
    )


def test_a_balanced_family_meets_other_units_too() -> None:
    space = SPACES["alike"]
    asked = {"cache_bytes": 1152.0, "context": 10}, {"flops": 0.4, "context": 40}
    targets = targets_of(dict(zip("ab", (BudgetConfig(**a) for a in asked), strict=True)), SHAPE)
    family = balanced_family(space, DROP, targets, 0.05, True)
    for name, choice in family.items():
        assert abs(targets[name].off_by(choice.architecture)) <= 0.05


# Settings


def targets(**budgets: Mapping[str, Any]) -> dict[str, Target]:
    return targets_of({name: BudgetConfig(**asked) for name, asked in budgets.items()}, SHAPE)


def test_shares_and_counts_of_every_unit() -> None:
    for unit in UNITS:
        read = {"context": 9} if unit in ("cache_bytes", "flops") else {}
        (share, count) = targets(a={unit: 0.5, **read}, b={unit: 1200.0, **read}).values()
        if share.goals[0].value == 1200:
            share, count = count, share
        parent = share.goals[0].parent
        assert share.values == [round(parent / 2)] and count.values == [1200]
        assert not share.whole and targets(a={unit: 1.0, **read})["a"].whole


def test_the_largest_comes_first_in_whatever_units() -> None:
    cache = {"context": 10}
    found = targets(
        small={"params": 0.4},
        middle={"cache_bytes": 0.6, **cache},
        full={"params": 1.0},
        large={"params": 0.8, "cache_bytes": 0.7, **cache},
    )
    assert list(found) == ["full", "large", "middle", "small"]
    assert smaller_budgets(found) == ["large", "middle", "small"]
    half = {"weight_bytes": 0.5, "cache_bytes": 0.98, **cache}
    assert list(targets(half=half, more={"params": 0.75})) == ["more", "half"], "the tightest"


def test_budgets_that_contradict_each_other_are_refused() -> None:
    cache = {"context": 10}
    with pytest.raises(ConfigError) as error:
        targets(one={"params": 0.8, "cache_bytes": 0.4, **cache},
                two={"params": 0.6, "cache_bytes": 0.5, **cache})  # fmt: skip
    line = str(error.value)
    assert line.startswith("budgets.one and budgets.two: each must be the larger one in every unit")
    assert f"{round(0.8 * FULL):,} parameters and" in line and "\n" not in line


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({}, "budgets.x.params=None: must be set, or one of active_params, "),
        ({"flops": 0.5}, "budgets.x.context=None: must be set with flops"),
        ({"cache_bytes": 0.5, "flops": 1e6}, "budgets.x.context=None: must be set with cache"),
        ({"params": 0.5, "context": 8}, "budgets.x.context=8: must be null without budgets.x."),
        ({"flops": 0.5, "context": 8, "batch": 2}, "budgets.x.batch=2: must be null without"),
        ({"params": 0.5, "weight_dtype": "float32"}, "budgets.x.weight_dtype=float32: must be nu"),
        ({"weight_bytes": 0.5, "weight_dtype": "int8"}, "budgets.x.weight_dtype=int8: must be one"),
        ({"cache_bytes": -1.0, "context": 8}, "budgets.x.cache_bytes=-1.0: must be positive"),
        ({"cache_bytes": 0.5, "context": 0}, "budgets.x.context=0: must be at least 1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(asked: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        BudgetConfig(**asked).check("budgets.x")
    assert str(error.value).startswith(line)


def test_what_a_parent_does_not_have_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"^budgets\.a\.flops=1e\+12: must be at most the parent"):
        targets(a={"flops": 1e12, "context": 8})
    with pytest.raises(ConfigError, match=r"^budgets\.a\.params=1e-09: .* not round to 0$"):
        targets(a={"params": 1e-9})


def test_a_given_member_is_held_against_every_unit() -> None:
    member = WHOLE.without({1})
    cache = Measure("cache_bytes", context=10).exact(SHAPE, member)
    asked = {"architecture": member.to_json(), "cache_bytes": float(cache), "context": 10}
    given_members({"a": BudgetConfig(**asked)}, SHAPE, SpaceConfig())
    asked["cache_bytes"] = 0.5 * cache
    with pytest.raises(ConfigError, match=r"^budgets\.a\.architecture: has [\d,]+ bytes of cache"):
        given_members({"a": BudgetConfig(**asked)}, SHAPE, SpaceConfig())
