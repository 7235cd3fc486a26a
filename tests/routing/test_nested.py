"""A router over whole families: each of them is listed, drawn, and found to be the better one."""

import itertools
import json
import math

import pytest
import torch
from helpers.goals import in_params
from helpers.routers import generator, members
from helpers.strategies import tiny_shape

from elastic.config import ConfigError, ObjectiveConfig, OptimConfig, RouterConfig, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.families import Families, nested_families
from elastic.members.search import Search
from elastic.parent import Keep
from elastic.routing.family import Family
from elastic.routing.nested import FamilyRouter
from elastic.routing.router import RouterOptimizer

SHAPE = tiny_shape(pattern="M-*M-", hidden_size=16, intermediate_size=32)
FULL = parameters(SHAPE, Architecture.full(SHAPE))
COUNTS = {"full": FULL, "medium": round(0.75 * FULL), "small": round(0.5 * FULL)}
TARGETS = in_params(SHAPE, COUNTS)
AXES: dict[str, list[int]] = {
    "hidden": [16, 15, 14, 13, 12, 11, 10, 9, 8],
    "ffn": [32, 28, 24, 20, 16],
    "mamba_heads": [6, 4, 2],
    "depth": [5, 4],
}


def families_of(nested: bool = True, layered: tuple[str, ...] = ()) -> tuple[Search, Families]:
    config = SpaceConfig(heterogeneous=list(layered), **AXES)
    search = Search(Space.build(config, SHAPE), (1,), 0.02)
    return search, nested_families(search, TARGETS, nested)


def family_of(seed: int = 0, layered: tuple[str, ...] = (), **fields: float) -> Family:
    search, families = families_of(layered=layered)
    config = RouterConfig(kind="members", **({"freeze_at": 0.5} | fields))  # type: ignore[arg-type]
    router = FamilyRouter(families, config, generator(seed))
    space = SpaceConfig(heterogeneous=list(layered), tolerance=0.02, **AXES)
    return Family(search.space, (1,), TARGETS, router, config, space, ObjectiveConfig())


@pytest.mark.parametrize("nested", [True, False])
def test_every_family_that_meets_the_budgets_is_listed_once(nested: bool) -> None:
    search, families = families_of(nested)
    every = []
    for name, target in COUNTS.items():
        ranges = [range(len(choices)) for choices in search.space.choices.values()]
        choices = (
            search.choice({a: (i,) for a, i in zip(search.space.choices, taken, strict=True)})
            for taken in itertools.product(*ranges)
        )
        limit = 0.0 if name == "full" else 0.02
        every.append({c.architecture for c in choices if abs(c.params / target - 1) <= limit})
    expected = {
        taken
        for taken in itertools.product(*every)
        if not nested or all(b.is_within(a) for a, b in itertools.pairwise(taken))
    }
    found = [tuple(choice.architecture for choice in family.values()) for family in families]
    assert set(found) == expected and len(found) == len(expected) > 20


def test_too_many_families_are_counted_and_refused() -> None:
    config = SpaceConfig(heterogeneous=["ffn", "mamba_heads"], **AXES)
    search = Search(Space.build(config, SHAPE), (1,), 0.2)
    with pytest.raises(ConfigError, match=r"^router\.kind=members: [0-9,]+ families meet the") as e:
        nested_families(search, TARGETS, True)
    assert "\n" not in str(e.value) and "at most 4,096" in str(e.value)


@pytest.mark.parametrize("layered", [(), ("ffn",)], ids=["once", "layered"])
def test_a_hard_draw_is_a_member_of_a_family_that_meets_the_budgets(
    layered: tuple[str, ...],
) -> None:
    """Masks of that very member, and nothing to pay for its size."""
    family = family_of(layered=layered, hard_probability=1.0)
    assert isinstance(family.router, FamilyRouter)
    seen = set()
    for seed in range(20):
        draw = family.draw("small", 0.1, seed)
        assert draw.terms == {} and isinstance(draw.member, Keep)
        members_of_it = {
            listed["small"].architecture
            for listed in family.router.families
            if _of_member(listed["small"].architecture) == _of_masks(draw.member)
        }
        assert len(members_of_it) == 1
        seen |= members_of_it
    assert len(seen) > 3
    assert family.draw("full", 0.1, 0).member is None


