"""Draws of a step: counts by hand, passes that cover a batch once, the same on any processes."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import StageConfig, TrainerConfig
from elastic.routing.draws import Pass, Passes, apportion, draw_seed, plan_passes

SHARES = {"full": 0.5, "medium": 0.3, "small": 0.2}
ALIKE = dict.fromkeys(SHARES, 1 / 3)


def passes_of(
    shares: dict[str, float],
    sequences: int,
    processes: int = 1,
    micro: int | None = None,
    **stage: object,
) -> Passes:
    """Passes of a stage of so many sequences a step, of one token each."""
    fields: dict = {"tokens": 100, "sequence_length": 1, "model_lr": 1.0} | stage
    trainer = TrainerConfig(devices=processes, strategy="ddp", micro_batch_tokens=micro)
    return plan_passes(StageConfig(batch_tokens=sequences, **fields), trainer, shares)


def counts(passes: tuple[Pass, ...]) -> dict[str, int]:
    """Sequences by budget."""
    found: Counter[str] = Counter()
    for each in passes:
        found[each.budget] += each.sequences
    return dict(found)


# Shares


def test_a_step_of_eight_sequences_is_split_2_3_3() -> None:
    """As nearly alike as can be; the smallest budgets first, and in turns."""
    passes = passes_of(ALIKE, 8, draws=8)
    steps = [counts(passes.of(step)) for step in range(6)]
    assert steps[0] == {"full": 2, "medium": 3, "small": 3}
    assert steps[:3] == steps[3:]
    assert {name: sum(step[name] for step in steps[:3]) for name in SHARES} == dict.fromkeys(
        SHARES, 8
    )


def test_one_draw_a_step_takes_budgets_in_turns() -> None:
    found = [counts(passes_of(SHARES, 4, draws=1).of(step)) for step in range(10)]
    assert Counter(name for step in found for name in step) == {"full": 5, "medium": 3, "small": 2}


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any), st.integers(1, 12))
def test_counts_follow_the_shares_within_a_draw_at_any_time(weights: list[int], draws: int) -> None:
    """Nothing is lost or drawn too early, and the pattern repeats where all is settled."""
    shares = tuple(weight / sum(weights) for weight in weights)
    pattern, got = apportion(shares, draws), [0] * len(shares)
    for number, step in enumerate(pattern, start=1):
        assert sum(step) == draws and min(step) >= 0
        got = [before + now for before, now in zip(got, step, strict=True)]
        for share, count in zip(shares, got, strict=True):
            due = share * draws * number
            assert abs(count - due) < 1.001
            assert share > 0 or count == 0
    assert len(pattern) <= 10_000


def test_a_budget_without_a_share_is_never_drawn() -> None:
    passes = passes_of({"full": 0.0, "medium": 0.5, "small": 0.5}, 4, draws=4)
    assert {each.budget for step in passes.cycle for each in step} == {"medium", "small"}


# Passes

MODES = ["one", "all", "sandwich"]


@pytest.mark.parametrize("how", MODES)
@given(
    st.sampled_from([ALIKE, SHARES]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(1, 4),
)
def test_passes_cover_a_batch_once_per_turn_and_weigh_what_they_cover(
    how: str,
    shares: dict[str, float],
    processes: int,
    draws: int,
    unit: int,
    micro: int | None,
    groups: int,
) -> None:
    sequences = processes * draws * unit
    passes = passes_of(
        shares, sequences, processes, micro, draws=draws, budgets_per_batch=how,
        noise_groups=groups,
    )  # fmt: skip
    assert passes.turns == (1 if how == "one" else 3)
    for step in passes.cycle:
        assert len(step) == passes.per_step
        assert sum(each.weight for each in step) == pytest.approx(len(step))
        seen: list[int] = []
        for each in step:
            assert each.sequences % processes == 0 and each.sequences > 0
            assert micro is None or each.sequences // processes <= micro
            seen += range(each.first, each.first + each.sequences)
        assert sorted(seen) == sorted(list(range(sequences)) * passes.turns)
        for start in range(0, len(step), passes.turns):  # the passes over the same text
            together = step[start : start + passes.turns]
            assert len({(each.first, each.sequences) for each in together}) == 1


def by_draw(passes: Passes, step: int, size: int) -> list[tuple[str, tuple[int, int]]]:
    """Budget and noise of every sequence of a step, in order."""
    found: list = [None] * size
    for each in passes.of(step):
        for place in range(each.first, each.first + each.sequences):
            found[place] = each.budget, each.noise
    return found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("processes", "micro"), [(1, 1), (1, 3), (2, None), (3, 2), (6, 1)])
def test_budgets_and_noise_do_not_know_how_many_processes_there_are(
    processes: int, micro: int | None, groups: int
) -> None:
    """Law 8: nor how much a process takes at a time."""
    fields = {"draws": 4, "noise_groups": groups}
    alone, other = passes_of(ALIKE, 24, **fields), passes_of(ALIKE, 24, processes, micro, **fields)
    for step in range(4):
        assert by_draw(alone, step, 24) == by_draw(other, step, 24)


def test_draws_of_one_budget_are_one_pass_and_share_its_noise() -> None:
    assert [
        (p.budget, p.first, p.sequences, p.noise) for p in passes_of(ALIKE, 16, draws=8).of(0)
    ] == [
        ("full", 0, 4, (0, 0)),
        ("medium", 4, 6, (2, 0)),
        ("small", 10, 6, (5, 0)),
    ]


def test_noise_groups_divide_the_draws_of_a_budget() -> None:
    found = [
        (p.budget, p.sequences, p.noise) for p in passes_of(ALIKE, 8, draws=8, noise_groups=2).of(0)
    ]
    assert found == [
        ("full", 1, (0, 0)), ("full", 1, (0, 1)),
        ("medium", 1, (2, 0)), ("medium", 2, (2, 1)),
        ("small", 1, (5, 0)), ("small", 2, (5, 1)),
    ]  # fmt: skip


def test_all_budgets_weigh_what_one_budget_does_on_average() -> None:
    """What is never drawn is not passed."""
    shares = {"a": 0.5, "b": 0.2, "c": 0.0, "d": 0.3}
    (step,) = passes_of(shares, 8, draws=8, budgets_per_batch="all").cycle
    assert [each.budget for each in step] == ["a", "b", "d"], "largest first"
    for each in step:
        assert each.weight / len(step) == pytest.approx(shares[each.budget])


def test_a_sandwich_is_both_ends_and_one_between_by_its_share() -> None:
    shares = {"a": 0.9, "b": 0.06, "c": 0.0, "d": 0.02, "e": 0.02}
    passes = passes_of(shares, 4, draws=4, budgets_per_batch="sandwich")
    for step in passes.cycle:
        assert [p.budget for p in step][::3] == ["a"] * (len(step) // 3)
        assert [p.budget for p in step][2::3] == ["e"] * (len(step) // 3)
    assert counts(passes.of(0)) == {"a": 4, "b": 3, "d": 1, "e": 4}


@pytest.mark.parametrize(
    ("micro", "processes", "per_step", "most"),
    [(None, 1, 1, 48), (None, 4, 1, 12), (8, 1, 6, 8), (8, 3, 2, 8), (1, 6, 8, 1), (7, 1, 8, 6)],
)
def test_a_pretrain_step_is_split_into_equal_passes(
    micro: int | None, processes: int, per_step: int, most: int
) -> None:
    passes = passes_of({}, 48, processes, micro, mode="pretrain")
    assert (passes.per_step, passes.most_sequences) == (per_step, most * processes)
    assert {(p.budget, p.weight) for p in passes.of(0)} == {("parent", 1.0)}


# Seeds


def test_seeds_differ_in_every_coordinate_and_by_purpose() -> None:
    seeds = [
        draw_seed(seed, purpose, index, step, draw, group)
        for seed in (0, 1, 11)
        for purpose in ("router", "other")
        for index in (0, 1, 11)
        for step in (0, 1, 11, 111)
        for draw in (0, 1, 11)
        for group in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds), "what torch.Generator takes"


def test_seeds_are_the_same_in_another_process() -> None:
    """No hidden state, and no hash that changes from process to process."""
    expected = [draw_seed(3, "router", 1, step, 2, 0) for step in range(5)]
    code = (
        "import random; random.random()\n"
        "from elastic.routing.draws import draw_seed\n"
        "print([draw_seed(3, 'router', 1, step, 2, 0) for step in reversed(range(5))][::-1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(expected)


def test_seeds_leave_the_global_generator_alone() -> None:
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    draw_seed(0, "router", 0, 0, 0, 0)
    assert random.random() == expected
