"""Every command that README.md and docs/ show is true: see helpers/shown.py.

In `make test` the settings of all are checked; `make test-long` runs them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.copies import checkout
from helpers.forked import Forked
from helpers.shown import Shown, everywhere, look_at, ours, pages, shown
from hydra.errors import HydraException

from elastic.cli.commands import NAMES
from elastic.config import ConfigError

COMMANDS = everywhere()
ONCE = [
    command
    for place, command in enumerate(COMMANDS)
    if command.kind == "" and command.text not in {other.text for other in COMMANDS[:place]}
]
"""Commands to run; several pages show the same."""

SMALLER = {
    "curriculum/tiny.yaml": {
        "stages.pretrain.tokens": 4096,
        "stages.pretrain.sequence_length": 64,
        "stages.pretrain.batch_tokens": 1024,
        "stages.short.tokens": 3072,
        "stages.short.sequence_length": 64,
        "stages.short.batch_tokens": 512,
        "stages.long.tokens": 2048,
        "stages.long.sequence_length": 128,
        "stages.long.batch_tokens": 512,
    },
    "curriculum/tiny_reasoning.yaml": {
        "stages.pretrain.tokens": 4096,
        "stages.pretrain.sequence_length": 512,
        "stages.pretrain.batch_tokens": 1024,
        "stages.short.tokens": 3072,
        "stages.short.sequence_length": 64,
        "stages.short.batch_tokens": 512,
        "stages.long.tokens": 2048,
        "stages.long.sequence_length": 512,
        "stages.long.batch_tokens": 512,
    },
    "data/arithmetic.yaml": {"sources.short.problems": 200, "sources.long.problems": 100},
    "importance/tiny.yaml": {
        "samples": 4,
        "sequence_length": 64,
        "depth_samples": 2,
        "depth_sequence_length": 64,
        "depth_positions": 16,
    },
    "data/stdlib.yaml": {"validation_sequences": 2},
    "data/base.yaml": {"validation_sequences": 2},
    "evaluate.yaml": {"sequences": 2, "sequence_length": 64, "new_tokens": 4},
    "cache_teacher.yaml": {"cache.batch_tokens": 1024},
}
"""Settings of a checkout in which everything takes seconds: not on the command line, where they
would hide what a reader's command collides with."""


def reduce(conf: Path) -> None:
    """Make a checkout's settings small."""
    for name, changes in SMALLER.items():
        path = conf / name
        text = path.read_text()
        header = "".join(line + "\n" for line in text.splitlines() if line.startswith("# @package"))
        values = yaml.safe_load(text)
        for key, value in changes.items():
            *outer, last = key.split(".")
            entry = values
            for part in outer:
                entry = entry[part]
            assert last in entry, f"{name}: {key} is not there"
            entry[last] = value
        path.write_text(header + yaml.safe_dump(values, sort_keys=False))
    for name in ("step", "run", "profile", "scan", "data"):
        path = conf / "bench" / f"{name}.yaml"
        lines = [line.split("#")[0].rstrip() for line in path.read_text().splitlines()[1:]]
        text = "\n".join(["# @package _global_", *lines])
        smaller = {
            "/parent: medium": "/parent: tiny",
            "/space: medium": "/space: tiny",
            "sequence_length: 512": "sequence_length: 64",
            "sequences: 4": "sequences: 2",
            "batch_tokens: 2048": "batch_tokens: 128",
            "square: 2048": "square: 128",
            "memory: true": "memory: false",
            "time: 2048": "time: 64",
            "time: 256": "time: 64",
            "megabytes: 100": "megabytes: 1",
            "loader_workers: [0, 1, 2]": "loader_workers: [0, 1]",
        }
        for large, small in smaller.items():
            text = text.replace(large, small)
        for key in ("repeats", "steps", "warmup"):
            text = "\n".join(
                f"{key}: 1" if line.startswith(f"{key}:") else line for line in text.splitlines()
            )
        path.write_text(text + "\n")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """A checkout in which the commands of `make demo` have been run, small."""
    directory = checkout(tmp_path_factory.mktemp("docs") / "elastic")
    reduce(directory / "conf")
    with Forked(directory) as forked:
        for command in (
            "python train.py run_dir=runs/tiny",
            *(
                f"python extract.py checkpoint=runs/tiny/elastic budget={name} "
                f"output=runs/tiny/members/{name}"
                for name in ("medium", "small")
            ),
            "elastic evaluate run_dir=runs/tiny members=runs/tiny/members",
        ):
            run(forked, Shown("Makefile", "", command))
        yield forked