WIDTHS = {"mamba": "num_heads", "mlp": "intermediate_size", "attention": "num_heads"}


def _of_member(member: Architecture) -> list[float]:
    """Hidden size, then the width of every layer, 0 where it is dropped."""
    kept = {layer.index: float(getattr(layer, WIDTHS[layer.kind])) for layer in member.layers}
    return [float(member.hidden_size), *(kept.get(i, 0.0) for i in range(len(SHAPE.kinds)))]


def _of_masks(keep: Keep) -> list[float]:
    """The same, counted in masks of zeros and ones."""
    assert keep.hidden is not None
    whole = _of_member(Architecture.full(SHAPE))
    found = [float(keep.hidden.detach().sum())]
    for layer, full in zip(keep.layers, whole[1:], strict=True):
        width = full if layer.width is None else float(layer.width.detach().sum())
        found.append(width * (1.0 if layer.gate is None else float(layer.gate.detach())))
    return [float(round(value)) for value in found]


def test_the_router_finds_the_family_that_is_better() -> None:
    """A loss that falls with the number of kept channels and rises with the MLPs' width."""
    family = family_of(seed=1, hard_probability=0.0)
    assert isinstance(family.router, FamilyRouter)
    optimizer = RouterOptimizer(family.router, OptimConfig())

    def width(entry: dict) -> float:
        return sum(choice.architecture.hidden_size for choice in entry.values())

    before = family.choices(0.0)
    for step in range(150):
        for name in ("medium", "small"):
            keep = family.draw(name, step / 300, 2 * step + (name == "small")).member
            assert isinstance(keep, Keep) and keep.hidden is not None
            (-keep.hidden.mean() * 5).backward()
        assert optimizer.step(3e-3)
        family.stepped(True)
    found = family.choices(0.49)
    widest = max(map(width, family.router.families))
    assert width(found) == widest > width(before) or width(before) == widest


def test_the_most_probable_families_are_the_candidates() -> None:
    family = family_of(candidates=8)
    assert isinstance(family.router, FamilyRouter)
    seen: dict[str, list] = {}

    def compare(candidates):  # noqa: ANN001, ANN202
        seen.update(candidates)
        return {name: [1.0 / (1 + i) for i in range(len(c))] for name, c in candidates.items()}

    probable = family.choices(0.5)
    assert family.freeze_if_due(0.5, compare)
    for name, choices in seen.items():
        assert choices[0].architecture == probable[name].architecture
        assert len({c.architecture for c in choices}) == len(choices) <= 8
    decision = family.decisions["small"]
    assert decision.router_choice == probable["small"].architecture
    assert -20 < decision.log_probability < 0
    other = family_of(seed=3)
    other.load_state(json.loads(json.dumps(family.state())))
    assert members(other) == members(family)


def test_it_settles_when_one_family_is_nearly_sure() -> None:
    family = family_of(settled_steps=2, freeze_at=1.0)
    assert not any(family.freeze_if_due(0.01) for _ in range(4))
    with torch.no_grad():
        family.router.network[-1].bias[3] = 50.0  # type: ignore[union-attr, index]
    assert [family.freeze_if_due(0.02) for _ in range(3)] == [False, False, True]
    assert isinstance(family.router, FamilyRouter)
    expected = family.router.families[3]
    assert members(family) == {name: choice.architecture for name, choice in expected.items()}


def test_entropy_and_size_are_of_the_distribution() -> None:
    family = family_of()
    figures = family.draw("small", 0.0, 0).figures
    assert 0.5 < float(figures["entropy"]) <= 1.0
    assert math.isclose(float(figures["expected_params"]), COUNTS["small"], rel_tol=0.02)
