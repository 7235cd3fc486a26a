"""Impossible values stop in one line: the key first, then the value, then what is allowed."""

import re
from dataclasses import replace
from typing import Any

import pytest
from helpers.gate import SHAPE, STAGE, changed, refusal
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import (
    ConfigError,
    EvaluateConfig,
    ExtractConfig,
    RunConfig,
    explain,
    parse,
)

# Impossible values: key=value, then what is allowed

WARM, ALL = "curriculum.stages.warm", "curriculum.stages.all"
POSITIVE, NOT_NEGATIVE = "must be positive", "must be at least 0"
FINITE = "must be a finite number"

RULES: list[tuple[str, Any, str]] = [
    ("seed", -1, NOT_NEGATIVE),
    # parent.shape
    ("parent.shape.pattern", "", "non-empty string of M"),
    ("parent.shape.pattern", "MX", "string of M (Mamba-2), - (MLP) and * (attention)"),
    ("parent.shape.pattern", "ME", "E (mixture of experts) is not supported yet"),
    *((f"parent.shape.{name}", 0, POSITIVE) for name in SHAPE if name != "pattern"),
    ("parent.shape.hidden_size", -8, POSITIVE),
    ("parent.shape.conv_kernel", 0, POSITIVE),
    ("parent.shape.max_position_embeddings", 0, POSITIVE),
    ("parent.shape.norm_eps", 0.0, POSITIVE),
    ("parent.shape.norm_eps", float("nan"), FINITE),
    ("parent.shape.time_step_limit", [0.1], "null, or the lowest and the highest step"),
    ("parent.shape.time_step_limit", [0.2, 0.1], "null, or the lowest and the highest step"),
    ("parent.shape.time_step_limit", [-2.0, -1.0], "null, or the lowest and the highest step"),
    ("parent.shape.num_attention_heads", 3, "a multiple of num_key_value_heads=2"),
    ("parent.shape.mamba_num_heads", 3, "a multiple of n_groups=2"),
    # parent
    ("parent.kernels", "cuda", "one of auto, torch, mamba_ssm"),
    # budgets
    ("budgets.small.params", 0.0, POSITIVE),
    ("budgets.small.params", -0.5, POSITIVE),
    ("budgets.small.params", float("inf"), FINITE),
    ("budgets.small.params", float("nan"), FINITE),
    # space
    ("space.ffn", [], "a non-empty list, or null"),
    ("space.ffn", [8, 0], POSITIVE),
    ("space.ffn", [8, 8], "strictly descending"),
    ("space.hidden", [4, 8], "strictly descending, the parent's size first"),
    ("space.tolerance", 0.0, "between 0 and 1"),
    ("space.tolerance", 1.0, "between 0 and 1"),
    # importance
    *(
        (f"importance.{name}", 0, POSITIVE)
        for name in (
            "samples sequence_length batch_size depth_samples depth_sequence_length depth_positions"
        ).split()
    ),
    ("importance.ffn_score", "x", "one of post_activation, pre_activation"),
    ("importance.aggregation", "max", "one of sum, mean_l2"),
    ("importance.depth_method", "x", "one of iterative, one_pass"),
    # router
    ("router.hidden_units", 0, POSITIVE),
    ("router.temperature_end", 0.0, "in (0, router.temperature_start=1.0]"),
    ("router.temperature_end", 1.5, "in (0, router.temperature_start=1.0]"),
    ("router.scale_start", 0.0, POSITIVE),
    ("router.scale_end", -1.0, POSITIVE),
    ("router.freeze_at", 0.0, "in (0, 1]"),
    ("router.freeze_at", 1.1, "in (0, 1]"),
    ("router.settled_steps", -1, NOT_NEGATIVE),
    ("router.hard_probability", 1.1, "in [0, 1]"),
    # objective
    *(
        (f"objective.{name}_weight", -1.0, NOT_NEGATIVE)
        for name in "distillation cross_entropy budget".split()
    ),
    ("objective.budget_rate", -1.0, NOT_NEGATIVE),
    ("objective.distillation_weight", 0.0, "or objective.cross_entropy_weight must be"),
    ("objective.teacher", "parent", "one of replicated, zero3, cpu_offload, offline, in_place"),
    ("objective.divergence", "kl", "one of forward_kl, reverse_kl, jsd"),
    ("objective.top_k", 0, "positive, or null"),
    ("objective.temperature", 0.0, POSITIVE),
    ("objective.chunk_tokens", 0, POSITIVE),
    # curriculum
    (f"{ALL}.mode", "frozen", "one of pretrain, elastic"),
    *((f"{ALL}.{name}", 0, POSITIVE) for name in "tokens sequence_length batch_tokens".split()),
    (f"{ALL}.model_lr", 0.0, POSITIVE),
    (f"{ALL}.router_lr", -1.0, POSITIVE),
    (f"{ALL}.warmup_steps", -1, NOT_NEGATIVE),
    (f"{ALL}.final_lr_ratio", 1.5, "in [0, 1]"),
    (f"{ALL}.batch_tokens", 70, "a multiple of sequence_length=16; the nearest is 64"),
    (f"{ALL}.batch_tokens", 7, "a multiple of sequence_length=16; the nearest is 16"),
    (f"{ALL}.budget_probabilities", {}, "sum to 1 (the sum is 0)"),
    (f"{ALL}.budget_probabilities", {"full": 0.5}, "sum to 1 (the sum is 0.5)"),
    (f"{ALL}.budget_probabilities", {"full": 1.5, "small": -0.5}, "non-negative"),
    (f"{WARM}.budget_probabilities", {"full": 1.0}, "null: a pretrain stage has no budgets"),
    (f"{ALL}.budgets_per_batch", 0, "at least 1"),
    (f"{ALL}.budgets_per_batch", 3, "at most 2, the budgets that are drawn in this stage"),
    (f"{WARM}.budgets_per_batch", 2, "1: a pretrain stage has no budgets"),
    # data
    ("data.sources.text.kind", "web", "one of stdlib, files, hub, arithmetic"),
    ("data.sources.text.path", "texts", "set for kind=files and kind=hub, and null for others"),
    ("data.sources.text.weight", 0.0, "positive, or null"),
    ("data.sources.text.weight", -1.0, "positive, or null"),
    ("data.sources.text.target_tokens", 0, "positive, or null"),
    ("data.sources.text.loss_on", "user", "one of all, assistant"),
    ("data.sources.text.loss_on", "assistant", "all where there are no messages"),
    ("data.sources.text.reasoning", "hide", "one of keep, strip, last_turn"),
    ("data.sources.text.difficulties", [0], "of 1 to 8, at least one"),
    ("data.path", "texts", "null here: no source has it"),
    ("data.packing", "tight", "one of best_fit, concat, none"),
    ("data.on_error", "hide", "one of stop, skip"),
    ("data.max_skip_fraction", 1.0, "in [0, 1)"),
    ("data.workers", 0, "positive, or null"),
    ("data.validation_every", 1, "at least 2"),
    ("data.validation_sequences", 0, POSITIVE),
    ("data.tokenizer_vocab", 259, "at least 260"),
    # optim
    ("optim.beta1", 1.0, "in [0, 1)"),
    ("optim.beta2", -0.1, "in [0, 1)"),
    ("optim.eps", 0.0, POSITIVE),
    ("optim.weight_decay", -0.1, NOT_NEGATIVE),
    ("optim.gradient_clip", 0.0, POSITIVE),
    # trainer
    ("trainer.accelerator", "tpu", "one of auto, cpu, gpu"),
    ("trainer.strategy", "fsdp", "one of single, ddp, zero1"),
    ("trainer.precision", "16-mixed", "one of 32-true, bf16-mixed, bf16-true"),
    ("trainer.precision", "bf16-true", "32-true or bf16-mixed with trainer.strategy=single: witho"),
    *(
        (f"trainer.{name}", 0, POSITIVE)
        for name in "devices num_nodes validate_every checkpoint_every log_every".split()
    ),
    ("trainer.micro_batch_tokens", 0, POSITIVE),
]


