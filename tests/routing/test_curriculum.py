"""Stages, draws and learning rates are plain functions; compared with counts done by hand."""

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ConfigError, StageConfig, TrainerConfig
from elastic.routing.curriculum import (
    Pass,
    Stage,
    budget_probabilities,
    check_budgets,
    draw_budgets,
    draw_seed,
    learning_rate_factor,
    plan,
    step_passes,
)


def stage(**fields: object) -> StageConfig:
    defaults: dict[str, object] = {
        "tokens": 1000,
        "sequence_length": 10,
        "batch_tokens": 100,
        "model_lr": 1e-3,
        "warmup_steps": 0,
    }
    return StageConfig(**(defaults | fields))  # type: ignore[arg-type]


BUDGETS = ["full", "medium", "small"]


def only(config: StageConfig, **trainer: object) -> Stage:
    """Plan of a single stage."""
    (planned,) = plan({"one": config}, TrainerConfig(**trainer), BUDGETS)  # type: ignore[arg-type]
    return planned


# Plan


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (99, 1), (100, 1), (101, 2), (1000, 10), (1001, 11)]
)
def test_tokens_are_rounded_up_to_whole_steps(tokens: int, steps: int) -> None:
    planned = only(stage(tokens=tokens))
    assert planned.steps == steps and planned.tokens == 100 * steps


def test_the_published_stages_have_the_published_steps() -> None:
    """method.md, section 7.1: about 5,166 and 1,788 steps."""
    short = only(stage(tokens=65 * 10**9, sequence_length=8192, batch_tokens=1536 * 8192))
    long = only(stage(tokens=45 * 10**9, sequence_length=49_152, batch_tokens=512 * 49_152))
    assert abs(short.steps - 5166) <= 1 and abs(long.steps - 1788) <= 1


@pytest.mark.parametrize(
    ("micro", "devices", "nodes", "accumulation", "sequences"),
    [
        (None, 1, 1, 1, 48),
        (None, 2, 2, 1, 12),
        (80, 1, 1, 6, 8),
        (80, 3, 1, 2, 8),
        (10, 2, 3, 8, 1),
        (95, 1, 1, 6, 8),
        (79, 1, 1, 8, 6),
        (10_000, 1, 2, 1, 24),
    ],
)
def test_a_step_is_split_over_processes_and_equal_forward_passes(
    micro: int | None, devices: int, nodes: int, accumulation: int, sequences: int
) -> None:
    planned = only(
        stage(batch_tokens=480), micro_batch_tokens=micro, devices=devices, num_nodes=nodes,
        strategy="ddp",
    )  # fmt: skip
    assert (planned.accumulation, planned.batch_sequences) == (accumulation, sequences)
    assert planned.accumulation * planned.batch_sequences * devices * nodes == 48
    assert planned.micro_batches == accumulation


@pytest.mark.parametrize(
    ("micro", "devices", "draws", "micro_batches", "sequences"),
    [(None, 1, 4, 1, 12), (None, 4, 4, 1, 3), (80, 1, 4, 2, 6), (80, 2, 3, 1, 8), (10, 2, 3, 8, 1)],
)
def test_a_draw_is_an_equal_slice_of_the_batch_on_any_number_of_processes(
    micro: int | None, devices: int, draws: int, micro_batches: int, sequences: int
) -> None:
    planned = only(
        stage(batch_tokens=480, draws=draws), micro_batch_tokens=micro, devices=devices,
        strategy="ddp",
    )  # fmt: skip
    assert (planned.micro_batches, planned.batch_sequences) == (micro_batches, sequences)
    assert planned.accumulation == draws * micro_batches
    assert micro_batches * sequences * devices * draws == 48


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"budgets_per_batch": "one"}, 1),
        ({"budgets_per_batch": "all"}, 3),
        ({"budgets_per_batch": "all", "budget_probabilities": {"full": 0.5, "small": 0.5}}, 2),
        ({"budgets_per_batch": "sandwich"}, 3),
    ],
)
def test_a_step_passes_over_every_micro_batch_once_per_budget(
    fields: dict[str, object], passes: int
) -> None:
    """More passes of the same size, and no fewer tokens of text."""
    planned = only(stage(batch_tokens=480, **fields), micro_batch_tokens=80)
    assert (planned.passes, planned.accumulation) == (passes, 6 * passes)
    assert planned.batch_sequences == 8 and planned.steps == only(stage(batch_tokens=480)).steps


