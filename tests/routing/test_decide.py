"""The decision at the freeze: the least loss among nested candidates, and the router's own wish."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from helpers.goals import in_params
from helpers.routers import members
from helpers.strategies import tiny_shape
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ObjectiveConfig, RouterConfig, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.search import Choice
from elastic.routing.decide import Candidate, Candidates, Decision, least_loss
from elastic.routing.family import Family
from elastic.routing.router import Router

SHAPE = tiny_shape(
    pattern="M-M-*-M-", hidden_size=128, intermediate_size=512, mamba_num_heads=8, mamba_head_dim=32
)
AXES = SpaceConfig(
    hidden=[128, 120, 112, 104, 96, 88, 80],
    ffn=[512, 448, 384, 320, 256],
    mamba_heads=[8, 6, 4],
    depth=[8, 7],
    tolerance=0.01,
    nested=True,
)
FULL = parameters(SHAPE, Architecture.full(SHAPE))
COUNTS = {"full": FULL, "medium": round(0.75 * FULL), "small": round(0.5 * FULL)}
TARGETS = in_params(SHAPE, COUNTS)


def family(candidates: int = 8, nested: bool = True) -> Family:
    space = Space.build(AXES, SHAPE)
    config = RouterConfig(candidates=candidates, freeze_at=0.5)
    router = Router(space, len(TARGETS) - 1, config, torch.Generator().manual_seed(0))
    settings = SpaceConfig(**{**vars(AXES), "nested": nested})
    return Family(space, (3,), TARGETS, router, config, settings, ObjectiveConfig())


def within_tolerance(one: Family, target: int) -> set[Architecture]:
    """Every member of the space that meets a target, by enumeration."""
    ranges = [range(len(choices)) for choices in one.space.choices.values()]
    choices = (
        one.search.choice({a: (i,) for a, i in zip(one.space.choices, taken, strict=True)})
        for taken in itertools.product(*ranges)
    )
    limit = 0.0 if target == FULL else 0.01
    return {c.architecture for c in choices if abs(c.params / target - 1) <= limit}


def by_index(candidates: Candidates) -> dict[str, list[float]]:
    """The less probable, the better: no family is best for being proposed first."""
    return {name: [1.0 / (1 + i) for i in range(len(c))] for name, c in candidates.items()}


def test_candidates_meet_their_targets_and_the_best_nested_family_is_frozen() -> None:
    seen: dict[str, Sequence[Choice]] = {}

    def compare(candidates: Candidates) -> Mapping[str, Sequence[float]]:
        seen.update(candidates)
        return by_index(candidates)

    one = family()
    assert not one.freeze_if_due(0.4, compare) and not seen
    assert one.freeze_if_due(0.5, compare) and one.frozen is not None
    for name, choices in seen.items():  # no more than eight in this space: all there are
        assert {choice.architecture for choice in choices} == within_tolerance(one, COUNTS[name])
    losses = by_index(seen)
    legal = [
        sum(losses[name][index] for name, index in zip(seen, picks, strict=True))
        for picks in itertools.product(*(range(len(c)) for c in seen.values()))
        if all(
            seen[b][j].architecture.is_within(seen[a][i].architecture)
            for (a, i), (b, j) in itertools.pairwise(zip(seen, picks, strict=True))
        )
    ]
    picked = sum(
        losses[name][list(seen[name]).index(choice)] for name, choice in one.frozen.items()
    )
    assert math.isclose(picked, min(legal))
    for name, choices in seen.items():
        for choice in choices:
            assert abs(choice.params / COUNTS[name] - 1) <= 0.01
        assert len({choice.architecture for choice in choices}) == len(choices)


def test_how_it_was_decided_is_kept_and_survives_a_checkpoint() -> None:
    one, other = family(), family()
    one.freeze_if_due(1.0, by_index)
    assert one.frozen is not None and list(one.decisions) == ["medium", "small"]
    for name, decision in one.decisions.items():
        assert decision.router_params == parameters(SHAPE, decision.router_choice)
        chosen = one.frozen[name].architecture
        assert chosen in [candidate.architecture for candidate in decision.candidates]
        assert decision.log_probability < 0
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.decisions == one.decisions and members(other) == members(one)


def test_one_candidate_takes_the_most_probable_family_unmeasured() -> None:
    def compare(candidates: Candidates) -> Mapping[str, Sequence[float]]:
        raise AssertionError("nothing is to be compared")

    one = family(candidates=1)
    wanted = one.choices(0.5)
    one.freeze_if_due(0.5, compare)
    assert one.frozen == wanted
    assert all(decision.candidates == [] for decision in one.decisions.values())


def test_the_routers_own_choice_is_kept_beside_what_is_frozen() -> None:
    """The most probable choice of each axis, whatever its size: of an untrained router far off."""
    one = family()
    one.freeze_if_due(0.5, by_index)
    assert one.frozen is not None
    decision, probabilities = one.decisions["small"], one.router.log_probabilities(1, 10.0)
    sizes = {axis: one.space.choices[axis][int(v[0].argmax())] for axis, v in probabilities.items()}
    assert decision.router_choice.hidden_size == sizes["hidden"]
    assert len(decision.router_choice.layers) == sizes["depth"]
    assert decision.router_params > 1.5 * COUNTS["small"]
    picks = one.frozen["small"].selection
    expected = sum(float(v[0, picks[axis][0]]) for axis, v in probabilities.items())
    assert math.isclose(decision.log_probability, expected)


@given(st.lists(st.lists(st.floats(0.01, 5), min_size=3, max_size=3), min_size=3, max_size=3))
def test_without_nesting_each_budget_takes_its_own_best(values: list[list[float]]) -> None:
    members = [Choice({}, Architecture(size, ()), size) for size in (3, 2, 1)]
    names = ("a", "b", "c")
    candidates = dict.fromkeys(names, members)
    losses = dict(zip(names, values, strict=True))
    found = least_loss(candidates, losses, nested=False)
    for name in names:
        assert losses[name][found[name]] == min(losses[name])


def test_a_decision_reads_back_from_json() -> None:
    decision = Decision(Architecture(8, ()), 12, -3.5, [Candidate(Architecture(4, ()), 0.5, 0)])
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


def test_no_nested_family_is_our_own_fault() -> None:
    wide = Choice({}, Architecture(9, ()), 1)
    narrow = Choice({}, Architecture(3, ()), 1)
    with pytest.raises(AssertionError, match="no nested family"):
        least_loss({"a": [narrow], "b": [wide]}, {"a": [1.0], "b": [1.0]}, nested=True)