@pytest.mark.parametrize(
    ("key", "value", "allowed"), RULES, ids=[f"{key}={value}" for key, value, _ in RULES]
)
def test_an_impossible_value_names_key_value_and_what_is_allowed(
    key: str, value: Any, allowed: str
) -> None:
    line = refusal(changed(key, value))
    assert line.startswith(f"{key}={value}: must be ")
    assert allowed in line


@pytest.mark.parametrize("axis", ["hidden", "mamba_head_dim", "depth", "nothing"])
def test_only_layered_axes_are_heterogeneous(axis: str) -> None:
    line = refusal(changed("space.heterogeneous", [axis]))
    allowed = "one of ffn, mamba_heads, attention_heads"
    assert line == f"space.heterogeneous={axis}: must be {allowed}"


def test_a_heterogeneous_axis_needs_choices() -> None:
    line = refusal(changed("space.heterogeneous", ["ffn", "mamba_heads"]))
    assert line == "space.heterogeneous=mamba_heads: must be an axis that has choices"


# Settings that contradict each other


def test_a_parent_is_read_or_built() -> None:
    assert refusal(changed("parent", {})) == (
        "parent: set parent.path (a checkpoint) or parent.shape (the sizes of a parent to train "
        "here); both are null"
    )


def test_a_checkpoint_must_have_the_sizes_that_were_announced() -> None:
    """So that what was planned is what is trained."""
    parent = parse(changed("parent.path", "somewhere"), RunConfig).parent
    assert parent.shape is not None
    parent.check_shape(replace(parent.shape, tied_head=True))
    with pytest.raises(ConfigError) as caught:
        parent.check_shape(replace(parent.shape, hidden_size=16))
    assert str(caught.value) == (
        "parent.shape.hidden_size=8: must be 16, as in somewhere; or parent.shape=null to take its "
        "sizes as they are"
    )
    parent.shape = None
    parent.check_shape(parse(changed("parent.path", None), RunConfig).parent.shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("listed", "wrong", "way"),
    [
        ({"full": 1.0}, "the budget small is not listed", "{full:1,small:0}"),
        ({"small": 1.0}, "the budget full is not listed", "{full:0,small:1}"),
        (
            {"full": 0.5, "small": 0.25, "tiny": 0.25},
            "tiny is no budget (those are full, small)",
            "{full:0.6667,small:0.3333}",
        ),
        ({"tiny": 1.0}, "tiny is no budget", "{full:0.5,small:0.5}"),
    ],
    ids=["added", "the-largest", "removed", "renamed"],
)
def test_a_stage_that_lists_shares_lists_every_budget(
    listed: dict[str, float], wrong: str, way: str
) -> None:
    """One that is added and not listed would silently never be drawn. The way out is one."""
    key = f"{ALL}.budget_probabilities"
    line = refusal(changed(key, listed))
    removed = f" '~{key}.tiny'" if "tiny" in listed else ""
    assert line.startswith(f"{key}={listed}: {wrong}")
    assert line.endswith(f"'+{key}={way}'{removed}, or draw all alike: {key}=null")
    shares = {name: float(share) for name, share in re.findall(r"(\w+):([\d.]+)", way)}
    for mended in (shares, None):
        parse(changed(key, mended), RunConfig)


