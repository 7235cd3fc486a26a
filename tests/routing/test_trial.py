"""Candidates that train before one is frozen: who stays, who trains, and that it can be resumed."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence

import pytest
from helpers.routers import members
from hypothesis import given
from hypothesis import strategies as st
from routing.test_decide import TARGETS, by_index, family

from elastic.config import ConfigError, RouterConfig
from elastic.members.architecture import Architecture
from elastic.members.search import Choice
from elastic.routing.decide import Candidates, least_loss, sums_through
from elastic.routing.family import Family
from elastic.routing.trial import Trial

NAMES = ("full", "medium", "small")


def choice(width: int) -> Choice:
    return Choice({}, Architecture(width, ()), width)


def chain(losses: Mapping[str, Sequence[float]]) -> dict[str, list[Choice]]:
    """Candidates whose widths decide over nesting: of every budget the wide ones come first."""
    widths = {"full": [16], "medium": range(14, 8, -1), "small": range(12, 6, -1)}
    return {name: [choice(w) for w in list(widths[name])[: len(losses[name])]] for name in losses}


def by_force(
    candidates: Candidates, losses: Mapping[str, Sequence[float]], nested: bool
) -> dict[tuple[int, ...], float]:
    """Every legal family with its sum."""
    found = {}
    for picks in itertools.product(*(range(len(each)) for each in candidates.values())):
        taken = [candidates[n][i].architecture for n, i in zip(candidates, picks, strict=True)]
        if not nested or all(b.is_within(a) for a, b in itertools.pairwise(taken)):
            found[picks] = sum(losses[n][i] for n, i in zip(candidates, picks, strict=True))
    return found


sixes = st.lists(st.floats(0.01, 5), min_size=1, max_size=6)


@given(sixes, sixes, st.booleans())
def test_the_best_family_is_that_of_brute_force(
    medium: list[float], small: list[float], nested: bool
) -> None:
    losses = {"full": [0.0], "medium": medium, "small": small}
    candidates = chain(losses)
    every = by_force(candidates, losses, nested)
    if not every:
        return
    picked = tuple(least_loss(candidates, losses, nested).values())
    assert every[picked] == pytest.approx(min(every.values()))
    through = sums_through(candidates, losses, nested)
    for position, name in enumerate(NAMES):
        for index, total in enumerate(through[name]):
            sums = [value for picks, value in every.items() if picks[position] == index]
            assert total == pytest.approx(min(sums, default=math.inf))


def kls(trial: Trial, best: Mapping[str, int]) -> dict[str, list[float]]:
    """The nearer in width to `best`, the less."""
    return {
        name: [0.1 * abs(c.params - best.get(name, c.params)) + 0.01 for c in each]
        for name, each in trial.alive.items()
    }


def start(rounds: int = 2) -> Trial:
    losses = {
        "full": [0.0],
        "medium": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        "small": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    }
    return Trial(chain(losses), losses, True, rounds)


def widths(trial: Trial) -> dict[str, list[int]]:
    return {name: [each.params for each in choices] for name, choices in trial.alive.items()}


def test_half_of_the_candidates_leave_in_every_round() -> None:
    """By what they have become, not by what they were."""
    trial = start()
    assert widths(trial) == {"full": [16], "medium": [14, 13, 12], "small": [12, 11, 10]}
    assert not trial.decided and trial.best()["small"].params == 12
    trial.compared(kls(trial, {"medium": 12, "small": 10}))
    assert widths(trial) == {"full": [16], "medium": [13, 12], "small": [11, 10]}
    trial.compared(kls(trial, {"medium": 12, "small": 10}))
    assert trial.decided
    assert {name: c.params for name, c in trial.best().items()} == {
        "full": 16, "medium": 12, "small": 10,
    }  # fmt: skip
    left = {entrant.choice.params: entrant.kl for entrant in trial.entrants["small"]}
    assert left[7] == 0.6 and left[10] == pytest.approx(0.01), "each when compared last"


def test_who_fits_into_nobody_leaves_although_he_is_good() -> None:
    losses = {"full": [0.0], "medium": [0.1, 0.9], "small": [0.1, 0.2, 0.3, 0.9]}
    candidates = {"full": [choice(16)], "medium": [choice(9), choice(14)]}
    candidates["small"] = [choice(w) for w in (12, 8, 7, 6)]
    trial = Trial(candidates, losses, True, 1)
    assert widths(trial) == {"full": [16], "medium": [9], "small": [8, 7]}


def test_without_rounds_the_best_is_taken_at_once() -> None:
    trial = start(rounds=0)
    assert trial.decided and len(trial.alive["small"]) == 6
    assert trial.best()["medium"].params == 14


def test_every_candidate_that_is_left_trains_and_its_tokens_are_counted() -> None:
    trial = start()
    drawn = [trial.draw("small", seed, 10).params for seed in range(300)]
    assert {w: drawn.count(w) for w in set(drawn)}.keys() == {12, 11, 10}
    assert min(drawn.count(w) for w in (12, 11, 10)) > 70
    assert [trial.draw("small", seed, 0).params for seed in range(300)] == drawn
    tokens = {e.choice.params: e.tokens for e in trial.entrants["small"]}
    assert tokens == {w: 10 * drawn.count(w) for w in range(12, 6, -1)}


# In a family


def in_rounds(rounds: int = 2) -> Family:
    one = family()
    one.config.rounds, one.config.round_share = rounds, 0.1
    return one


def test_a_family_freezes_after_its_rounds() -> None:
    """The router learns no more from their start on, and rates fall from there."""
    one, seen = in_rounds(), []

    def compare(candidates: Candidates) -> Mapping[str, Sequence[float]]:
        seen.append({name: len(each) for name, each in candidates.items()})
        return by_index(candidates)

    steps = [p / 100 for p in range(100)]
    frozen = [p for p in steps if one.freeze_if_due(p, compare)]
    assert frozen == [0.7] and one.held_until == 0.5
    assert [each["small"] for each in seen] == [5, 3, 2]
    assert one.trial is None and set(members(one)) == set(TARGETS)
    decision = one.decisions["small"]
    assert len(decision.candidates) == 5
    assert members(one)["small"] in [each.architecture for each in decision.candidates]


def test_between_the_rounds_candidates_run_as_themselves() -> None:
    one = in_rounds()
    assert one.soft
    assert not one.freeze_if_due(0.5, by_index) and not one.soft and one.frozen is None
    assert not any(weight.requires_grad for weight in one.router.parameters())
    draws = [one.draw("small", 0.5, seed, 7) for seed in range(50)]
    assert len({draw.member for draw in draws}) == 3
    assert all(isinstance(d.member, Architecture) and d.terms == {} for d in draws)
    assert one.draw("full", 0.5, 0).member is None
    assert one.trial is not None and one.choices(0.5) == one.trial.best()


@pytest.mark.parametrize("at", [0.5, 0.6, 0.65])
def test_a_trial_goes_on_from_a_checkpoint(at: float) -> None:
    one, other = in_rounds(), in_rounds()
    steps = [p / 100 for p in range(100)]
    for progress in steps:
        if progress > at:
            break
        one.freeze_if_due(progress, by_index)
        one.draw("small", progress, int(progress * 100), 7)
    other.load_state(json.loads(json.dumps(one.state())))
    for progress in steps:
        if progress <= at:
            continue
        for each in (one, other):
            each.freeze_if_due(progress, by_index)
        seed = int(progress * 100)
        drawn = [each.draw("small", progress, seed, 7).member for each in (one, other)]
        assert drawn[0] == drawn[1]
    assert members(one) == members(other) and one.decisions == other.decisions
    assert one.held_until == other.held_until == 0.5


def test_rounds_must_fit_behind_the_router() -> None:
    RouterConfig(freeze_at=0.9, rounds=5, round_share=0.02)
    line = r"^router.round_share=0.03: must be positive, and 5 rounds must fit behind"
    with pytest.raises(ConfigError, match=line):
        RouterConfig(freeze_at=0.9, rounds=5, round_share=0.03)
