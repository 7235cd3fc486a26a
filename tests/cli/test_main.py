"""Which command is meant, however it is started; completion; a reader that has left."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.waiting import LIMIT

from elastic.cli.command import quiet_pipe
from elastic.cli.commands import NAMES
from elastic.config import BENCHES


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`, from the repository."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


def elastic(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "elastic", *words, **environment)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (["train"], ["train.py"]),
        (["extract"], ["extract.py"]),
        (["plan"], ["-m", "elastic.plan"]),
        (["evaluate"], ["-m", "elastic.evaluate"]),
        (["bench", "scan"], ["-m", "elastic.bench", "scan"]),
        (["cache-teacher"], ["-m", "elastic.teacher"]),
    ],
)
def test_every_other_way_is_the_same_command(name: list[str], other: list[str]) -> None:
    """Same settings and same help."""
    for asked in (["--cfg", "job"], ["--help"]):
        ours, theirs = elastic(*name, *asked), run(*other, *asked)
        assert ours.stdout == theirs.stdout != ""
        assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "trian: no such command; must be one of train, extract, plan"),
        (["trian"], "did you mean elastic train?"),
        (["experiment=tiny"], "come after it: elastic train experiment=tiny"),
        (["--cfg", "job"], "come after it: elastic train --cfg"),
        (["bench"], "no bench is named; must be one of step"),
        (["bench", "stpe"], "did you mean elastic bench step?"),
        (["bench", "json=x"], "come after it: elastic bench step json=x"),
        (["train", "--speed"], "--speed: no such option"),
        (["train", "data.path=a#b"], "'data.path=\"a#b\"'"),
        (["train", "seed=1,2"], "--multirun"),
        (["train", "experiment=nano_v2_12b", "budgets.7b.params=7e9"], "to add it: +budgets.7b"),
        (["train", "data.path=/my", "texts"], "'data.path=\"/my texts\"'"),
        (["train", "--config-dir", "no/such/folder"], "no/such/folder' not found"),
    ],
)
def test_what_is_meant_is_said_in_one_line(words: list[str], said: str) -> None:
    done = elastic(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_without_anything_it_shows_the_way() -> None:
    assert elastic().stdout == elastic("--help").stdout != ""
    assert elastic("bench", "--help").stdout.startswith("elastic bench NAME")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--cfg", "job"], ["train", "--help"], ["plan"]],
    ids=" ".join,
)
def test_a_reader_that_has_left_is_no_error(words: list[str]) -> None:
    """`| head`: quiet, and the exit code that a shell shows for SIGPIPE."""
    end, ours = os.pipe()
    os.close(end)  # before anything is written: no race with `head`
    try:
        done = subprocess.run(
            [sys.executable, "-m", "elastic", *words],
            cwd=ROOT,
            stdout=ours,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    finally:
        os.close(ours)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error() -> None:
    """Only that of standard output ends quietly."""
    with pytest.raises(BrokenPipeError), quiet_pipe():
        raise BrokenPipeError("of a child process")


def test_hydra_keeps_its_own_help() -> None:
    assert "--multirun" in elastic("train", "--hydra-help").stdout


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("elastic ", set(NAMES)),
        ("elastic tr", {"train"}),
        ("elastic bench ", set(BENCHES)),
        ("elastic train trainer=", {"trainer=cpu", "trainer=gpu"}),
        ("elastic  train seed=1 trainer.dev", {"trainer.devices="}),
        ("elastic plan plan.gpu_g", {"plan.gpu_gib="}),
        ("elastic bench  step sequence_", {"sequence_length="}),
        ("elastic train experiment=nano_v2_12b budgets.9", {"budgets.9b."}),
        ("elastic nonsense ", set()),
        ("elastic train data.path=ä trainer=", set()),
        ("elastic train --speed trainer=", set()),
    ],
)
def test_a_shell_can_complete_commands_and_settings(line: str, choices: set[str]) -> None:
    """What Hydra's script of the shell asks for; a line that cannot be read yet is no error."""
    done = elastic("-sc", "query=bash", COMP_LINE=line)
    assert set(done.stdout.split()) == choices
    assert done.stderr == ""


def test_bash_completes_through_the_script_that_is_installed() -> None:
    script = elastic("-sc", "install=bash").stdout
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "hydra_bash_completion" in script