def in_place(**stage: Any) -> dict[str, Any]:
    """A run whose full budget teaches, but for what the stage says."""
    settings = changed("objective", {"teacher": "in_place", "cross_entropy_weight": 0.5})
    settings["curriculum"]["stages"]["all"].update({"budgets_per_batch": 2} | stage)
    return settings


def test_a_teacher_in_place_learns_from_the_text() -> None:
    parse(in_place(), RunConfig)
    settings = in_place() | {"objective": {"teacher": "in_place"}}
    line = refusal(settings)
    assert line.startswith("objective.cross_entropy_weight=0.0: must be positive with ")


def test_a_draw_trains_no_more_budgets_than_are_drawn() -> None:
    settings = changed(f"{ALL}.budget_probabilities", {"full": 1.0, "small": 0.0})
    settings["curriculum"]["stages"]["all"]["budgets_per_batch"] = 2
    assert refusal(settings).startswith(f"{ALL}.budgets_per_batch=2: must be at most 1, the ")


def test_there_is_a_budget() -> None:
    assert refusal(changed("budgets", {})).startswith("budgets={}: must be at least one budget")


@pytest.mark.parametrize("stages", [{}, {"warm": STAGE | {"mode": "pretrain"}}])
def test_there_is_an_elastic_stage(stages: dict[str, Any]) -> None:
    line = refusal(changed("curriculum.stages", stages))
    assert line == f"curriculum.stages={list(stages)}: must be at least one stage of mode elastic"


def test_pretraining_comes_first() -> None:
    stages = {"all": STAGE, "warm": STAGE | {"mode": "pretrain"}}
    line = refusal(changed("curriculum.stages", stages))
    assert line.startswith("curriculum.stages=['all', 'warm']: must be ordered: every pretrain")


def test_a_later_stage_has_no_second_warmup() -> None:
    stages = {"warm": STAGE | {"mode": "pretrain"}, "all": STAGE | {"warmup_steps": 2}}
    parse(changed("curriculum.stages", stages), RunConfig)
    line = refusal(changed("curriculum.stages", stages | {"last": STAGE | {"warmup_steps": 2}}))
    assert line == (
        "curriculum.stages.last.warmup_steps=2: must be 0: another elastic stage comes before, and "
        "there is no second warmup"
    )


