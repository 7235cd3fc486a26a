"""What fits, and what would: verdicts against the limit; changes that are tried, not guessed."""

import dataclasses
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from elastic.cli.command import CONF
from elastic.config import ConfigError, PlanConfig, parse
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import flops_per_token
from elastic.members.targets import targets_of
from elastic.plan.fit import GIB, Fitter
from elastic.plan.training import gpu_hours, passes_per_token, stage_work
from elastic.plan.work import make_plan
from elastic.routing.curriculum import plan

REAL = "experiment=nano_v2_12b"


def plan_settings(*overrides: str) -> PlanConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(compose("plan", list(overrides)), PlanConfig)


def fitter_of(config: PlanConfig) -> Fitter:
    shape = config.parent.shape
    assert shape is not None
    members = {name: Architecture.full(shape) for name in targets_of(config.budgets, shape)}
    return Fitter(config, shape, Space.build(config.space, shape), members)


def rows(entry: dict[str, Any]) -> dict[str, Any]:
    return {f"{row['strategy']}{'+' * row['offload']}": row for row in entry["rows"]}


@cache
def made(*overrides: str) -> dict[str, Any]:
    """A plan, made once."""
    return make_plan(plan_settings(*overrides))


@pytest.fixture
def real() -> dict[str, Any]:
    return made(REAL)


@pytest.mark.parametrize(
    ("name", "parent"), [("nano_v2_12b", 12_310_001_152), ("nano_v2_9b", 8_888_227_328)]
)
def test_published_sizes_are_exact_through_the_experiments(name: str, parent: int) -> None:
    family = made(f"experiment={name}")["family"]
    assert family["parent"]["parameters"] == parent
    assert family["one_checkpoint_bytes"] == 2 * parent
    for entry in family["budgets"].values():
        assert abs(entry["parameters"] / entry["target"]["params"] - 1) <= 0.01
        assert entry["homogeneous_members"] >= 1


def test_published_tokens_steps_and_ratios(real: dict[str, Any]) -> None:
    """arXiv 2511.16664, sections 4 and 5: 110B tokens, about 7 and 360 times fewer."""
    training = real["training"]
    short, long = training["stages"]
    assert (short["steps"], long["steps"]) == (5166, 1789)
    assert training["tokens"] == pytest.approx(110e9, rel=1e-3)
    assert training["separate_over_elastic"] == pytest.approx(6.8, abs=0.05)
    assert 360 < training["scratch_over_elastic"] < 365


def test_every_verdict_is_the_peak_against_the_limit(real: dict[str, Any]) -> None:
    memory = real["memory"]
    for entry in memory["gpus"]:
        for row in entry["rows"]:
            parts = sum(v for name, v in row["parts"].items() if name != "step")
            assert all(peak > parts for peak in row["stages"].values())
            assert row["peak"] == max(*row["stages"].values(), parts + row["parts"]["step"])
            assert row["fits"] == (row["peak"] <= memory["limit_bytes"])
            assert ("change" in row) == (not row["fits"])


def test_sharing_more_takes_less(real: dict[str, Any]) -> None:
    for entry in real["memory"]["gpus"]:
        peaks = [rows(entry)[name]["peak"] for name in ("ddp", "zero1", "zero2", "zero3")]
        assert peaks == sorted(peaks, reverse=True)
    zero3 = [rows(entry)["zero3"]["peak"] for entry in real["memory"]["gpus"]]
    assert zero3 == sorted(zero3, reverse=True)


SETTERS = {
    "trainer.strategy": ("strategy", str),
    "objective.teacher": ("teacher", str),
    "trainer.offload_optimizer": ("offload", bool),
    "parent.activation_checkpointing": ("checkpointing", bool),
    "objective.chunk_tokens": ("chunk_tokens", int),
    "trainer.micro_batch_tokens": ("micro_batch_tokens", int),
}


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_the_change_makes_it_fit_and_less_does_not(
    gpus: int, checkpointing: bool, strategy: str
) -> None:
    """The words are applied as a user would, all of them and all but one."""
    whole = [f"curriculum.stages.{stage}.draws=1" for stage in ("short", "long")]
    fitter = fitter_of(plan_settings(REAL, "objective.teacher=replicated", *whole))
    setup = dataclasses.replace(
        fitter.configured, gpus=gpus, strategy=strategy, checkpointing=checkpointing
    )
    found = fitter.smallest_change(setup)
    assert found
    changed, words = found
    assert fitter.fit(changed).fits

    def fits(changes: list[str]) -> bool:
        values: dict[str, Any] = {}
        for change in changes:
            if change.endswith(" GPUs"):
                values["gpus"] = int(change.split()[0])
                continue
            key, _, value = change.partition("=")
            name, kind = SETTERS[key]
            values[name] = kind(value or True)
        try:
            return fitter.fit(dataclasses.replace(setup, **values)).fits
        except ConfigError:
            return False

    assert fits(words)
    for left_out in words:
        assert not fits([word for word in words if word != left_out])


