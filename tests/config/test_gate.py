"""The gate from Hydra: what passes unchanged, what is unknown, of the wrong type or not set."""

import dataclasses
from typing import Any

import pytest
from helpers.gate import changed, refusal, run_settings
from helpers.strategies import shapes
from hypothesis import given
from omegaconf import OmegaConf

from elastic.config import (
    BudgetConfig,
    ParentShape,
    RunConfig,
    SpaceConfig,
    StageConfig,
    parse,
)

# What passes


def test_a_minimal_run_passes_and_leaves_no_omegaconf_behind() -> None:
    run = parse(OmegaConf.create(run_settings()), RunConfig)
    assert type(run) is RunConfig
    assert type(run.parent.shape) is ParentShape
    assert type(run.budgets) is dict and type(run.budgets["small"]) is BudgetConfig
    assert type(run.space) is SpaceConfig and type(run.space.hidden) is list
    assert type(run.curriculum.stages["all"]) is StageConfig
    assert run.curriculum.stages["warm"].mode == "pretrain"
    assert run.parent.shape.kinds == ("mamba", "mlp", "attention")
    assert run.trainer.world_size == 1


def test_a_plain_dict_passes_the_gate_too() -> None:
    assert parse(run_settings(), RunConfig) == parse(OmegaConf.create(run_settings()), RunConfig)


def test_stages_keep_their_order() -> None:
    assert list(parse(run_settings(), RunConfig).curriculum.stages) == ["warm", "all"]


@given(shapes())
def test_every_drawn_shape_passes_the_gate_unchanged(shape: ParentShape) -> None:
    settings = changed("parent.shape", dataclasses.asdict(shape))
    assert parse(settings, RunConfig).parent.shape == shape


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("curriculum.stages.all.budget_probabilities", {"full": 0.25, "small": 0.75}),
        ("curriculum.stages.all.budget_probabilities", {"full": 1, "small": 0}),
        ("trainer.micro_batch_tokens", 32),
        ("trainer", {"strategy": "ddp", "devices": 2, "num_nodes": 2}),
        ("budgets.small.params", 1_234_567),
        ("space.heterogeneous", ["ffn"]),
        ("router.freeze_at", 1.0),
        ("router.temperature_end", 1.0),
        ("data", {"sources": {"a": {"kind": "files", "path": "*.txt"}}}),
        ("parent.shape.time_step_limit", [0, 0.1]),
        ("parent.shape.time_step_limit", None),
        ("curriculum.stages.all.warmup_steps", 0),
    ],
)
def test_values_at_the_border_pass(key: str, value: Any) -> None:
    parse(changed(key, value), RunConfig)


# Unknown, missing, of the wrong type


@pytest.mark.parametrize(
    ("key", "neighbour"),
    [
        ("sede", "seed"),
        ("router.temprature", "temperature_start"),
        ("parent.shape.layers", "pattern"),
        ("budgets.small.parameters", "params"),
        ("curriculum.stages.all.lr", "model_lr"),
        ("space.heads", "mamba_heads"),
    ],
)
def test_an_unknown_key_is_named_with_those_there_are(key: str, neighbour: str) -> None:
    line = refusal(changed(key, 1))
    assert line.startswith(f"{key}: unknown")
    assert "must be one of" in line and neighbour in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "abc"),
        ("seed", 1.5),
        ("seed", True),
        ("seed", None),
        ("resume", "perhaps"),
        ("router.full_bias", "high"),
        ("budgets.small.params", "half"),
        ("budgets.small", "half"),
        ("parent.shape.hidden_size", "wide"),
        ("curriculum.stages.all.tokens", 1e3),
        ("router", 3),
        ("parent", "path"),
    ],
)
def test_a_wrong_type_names_key_and_value(key: str, value: Any) -> None:
    line = refusal(changed(key, value))
    assert line.startswith(f"{key}: ")
    assert str(value) in line


@pytest.mark.parametrize("value", ["abc", 8])
def test_a_list_of_choices_must_be_a_list(value: Any) -> None:
    assert refusal(changed("space.hidden", value)).startswith("space.hidden")


def test_an_element_of_the_wrong_type_is_named_by_its_place() -> None:
    assert refusal(changed("space.hidden", [8, "x"])).startswith("space.hidden[1]: Value 'x'")


@pytest.mark.parametrize("key", ["name", "run_dir", "parent", "budgets", "router", "curriculum"])
def test_what_is_not_set_is_named_with_how_to_set_it(key: str) -> None:
    settings = run_settings()
    del settings[key]
    assert refusal(settings) == f"{key}: must be set, for example {key}=VALUE"


@pytest.mark.parametrize(
    "key", ["run_dir", "seed", "parent.shape.hidden_size", "curriculum.stages.all.tokens"]
)
def test_question_marks_are_not_set(key: str) -> None:
    line = refusal(changed(key, "???"))
    assert line == f"{key}: must be set, for example {key}=VALUE"


def test_an_interpolation_to_nowhere_is_named() -> None:
    assert refusal(changed("seed", "${nowhere}")).startswith("seed: ")