def test_a_random_parent_is_pretrained_and_a_stored_one_need_not_be() -> None:
    settings = changed("curriculum.stages", {"all": STAGE})
    line = refusal(settings)
    assert line.startswith("curriculum.stages: ") and "pretrain stage" in line
    parse(settings | {"parent": {"path": "somewhere"}}, RunConfig)


def test_a_parent_that_is_built_has_no_tokenizer() -> None:
    settings = changed("data.tokenizer", "parent")
    assert refusal(settings).startswith("data.tokenizer=parent: a parent built from parent.shape")
    parse(settings | {"parent": {"path": "somewhere"}}, RunConfig)


def test_one_process_is_not_many() -> None:
    line = refusal(changed("trainer.devices", 3))
    assert line.endswith("single: must be ddp, zero1, zero2 or zero3 when there are 3 processes")


def test_zero3_without_recomputation_is_refused() -> None:
    """It would hold every weight at once, which is what it is there to avoid."""
    settings = changed("trainer", {"strategy": "zero3", "devices": 2})
    assert refusal(settings).startswith("parent.activation_checkpointing=False: must be true with")
    settings["parent"]["activation_checkpointing"] = True
    parse(settings, RunConfig)


@pytest.mark.parametrize(
    ("trainer", "line"),
    [
        (
            {"micro_batch_tokens": 8},
            f"trainer.micro_batch_tokens=8: must be at least one sequence of {WARM}, 16 tokens",
        ),
        (
            {"strategy": "ddp", "devices": 3},
            f"{WARM}.batch_tokens=64: must be a multiple of 48 = 1 sequence x 3 processes; the "
            "nearest is 48",
        ),
        (
            {"strategy": "ddp", "devices": 100},
            f"{WARM}.batch_tokens=64: must be a multiple of 1600 = 1 sequence x 100 processes; "
            "the nearest is 1600",
        ),
    ],
    ids=["less_than_one", "share", "none_left"],
)
def test_batches_divide_into_forward_passes_of_whole_sequences(
    trainer: dict[str, Any], line: str
) -> None:
    assert refusal(changed("trainer", trainer)) == line


@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 99)),
)
def test_whatever_passes_divides_evenly(
    sequence: int, sequences: int, devices: int, micro: int | None
) -> None:
    """The rule itself, against brute force."""
    settings = changed("trainer", {"strategy": "ddp", "devices": devices})
    settings["trainer"]["micro_batch_tokens"] = micro
    sizes = {"sequence_length": sequence, "batch_tokens": sequence * sequences}
    for stage in settings["curriculum"]["stages"].values():
        stage.update(sizes)
    fits = sequences % devices == 0 and (micro is None or micro >= sequence)
    if fits:
        parse(settings, RunConfig)
    else:
        refusal(settings)


# The other commands


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"dtype": "int8"}, "dtype=int8: must be one of source, float32, bfloat16, float16"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0: must be positive"),
        ({"budget": "???"}, "budget: must be set, for example budget=VALUE"),
    ],
)
def test_extract_settings_are_checked(change: dict[str, Any], line: str) -> None:
    settings = {"checkpoint": "a", "budget": "small", "output": "b"}
    assert parse(settings, ExtractConfig).dtype == "source"
    assert refusal(settings | change, ExtractConfig) == line


@pytest.mark.parametrize(
    "name",
    ["sequences", "sequence_length", "batch_size", "new_tokens", "problems", "answer_tokens"],
)
def test_evaluate_settings_are_checked(name: str) -> None:
    assert parse({"run_dir": "a"}, EvaluateConfig).members is None
    line = refusal({"run_dir": "a", name: 0}, EvaluateConfig)
    assert line == f"{name}=0: must be positive"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tasks": ["algebra"]}, "tasks=algebra: must be one of arithmetic"),
        (
            {"tasks": ["arithmetic"] * 2},
            "tasks=['arithmetic', 'arithmetic']: must be different ones",
        ),
        ({"difficulties": []}, "difficulties=[]: must be at least one"),
        ({"difficulties": [3, 9]}, "difficulties=9: must be from 1 to 8"),
        ({"difficulties": [3, 3]}, "difficulties=[3, 3]: must be different ones"),
    ],
)
def test_tasks_of_evaluate_are_checked(change: dict[str, Any], line: str) -> None:
    assert refusal({"run_dir": "a"} | change, EvaluateConfig) == line


def test_explain_gives_one_line_for_any_error() -> None:
    assert explain(ValueError("first\nsecond")) == "first second"
    assert explain(ValueError()) == "ValueError"
    assert explain(FileExistsError("there")) == "there"