def run(forked: Forked, command: Shown) -> str:
    """Run a command as a reader would."""
    code, output = forked.run(command.words, command.environment)
    assert code == 0, f"{command}\n{output[-3000:]}"
    return output


def test_there_are_commands_in_readme_and_in_the_guides() -> None:
    assert len({command.file for command in COMMANDS}) > 8
    assert {command.kind for command in COMMANDS} == {"", "parse", "needs=gpu", "needs=cluster"}


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=str)
def test_its_settings_are_good(command: Shown) -> None:
    look_at(command)


@pytest.mark.parametrize(
    "command",
    dict.fromkeys(command for command in COMMANDS if command.kind.startswith("needs=")),
    ids=str,
)
def test_it_comes_to_the_start_of_training_where_there_are_gpus(command: Shown) -> None:
    """Batches of so many processes, sizes of all budgets, memory: as `elastic plan` has them."""
    own = ours(command)
    assert own is not None
    own.check()


@pytest.mark.slow
def test_every_command_runs(demo: Forked) -> None:
    """In the order of the pages: one may use what an earlier one has made."""
    failed = []
    for command in ONCE:
        try:
            run(demo, command)
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("python train.py router.freeze=0.3", "router.freeze"),
        ("python train.py curriculum.stages.long.batch_tokens=1000", "batch_tokens"),
        ("python trian.py", "no such script"),
        ("elastic extrakt budget=small", "has no extrakt"),
        ("elastic bench steps", "no such bench"),
        ("elastic plan experiment=nano_v3", "nano_v3"),
        ("sbatch slurm/trian.sbatch", "there is no slurm/trian.sbatch"),
        ("make tset", "make has no tset"),
        ("ls", "what is ls"),
    ],
)
def test_a_mistake_in_a_command_is_seen(text: str, fault: str) -> None:
    with pytest.raises((AssertionError, ConfigError, HydraException)) as caught:
        look_at(Shown("README.md", "", text))
    assert fault in str(caught.value)


def test_a_collision_of_run_directories_is_seen(demo: Forked) -> None:
    with pytest.raises(AssertionError, match="was started with"):
        run(demo, Shown("README.md", "", "python train.py seed=7"))


def test_a_batch_that_eight_processes_cannot_share_is_seen() -> None:
    own = ours(
        Shown(
            "x.md",
            "needs=gpu",
            "python train.py trainer=gpu trainer.devices=8 curriculum.stages.short.draws=1",
        )
    )
    assert own is not None
    with pytest.raises(ConfigError, match="must be a multiple of 8192"):
        own.check()


def test_blocks_and_directives_are_read(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "# Page\n\n```sh\npython train.py \\\n    seed=1  # once\n\n# no command\nA=1 make demo\n"
        "```\n\n<!-- run: parse -->\n```sh\nmake test\n```\n\n```python\nimport os\n```\n"
    )
    assert shown(tmp_path / "page.md") == [
        Shown("page.md", "", "python train.py seed=1"),
        Shown("page.md", "", "A=1 make demo"),
        Shown("page.md", "parse", "make test"),
    ]
    assert shown(tmp_path / "page.md")[1].environment == {"A": "1"}
    (tmp_path / "page.md").write_text("<!-- run: never -->\n```sh\nmake test\n```\n")
    with pytest.raises(AssertionError, match="run: never"):
        shown(tmp_path / "page.md")


def test_no_command_hides_in_an_indented_block() -> None:
    """Where it would not be tried."""
    programs = ("python", "make", "sbatch", "torchrun", *(f"elastic {name}" for name in NAMES))
    starts = tuple(f"    {program} " for program in programs)
    for path in pages():
        outside = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        hidden = [line for line in outside.splitlines() if line.startswith(starts)]
        assert not hidden, f"{path.name}: {hidden}"
