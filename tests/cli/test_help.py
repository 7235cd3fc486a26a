"""Help and versions: what is said is true, fits a terminal and needs no torch."""

import shlex
from dataclasses import dataclass, field

import pytest
from hydra import compose, initialize_config_dir

from elastic.cli import help
from elastic.cli.command import CONF
from elastic.cli.commands import COMMANDS, NAMES
from elastic.config import RunConfig, parse
from elastic.config.bench import BENCHES


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_what_a_user_needs(name: str) -> None:
    entry, text = COMMANDS[name], help.about(COMMANDS[name])
    assert len(entry.examples) == 3 and len(entry.settings) >= 4
    for part in (entry.summary, "Examples:", "--cfg job", "--config-dir", "docs/", entry.also):
        assert part in text
    for key in entry.settings:
        assert f"  {key}" in text
    long = [line for line in text.splitlines() if len(line) > help.WIDTH]
    assert all(line.startswith(("  elastic ", "Choices")) for line in long), long


@pytest.mark.parametrize(
    ("name", "typed"),
    [(name, typed) for name, entry in COMMANDS.items() for typed, _ in entry.examples],
)
def test_every_example_passes_the_gate(name: str, typed: str) -> None:
    """As a shell would split it; of a sweep the first job."""
    words = shlex.split(typed)
    if sweep := "--multirun" in words:
        words.remove("--multirun")
    words = [word.split(",")[0] if sweep else word for word in words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose(COMMANDS[name].config, words)
    assert isinstance(parse(raw, COMMANDS[name].schema), COMMANDS[name].schema)


def test_the_overview_names_every_command_and_every_bench() -> None:
    text = help.overview()
    assert all(f"  {name} " in text for name in NAMES)
    assert all(f"  {name} " in help.benches() and name in text for name in BENCHES)
    assert max(len(line) for line in (text + help.benches()).splitlines()) <= help.WIDTH


def test_versions_are_ours_first() -> None:
    first, *others = help.versions().splitlines()
    assert first.startswith("elastic ") and str(CONF.parent) in first
    assert [line.split()[0] for line in others] == ["python", *help.PACKAGES]


@dataclass
class Inner:
    deep: int = 0
    """Bits of it, arXiv 1.2. And more."""


@dataclass
class Outer:
    inner: Inner
    many: dict[str, Inner] = field(default_factory=dict)
    silent: int = 0


def test_settings_are_described_by_the_dataclass_that_declares_them() -> None:
    assert help.describe(Outer, "inner.deep") == "Bits of it, arXiv 1.2"
    assert help.describe(Outer, "many.NAME.deep") == "Bits of it, arXiv 1.2"
    assert help.describe(RunConfig, "trainer.devices") == "Processes per node"
    for unknown in ("silent", "inner.nothing"):
        with pytest.raises(KeyError):
            help.describe(Outer, unknown)
