"""A study as a user runs it, at the smallest size; what is done is not done again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

SIZE = [
    "study=quick",
    'study.settings=["debug=one_step","data=files","data.tokenizer=train","data.path=\'elastic/config/*.py\'",'
    '"data.validation_every=2"]',
    "study.sequences=8",
    "study.sequence_length=64",
    "threads=1",
]


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    places = [f"{name}='{directory / name}'" for name in ("dir", "results", "output")]
    command = [sys.executable, "-m", "elastic.study", *SIZE, *places, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    ended = run(directory, "jobs=2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return directory


def records(directory: Path) -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_text()) for path in (directory / "results").iterdir()}


def test_every_run_has_its_figures_and_the_table_its_rows(done: Path) -> None:
    found = list(records(done).values())
    runs = {(value["arm"], value["seed"], value["alone"]) for value in found}
    assert runs == {
        ("elastic", 0, None), ("separate", 0, "medium"), ("separate", 0, "small"),
        ("untrained", 0, None),
    }  # fmt: skip
    by_arm = {value["arm"]: value for value in found}
    untrained = by_arm["untrained"]["members"]
    assert abs(sum(untrained["full"]["kl"])) < 1e-3, "the whole parent, unchanged"
    for value in found:
        assert sum(value["documents"]) == 8 * 64
        for member in value["members"].values():
            assert len(member["kl"]) == len(member["loss"]) == len(value["documents"])
    family = {n: each["architecture"] for n, each in by_arm["elastic"]["members"].items()}
    for value in found:
        for name, member in value["members"].items():
            assert member["architecture"] == family[name], "of what the first arm has frozen"
    table = (done / "output" / "quick.md").read_text()
    assert all(name in table for name in ("elastic", "separate", "untrained"))


def test_runs_are_not_left_behind(done: Path) -> None:
    left = [path.name for path in (done / "dir" / "tiny").iterdir() if path.is_dir()]
    assert left == ["parent"]


def test_what_is_done_is_not_done_again(done: Path, tmp_path: Path) -> None:
    """The same command prints the same table; a figure that is gone is measured again."""
    again = tmp_path / "again"
    shutil.copytree(done, again)
    before = records(again)
    table = (again / "output" / "quick.md").read_text()
    gone = next(path for path, value in before.items() if value["alone"] == "small")
    gone.unlink()
    ended = run(again)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "separate-0-small: KL small" in ended.stdout
    assert "elastic-0" not in ended.stdout
    after = records(again)
    assert after.keys() == before.keys()
    same = after[gone] | {"seconds": 0} == before[gone] | {"seconds": 0}
    assert same, "bit for bit, on one thread"
    figures = [line for line in table.splitlines() if "+-" in line]
    assert figures and all(line in ended.stdout for line in figures)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ('elastic.settings=["space.hidden=[999]"]', "space.hidden=[999]: 999 is larger than the"),
        ('untrained.settings=["router.candidates=0"]', "router.candidates=0: must be in [1, 64]"),
        ('separate.settings=["router.candidate=1"]', "router.candidate: unknown; must be one of"),
    ],
)
def test_a_setting_that_training_refuses_is_one_line(
    tmp_path: Path, override: str, line: str
) -> None:
    """Of any arm, before anything is trained but the parent."""
    ended = run(tmp_path, f"study.arms.{override}")
    assert ended.returncode == 2
    *_, last = ended.stderr.splitlines()  # the parent's bar is before it
    assert last.startswith(f"error: {line}")
    assert "Traceback" not in ended.stderr and not (tmp_path / "results").exists()
