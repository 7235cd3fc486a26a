"""Stages, draws and learning rates are plain functions; compared with counts done by hand."""

import itertools
import math

import pytest
from helpers.goals import in_params
from helpers.spaces import FULL, SHAPE
from helpers.stages import only, stage
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ConfigError, TrainerConfig
from elastic.routing.curriculum import (
    Stage,
    check_budgets,
    learning_rate_factor,
    plan,
)

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
        ({}, 1),
        ({"budgets_per_batch": 2}, 2),
        ({"budgets_per_batch": 3}, 3),
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
    return plan(stages, TrainerConfig())


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
    planned = plan(stages, TrainerConfig())
    for mode in ("pretrain", "elastic"):
        of_mode = [s for s in planned if s.config.mode == mode]
        moments = [s.progress(step) for s in of_mode for step in range(s.steps)]
        if of_mode:
            assert moments[0] == 0.0 and of_mode[-1].progress(of_mode[-1].steps) == 1.0
        assert all(a < b for a, b in itertools.pairwise(moments))
    assert planned[-1].steps_before + planned[-1].steps == sum(s.steps for s in planned)


# Checks

TARGETS = {"full": FULL, "medium": 700, "small": 400}


def refused(
    targets: dict[str, int] = TARGETS, in_place: bool = True, **fields: object
) -> str | None:
    """The line with which a stage is refused, if it is."""
    stages = {"learn": stage(mode="pretrain"), "last": stage(**fields)}
    try:
        check_budgets(stages, in_params(SHAPE, targets), in_place)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def test_the_teacher_in_place_is_the_whole_parent() -> None:
    assert refused(budgets_per_batch=3) is None
    line = refused({"medium": 700, "small": 400, "tiny": 300}, budgets_per_batch=3)
    assert line == (
        "objective.teacher=in_place: must be replicated unless one budget is the whole parent; "
        "budgets.medium asks for 700 parameters"
    )
    assert refused({"medium": 700, "small": 400}, in_place=False, budgets_per_batch=2) is None


def test_the_teacher_in_place_is_in_every_batch() -> None:
    where = "curriculum.stages.last.budgets_per_batch"
    teacher = "the teacher of the others (objective.teacher=in_place)"
    line = refused(budgets_per_batch=2)
    assert line == (
        f"{where}=2: must be so many that every draw trains full, {teacher}: 3 trains all that "
        "are drawn"
    )
    shares = {"medium": 0.4, "small": 0.6}
    line = refused(budgets_per_batch=2, budget_probabilities=shares)
    key = "curriculum.stages.last.budget_probabilities"
    assert line == f"{key}={shares}: must be positive for full, {teacher}"
    assert refused(budgets_per_batch=2, budget_probabilities=shares, in_place=False) is None
    often = {"full": 0.5, "medium": 0.2, "small": 0.3}
    assert refused(budgets_per_batch=2, budget_probabilities=often) is None


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
    learn, *elastic = plan(stages, TrainerConfig())
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