def test_what_nothing_helps_says_so() -> None:
    fitter = fitter_of(plan_settings(REAL, "plan.gpu_gib=8"))
    assert fitter.smallest_change(fitter.configured) is None


def test_a_node_with_too_little_memory_does_not_fit() -> None:
    """Every process reads the parent in float32: 394 GB and the teacher's copies."""
    config = plan_settings(REAL, "plan.node_gib=500")
    fitter = fitter_of(config)
    found = fitter.fit(fitter.configured)
    assert found.peak <= found.limit and not found.fits
    assert fitter_of(plan_settings(REAL)).fit(fitter.configured).fits


def test_settings_that_contradict_each_other_are_named() -> None:
    """ZeRO-3 needs checkpointing: the row says so, and what would do."""
    entry = made()["memory"]["gpus"][0]
    row = rows(entry)["zero3"]
    assert "parent.activation_checkpointing" in row["refused"]
    assert row["change"] == ["parent.activation_checkpointing=true"]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    entry = make_plan(plan_settings(REAL, "plan.gpus=[7]"))["memory"]["gpus"][0]
    assert entry["gpus"] == 7 and not entry["stages"]
    assert all("batch_tokens" in row["refused"] for row in entry["rows"])


def test_the_limit_is_the_card_less_the_reserve() -> None:
    config = plan_settings(REAL, "plan.gpu_gib=40", "plan.reserve_gib=1")
    assert fitter_of(config).limit == 39 * GIB


def test_flops_are_passes_times_members() -> None:
    """Soft: the whole parent for every budget. Frozen: each its own, by its probability; the
    backward pass twice, checkpointing once more; the teacher once per token."""
    config = plan_settings(REAL)
    shape = config.parent.shape
    assert shape is not None
    full = Architecture.full(shape)
    members = {"12b": full, "9b": full.without({1, 3}), "6b": full.without({1, 3, 5, 9})}
    short, long = plan(config.curriculum.stages, config.trainer)
    cost = {name: flops_per_token(shape, member, 49_152) for name, member in members.items()}
    work = stage_work(config, shape, long, members)
    mean = 0.5 * cost["12b"] + 0.3 * cost["9b"] + 0.2 * cost["6b"]
    assert work.soft_share == 0
    assert work.flops == pytest.approx(long.tokens * (4 * mean + cost["12b"]))
    soft = stage_work(config, shape, short, members)
    assert 0.05 < soft.soft_share < 0.1  # a twentieth of both stages
    early = {name: flops_per_token(shape, member, 8192) for name, member in members.items()}
    alike = sum(early.values()) / len(early)
    student = soft.soft_share * early["12b"] + (1 - soft.soft_share) * alike
    assert soft.flops == pytest.approx((4 * student + early["12b"]) * short.tokens, rel=0.01)
    config.parent.activation_checkpointing = False
    config.objective.teacher = "offline"
    assert stage_work(config, shape, long, members).flops == pytest.approx(3 * long.tokens * mean)
    seconds = 3600 * gpu_hours(config, 989e12)
    assert seconds == pytest.approx(1 / 0.4)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0.5, 0.3, 0.2]), (2, [1, 0.6, 0.4]), (3, [1, 1, 1])],
)
def test_passes_per_token(count: int, expected: list[float]) -> None:
    config = plan_settings(REAL, f"curriculum.stages.long.budgets_per_batch={count}")
    names = list(config.budgets)
    long = plan(config.curriculum.stages, config.trainer)[1]
    assert list(passes_per_token(long, names).values()) == pytest.approx(expected)
