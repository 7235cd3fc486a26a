"""Every YAML under conf/ composes, passes the gate, and says what it claims to."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.runs import CONF, settings
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from elastic.bench.subjects import balanced_members
from elastic.config import BENCHES, DataConfig, EvaluateConfig, ExtractConfig, RunConfig, parse
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.targets import check_reachable, targets_of

GROUPS = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "debug", "bench", "study") and path.stem != "base"
)
NANO = ("nano_v2_12b", "nano_v2_9b")
RANDOM = ("1b", "3b")
REAL = ["experiment=nano_v2_12b"]
"""What options for a real parent go with."""
WITH = {
    ("parent", "pretrained"): [*REAL, "parent.path=DIR"],
    ("data", "files"): [*REAL, "data.path=texts/*.jsonl"],
    ("data", "hub"): [*REAL, "data.path=owner/name"],
    ("data", "nano3_blend"): [*REAL, "data.path=null"],
    ("data", "nano_v2_blend"): [*REAL, "data.path=null"],
    ("curriculum", "tiny_reasoning"): ["data=arithmetic"],
    ("trainer", "gpu"): REAL,
    **{
        (group, name): [f"{other}={name}", "data.tokenizer_vocab=131072"]
        for name in RANDOM
        for group, other in (("parent", "space"), ("space", "parent"))
    },
    ("space", "heterogeneous"): REAL,
    **{
        (group, name): [f"experiment={name}"]
        for group in ("parent", "space", "budgets", "curriculum")
        for name in NANO
    },
}


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_of_every_group_passes_the_gate(group: str, option: str) -> None:
    """Unknown keys and impossible values in our own files would stop here."""
    config = settings(Path("unused"), f"{group}={option}", *WITH.get((group, option), []))
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("option", sorted(path.stem for path in CONF.glob("debug/*.yaml")))
def test_every_debug_preset_passes_the_gate(option: str) -> None:
    assert settings(Path("unused"), f"debug={option}").name == "debug"


def test_every_setting_is_spelled_out_in_the_files() -> None:
    """A setting that no file mentions cannot be overridden without a plus sign."""
    for group in ("space", "importance", "router", "objective", "data", "optim", "trainer"):
        config = getattr(settings(Path("unused")), group)
        names = {field.name for field in dataclasses.fields(config)}
        for path in (CONF / group).glob("*.yaml"):
            written = OmegaConf.load(path)
            if "defaults" not in written and path.stem != "base":
                assert set(map(str, written)) == names, path
    base = set(map(str, OmegaConf.load(CONF / "data" / "base.yaml")))
    assert base | {"sources"} == {field.name for field in dataclasses.fields(DataConfig)}


@pytest.mark.parametrize(
    ("command", "schema"), [("extract", ExtractConfig), ("evaluate", EvaluateConfig)]
)
def test_commands_spell_their_settings_out(command: str, schema: type) -> None:
    written = set(map(str, OmegaConf.load(CONF / f"{command}.yaml")))
    assert written - {"defaults", "hydra"} == {field.name for field in dataclasses.fields(schema)}


@pytest.mark.parametrize("name", sorted(BENCHES))
def test_benches_spell_their_settings_out(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose(f"bench/{name}")
    assert set(map(str, raw)) == {field.name for field in dataclasses.fields(BENCHES[name])}
    assert isinstance(parse(raw, BENCHES[name]), BENCHES[name])


@pytest.mark.parametrize("name", NANO)
def test_the_published_curriculum_is_that_of_the_paper(name: str) -> None:
    """arXiv 2511.16664, section 4: lengths, batches in sequences, how often each budget comes."""
    config = settings(Path("unused"), f"experiment={name}")
    short, long = config.curriculum.stages.values()
    assert (short.sequence_length, short.batch_tokens // short.sequence_length) == (8192, 1536)
    assert (long.sequence_length, long.batch_tokens // long.sequence_length) == (49_152, 512)
    assert short.tokens + long.tokens == 110_000_000_000
    assert short.budget_probabilities is None
    assert list((long.budget_probabilities or {}).values()) == [0.5, 0.3, 0.2]
    assert list(config.budgets) == list(long.budget_probabilities or {})


@pytest.mark.parametrize(
    ("name", "parent"), [("nano_v2_12b", 12_310_001_152), ("nano_v2_9b", 8_888_227_328)]
)
@pytest.mark.parametrize("layered", [False, True])
def test_the_published_parents_and_their_families_are_reachable(
    name: str, parent: int, layered: bool
) -> None:
    """Law 4 at full size; the space meets every budget, whatever the ranking of the layers."""
    config = settings(Path("unused"), f"experiment={name}")
    shape = config.parent.shape
    assert shape is not None and parameters(shape, Architecture.full(shape)) == parent
    config.space.heterogeneous = ["ffn", "mamba_heads"] if layered else []
    space, targets = Space.build(config.space, shape), targets_of(config.budgets, shape)
    assert list(targets) == list(config.budgets) and targets[list(targets)[0]].values == [parent]
    check_reachable(space, targets, config.importance, config.space.tolerance, config.space.nested)


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_parent_for_benches_is_a_smaller_9b_of_the_size_that_it_states(name: str) -> None:
    """Its members of the benches' shares are in its space."""
    path = CONF / "parent" / f"{name}.yaml"
    stated = re.search(r"([\d,]+) parameters", path.read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raws = {
            bench: compose(f"bench/{bench}", [f"parent={name}", f"space={name}"])
            for bench in ("step", "run", "profile")
        }
    configs = {bench: parse(raw, BENCHES[bench]) for bench, raw in raws.items()}
    shape = configs["step"].parent.shape
    assert stated is not None
    assert int(stated[1].replace(",", "")) == parameters(shape, Architecture.full(shape))
    whole = settings(Path("unused"), "experiment=nano_v2_9b").parent.shape
    assert whole is not None
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    same = {width: getattr(whole, width) for width in (*widths, "mamba_num_heads")}
    assert replace(shape, **same) == whole
    assert shape.intermediate_size / shape.hidden_size == 3.5 == 15_680 / 4480
    assert shape.num_attention_heads == 5 * shape.num_key_value_heads
    heads = 128 * shape.hidden_size / 4480
    assert abs(shape.mamba_num_heads - heads) <= 4, "the nearest multiple of the groups, or above"
    for bench in ("step", "run"):
        smaller = [share for share in configs[bench].shares if share < 1]
        assert len(balanced_members(configs[bench].space, shape, smaller)) == len(smaller) > 1


def test_heterogeneous_is_the_12b_space_layer_by_layer() -> None:
    layered = settings(Path("unused"), *REAL, "space=heterogeneous").space
    assert layered.heterogeneous == ["ffn", "mamba_heads"]
    layered.heterogeneous = []
    assert layered == settings(Path("unused"), *REAL).space


def test_the_4b_that_was_published_lies_in_the_space_of_the_9b() -> None:
    """Nemotron 3 Nano 4B: its sizes are choices, and its parameters are the budget's."""
    config = settings(Path("unused"), "experiment=nano_v2_9b")
    shape, space = config.parent.shape, config.space
    assert shape is not None
    sizes = {"hidden": 3136, "ffn": 12_544, "mamba_heads": 96, "depth": 42}
    assert all(size in getattr(space, axis) for axis, size in sizes.items())
    member = replace(
        shape,
        pattern="M" * 21 + "-" * 17 + "*" * 4,
        hidden_size=3136,
        intermediate_size=12_544,
        mamba_num_heads=96,
    )
    size = parameters(member, Architecture.full(member))
    assert abs(size - config.budgets["4b"].params) <= 0.001 * size


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("group", ["curriculum", "budgets", "space"])
def test_every_line_of_the_published_experiments_has_its_source(name: str, group: str) -> None:
    """A value without a comment beside it is neither the paper's nor marked as a guess."""
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
    plain = [x for x in lines if ":" in x and "#" not in x and not x.rstrip().endswith(":")]
    assert not plain


@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (2, 1), (8, 1), (8, 2), (8, 4), (8, 8)])
def test_the_medium_experiment_runs_on_up_to_64_gpus(devices: int, nodes: int) -> None:
    """What the examples for GPUs and clusters name; the tiny batch is too small for them."""
    place = [f"trainer.devices={devices}", f"trainer.num_nodes={nodes}"]
    if devices * nodes > 16:
        place.append("curriculum.stages.long.draws=1")
    config = settings(Path("unused"), "experiment=medium", *place)
    assert config.trainer.world_size == devices * nodes and config.trainer.accelerator == "gpu"
    check_reachable(
        Space.build(config.space, config.parent.shape),  # type: ignore[arg-type]
        targets_of(config.budgets, config.parent.shape),  # type: ignore[arg-type]
        config.importance,
        config.space.tolerance,
        config.space.nested,
    )
