"""Draws of a step: stratified, functions of their arguments alone (law 8); compared with counts."""

import math
import subprocess
import sys
from collections import Counter

import pytest
from helpers.stages import only, stage
from hypothesis import given
from hypothesis import strategies as st

from elastic.routing.curriculum import (
    Pass,
    budget_probabilities,
    draw_budgets,
    draw_seed,
    inclusion,
    step_passes,
)

# Budgets


def test_budgets_are_drawn_alike_unless_the_stage_says_otherwise() -> None:
    assert budget_probabilities(stage(), ["a", "b", "c", "d"]) == dict.fromkeys("abcd", 0.25)


def test_budgets_that_a_stage_does_not_name_are_not_drawn() -> None:
    config = stage(budget_probabilities={"c": 0.4, "a": 0.6})
    probabilities = budget_probabilities(config, ["a", "b", "c"])
    assert list(probabilities.items()) == [("a", 0.6), ("b", 0.0), ("c", 0.4)]
    assert {name for step in range(500) for name in drawn(probabilities, 1, step)} == {"a", "c"}


SHARES = {"a": 0.5, "b": 0.2, "c": 0.0, "d": 0.3}


def drawn(probabilities: dict[str, float], draws: int, step: int, seed: int = 0) -> list[str]:
    return [name for (name,) in draw_budgets(probabilities, 1, draws, seed, 1, step)]


@pytest.mark.parametrize(
    "shares", [SHARES, {"12b": 1 / 3, "9b": 1 / 3, "6b": 1 / 3}, {"a": 0.94, "b": 0.06}]
)
@pytest.mark.parametrize("draws", [1, 2, 3, 4, 7, 64])
def test_each_budget_has_its_share_of_every_step_and_of_the_stage(
    shares: dict[str, float], draws: int
) -> None:
    """Rounded up or down in a step; what is rounded evens out, where independent draws would be off
    by a dozen."""
    totals: Counter[str] = Counter()
    for step in range(600):
        counts = Counter(drawn(shares, draws, step))
        assert sum(counts.values()) == draws
        for name, share in shares.items():
            quota = share * draws
            assert math.floor(quota + 1e-9) <= counts[name] <= math.ceil(quota - 1e-9)
        totals += counts
        for name, share in shares.items():
            assert abs(totals[name] - share * draws * (step + 1)) < 3.5


def test_over_the_seeds_of_a_run_budgets_come_as_often_as_their_probabilities_say() -> None:
    counts = Counter(name for seed in range(4000) for name in drawn(SHARES, 1, 7, seed))
    for name, share in SHARES.items():
        sigma = math.sqrt(4000 * share * (1 - share))
        assert abs(counts[name] - 4000 * share) <= 4 * sigma


def test_the_order_within_a_step_is_random() -> None:
    """Every budget comes first as often as it comes at all."""
    first = Counter(drawn({"a": 0.5, "b": 0.5}, 4, step)[0] for step in range(2000))
    assert abs(first["a"] - 1000) <= 4 * math.sqrt(500)
    orders = {tuple(drawn(SHARES, 10, step)) for step in range(20)}
    assert len(orders) == 20


# Several budgets per batch


def passes_of(count: int, shares: dict[str, float], step: int = 0, draws: int = 1) -> list:
    planned = only(stage(budgets_per_batch=count, draws=draws))
    return list(step_passes(planned, shares, 0, step))


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        (SHARES, 1, SHARES),
        ({"a": 0.1, "b": 0.4, "c": 0.5}, 2, {"a": 0.2, "b": 0.8, "c": 1.0}),
        ({"a": 0.1, "b": 0.3, "c": 0.6}, 2, {"a": 0.25, "b": 0.75, "c": 1.0}),
        (SHARES, 3, {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0}),
        # What the sandwich rule of arXiv 1903.05134 trains: both ends, and one between.
        (
            {"a": 1 / 3, "b": 1 / 6, "c": 1 / 6, "d": 1 / 3},
            3,
            {"a": 1.0, "b": 0.5, "c": 0.5, "d": 1.0},
        ),
    ],
)
def test_a_budget_is_in_a_draw_by_its_probability_or_always(
    shares: dict[str, float], count: int, expected: dict[str, float]
) -> None:
    found = inclusion(shares, count)
    assert list(found) == list(shares)
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(value == 1 for name, value in found.items() if expected[name] == 1), "exactly"


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any),
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(0, 10_000),
)
def test_a_draw_trains_different_budgets_as_often_as_it_should(
    parts: list[int], count: int, draws: int, step: int
) -> None:
    """In every step each comes as often as its probability says, rounded up or down; weighted by
    how often it comes, each counts as it should."""
    count = min(count, sum(part > 0 for part in parts))
    shares = {f"b{i}": part / sum(parts) for i, part in enumerate(parts)}
    included = inclusion(shares, count)
    assert sum(included.values()) == pytest.approx(count)
    drawn = passes_of(count, shares, step, draws)
    counts: Counter[str] = Counter()
    for passes in drawn:
        names = [each.budget for each in passes]
        assert len(set(names)) == count and names == sorted(names), "largest first"
        counts.update(names)
        for each in passes:
            assert each.weight * included[each.budget] == pytest.approx(count * shares[each.budget])
    assert len(drawn) == draws
    for name, share in included.items():
        quota = share * draws
        assert math.floor(quota + 1e-6) <= counts[name] <= math.ceil(quota - 1e-6)


def test_one_budget_weighs_one() -> None:
    for step in range(50):
        budgets = draw_budgets(SHARES, 1, 5, 0, 0, step)
        assert passes_of(1, SHARES, step, 5) == [[Pass(name, 1.0)] for (name,) in budgets]


def test_all_budgets_weigh_what_one_budget_does_on_average() -> None:
    """The mean over the passes is the sum by probability; what is never drawn is not passed."""
    passes, again = passes_of(3, SHARES, draws=2)
    assert [each.budget for each in passes] == ["a", "b", "d"], "largest first"
    assert again == passes
    for each in passes:
        assert each.weight / len(passes) == pytest.approx(SHARES[each.budget])


# Seeds (law 8)


def test_draws_differ_in_every_coordinate_and_by_purpose() -> None:
    seeds = [
        draw_seed(seed, purpose, index, step, draw, turn, group)
        for seed in (0, 1, 11)
        for purpose in ("budget", "router")
        for index in (0, 1, 11)
        for step in (0, 1, 11, 111)
        for draw in (0, 1, 11)
        for turn in (0, 1)
        for group in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds), "what torch.Generator takes"


def test_draws_are_the_same_in_another_process() -> None:
    """No hidden state, and no hash that changes from process to process."""
    seeds = [draw_seed(3, "router", 1, step, 2) for step in range(5)]
    budgets = [draw_budgets({"a": 0.5, "b": 0.5}, 1, 3, 3, 1, step) for step in range(5)]
    code = (
        "import random; random.random()\n"
        "from elastic.routing.curriculum import draw_budgets, draw_seed\n"
        "seeds = [draw_seed(3, 'router', 1, step, 2) for step in reversed(range(5))][::-1]\n"
        "budgets = [draw_budgets({'a': 0.5, 'b': 0.5}, 1, 3, 3, 1, step) for step in range(5)]\n"
        "print(seeds, budgets)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{seeds} {budgets}"


def test_draws_leave_the_global_generator_alone() -> None:
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    draw_budgets({"a": 0.5, "b": 0.5}, 1, 4, 0, 0, 0)
    assert random.random() == expected
