"""Every YAML under conf/ composes, passes the gate, and says what it claims to."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from elastic.config import BENCHES, EvaluateConfig, ExtractConfig, RunConfig, parse
from tests.runs import CONF, settings

GROUPS = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "debug", "bench")
)
REAL = ["parent=pretrained", "parent.path=DIR", "curriculum=two_stage"]
"""What options for a real parent go with."""
WITH = {
    ("parent", "pretrained"): REAL[1:],
    ("curriculum", "two_stage"): REAL[:2],
    ("data", "files"): [*REAL, "data.path=texts/*.jsonl"],
    ("data", "hub"): [*REAL, "data.path=owner/name"],
    ("trainer", "gpu"): REAL,
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
            if "defaults" not in written:
                assert set(map(str, written)) == names, path


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


def test_the_published_curriculum_is_that_of_the_paper() -> None:
    """arXiv 2511.16664, section 4: lengths, batches in sequences, how often each budget comes."""
    short, long = settings(Path("unused"), *REAL).curriculum.stages.values()
    assert (short.sequence_length, short.batch_tokens // short.sequence_length) == (8192, 1536)
    assert (long.sequence_length, long.batch_tokens // long.sequence_length) == (49_152, 512)
    assert short.tokens + long.tokens == 110_000_000_000
    assert short.budget_probabilities is None
    assert list((long.budget_probabilities or {}).values()) == [0.5, 0.3, 0.2]