def three_stages() -> list[Stage]:
    stages = {
        "learn": stage(mode="pretrain", tokens=250),
        "short": stage(tokens=601),
        "long": stage(tokens=300, batch_tokens=150),
    }
    return plan(stages, TrainerConfig(), BUDGETS)


def test_stages_keep_their_order_and_count_all_steps_before_them() -> None:
    planned = three_stages()
    assert [(s.name, s.index) for s in planned] == [("learn", 0), ("short", 1), ("long", 2)]
    assert [s.steps for s in planned] == [3, 7, 2]
    assert [s.steps_before for s in planned] == [0, 3, 10]


def test_progress_runs_from_0_to_1_over_the_stages_of_a_mode() -> None:
    """Pretraining has its own; rounded-up tokens count."""
    learn, short, long = three_stages()
    assert (learn.progress(0), learn.progress(3)) == (0.0, 1.0)
    assert short.progress(0) == 0.0
    assert short.progress(short.steps) == long.progress(0) == 700 / 1000
    assert long.progress(1) == 850 / 1000
    assert long.progress(long.steps) == 1.0


@given(
    st.lists(st.tuples(st.integers(1, 999), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 3),
)
def test_progress_only_ever_grows(sizes: list[tuple[int, int]], pretrain: int) -> None:
    stages = {
        f"stage {i}": stage(
            mode="pretrain" if i < pretrain else "elastic", tokens=tokens, batch_tokens=10 * batch
        )
        for i, (tokens, batch) in enumerate(sizes)
    }
    planned = plan(stages, TrainerConfig(), BUDGETS)
    for mode in ("pretrain", "elastic"):
        of_mode = [s for s in planned if s.config.mode == mode]
        moments = [s.progress(step) for s in of_mode for step in range(s.steps)]
        if of_mode:
            assert moments[0] == 0.0 and of_mode[-1].progress(of_mode[-1].steps) == 1.0
        assert all(a < b for a, b in itertools.pairwise(moments))
    assert planned[-1].steps_before + planned[-1].steps == sum(s.steps for s in planned)


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
    return draw_budgets(probabilities, draws, seed, 1, step)


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


def passes_of(kind: str, shares: dict[str, float], step: int = 0, draws: int = 1) -> list:
    planned = only(stage(budgets_per_batch=kind, draws=draws))
    return list(step_passes(planned, shares, 0, step))


def test_one_budget_is_the_one_that_is_drawn() -> None:
    for step in range(50):
        budgets = draw_budgets(SHARES, 5, 0, 0, step)
        assert passes_of("one", SHARES, step, 5) == [[Pass(name, 1.0)] for name in budgets]


def test_all_budgets_weigh_what_one_budget_does_on_average() -> None:
    """The mean over the passes is the sum by probability; what is never drawn is not passed."""
    passes, again = passes_of("all", SHARES, draws=2)
    assert [each.budget for each in passes] == ["a", "b", "d"], "largest first"
    assert again == passes
    for each in passes:
        assert each.weight / len(passes) == pytest.approx(SHARES[each.budget])
    (alike,) = passes_of("all", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert [each.weight for each in alike] == [1.0, 1.0, 1.0]


def test_a_sandwich_is_both_ends_and_one_between_by_its_probability() -> None:
    shares = {"a": 0.9, "b": 0.06, "c": 0.0, "d": 0.02, "e": 0.02}
    counts: Counter[str] = Counter()
    for step in range(500):
        drawn = passes_of("sandwich", shares, step, 2)
        assert len(drawn) == 2
        for first, middle, last in drawn:
            assert (first.budget, last.budget) == ("a", "e")
            assert {first.weight, middle.weight, last.weight} == {1.0}
            counts[middle.budget] += 1
    assert set(counts) == {"b", "d"}
    assert abs(counts["b"] - 750) < 3.5


TARGETS = {"full": 100, "medium": 70, "small": 40}


def refused(
    targets: dict[str, int] = TARGETS, in_place: bool = True, **fields: object
) -> str | None:
    """The line with which a stage is refused, if it is."""
    stages = {"learn": stage(mode="pretrain"), "last": stage(**fields)}
    try:
        check_budgets(stages, targets, 100, in_place)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def test_the_teacher_in_place_is_the_whole_parent() -> None:
    for mode in ("all", "sandwich"):
        assert refused(budgets_per_batch=mode) is None
        line = refused({"medium": 70, "small": 40, "tiny": 30}, budgets_per_batch=mode)
        assert line == (
            "objective.teacher=in_place: must be replicated unless one budget is the whole parent, "
            "100 parameters; budgets.medium has 70"
        )
    assert refused({"medium": 70, "small": 40}, in_place=False, budgets_per_batch="all") is None


def test_the_teacher_in_place_is_in_every_batch() -> None:
    shares = {"medium": 0.4, "small": 0.6}
    line = refused(budgets_per_batch="all", budget_probabilities=shares)
    assert line == (
        f"curriculum.stages.last.budget_probabilities={shares}: must be positive for full, the "
        "teacher of the others (objective.teacher=in_place)"
    )
    assert refused(budgets_per_batch="all", budget_probabilities=shares, in_place=False) is None
    ends = {"medium": 1.0}
    assert refused(budgets_per_batch="sandwich", budget_probabilities=ends) is None


def test_a_sandwich_has_something_to_draw_for_its_middle() -> None:
    ends = {"full": 0.5, "small": 0.5}
    line = refused(budgets_per_batch="sandwich", budget_probabilities=ends, in_place=False)
    assert line == (
        f"curriculum.stages.last.budget_probabilities={ends}: must be positive for one of medium: "
        "a sandwich draws between the ends"
    )


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
    budgets = [draw_budgets({"a": 0.5, "b": 0.5}, 3, 3, 1, step) for step in range(5)]
    code = (
        "import random; random.random()\n"
        "from elastic.routing.curriculum import draw_budgets, draw_seed\n"
        "seeds = [draw_seed(3, 'router', 1, step, 2) for step in reversed(range(5))][::-1]\n"
        "budgets = [draw_budgets({'a': 0.5, 'b': 0.5}, 3, 3, 1, step) for step in range(5)]\n"
        "print(seeds, budgets)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{seeds} {budgets}"


def test_draws_leave_the_global_generator_alone() -> None:
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    draw_budgets({"a": 0.5, "b": 0.5}, 4, 0, 0, 0)
    assert random.random() == expected


# Learning rate


def factors(stages: list[Stage], held_until: float) -> list[float]:
    return [
        learning_rate_factor(each, step, held_until)
        for each in stages
        for step in range(each.steps)
    ]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    planned = only(stage(tokens=10_000, warmup_steps=4))
    assert factors([planned], 0.5)[:50] == [0.25, 0.5, 0.75] + [1.0] * 47


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert learning_rate_factor(only(stage()), 0, 0.0) == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_cosine_ends_at_its_final_ratio(final: float) -> None:
    planned = only(stage(tokens=11_000, warmup_steps=10, final_lr_ratio=final))
    assert learning_rate_factor(planned, 110, 0.0) == pytest.approx(final)
    middle = final + (1 - final) / 2
    assert learning_rate_factor(planned, 60, 0.0) == pytest.approx(middle)
    assert learning_rate_factor(planned, 60, 10 / 110) == pytest.approx(middle)
    assert learning_rate_factor(planned, 110, 1.0) == 1.0, "held to the end"


def test_one_schedule_runs_over_all_stages_of_a_mode() -> None:
    """One warmup, the peak until the choices are final, then a cosine across the border."""
    stages = {
        "learn": stage(mode="pretrain", tokens=1000, warmup_steps=2),
        "short": stage(tokens=6000, warmup_steps=3),
        "long": stage(tokens=4000),
    }
    learn, *elastic = plan(stages, TrainerConfig(), BUDGETS)
    assert factors([learn], 0.0)[:3] == [0.5, 1.0, 1.0]
    found = factors(elastic, 0.2)
    assert found[:20] == [1 / 3, 2 / 3] + [1.0] * 18 and found[20] == 1.0
    for step in range(20, 100):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert found[step] == pytest.approx(expected)


@given(st.integers(1, 50), st.integers(0, 60), st.floats(0, 1), st.floats(0, 1))
def test_factors_are_shares_of_the_peak(steps: int, warmup: int, final: float, held: float) -> None:
    planned = only(stage(tokens=100 * steps, warmup_steps=warmup, final_lr_ratio=final))
    for step in range(steps + 1):
        assert 0 <= learning_rate_factor(planned, step, held) <= 1
        assert learning_rate_factor(planned, step, held) > 0 or step == steps
