"""The job scripts without Slurm: headers, what they hand on, when they requeue; and sweeps whose
jobs run elsewhere. `make test-slurm` runs them on a real one.

srun and scontrol are played by scripts: srun drops its own options and runs the rest once.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.waiting import LIMIT
from hydra import compose, initialize_config_dir

from elastic.cli.command import CONF

SLURM = ROOT / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
HARD = ["a=1", "b=[1, 2,{x: 'y z'}]", "c='/a b/*.py'", "~d", "e=$HOME`ls`", 'f="q"', "g=\\n", "+h="]
"""Overrides that one shell too many would change."""

PROGRAMS = {
    "srun": 'echo "srun $*" >>calls; while [[ $1 == --* ]]; do shift; done; "$@"',
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "$*" >>calls; fi',
    "fake_python": 'printf "%s\\0" "$@" >arguments; env >environment; exit "${EXIT:-0}"',
}
Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Run a script as the first node of a job would; what it did lies in `tmp_path`."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("train.py", "extract.py"):
        (tmp_path / name).touch()
    (tmp_path / "slurm").symlink_to(SLURM)

    def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        job = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "fake_python"),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
        }
        command = ["bash", str(SLURM / script), *arguments]
        return subprocess.run(
            command, env={**ours, **job, **variables}, capture_output=True, text=True, check=False
        )

    return run


def arguments(folder: Path) -> list[str]:
    """What the program in place of Python was called with."""
    return (folder / "arguments").read_text().split("\0")[:-1]


def header(script: Path) -> dict[str, str]:
    """The options that sbatch reads."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)=?([^ \n]*)", script.read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_headers_ask_for_what_requeueing_needs() -> None:
    """A sweep's runs are asked for, signalled and logged like a single one."""
    train, sweep = header(SLURM / "train.sbatch"), header(SLURM / "sweep.sbatch")
    for asked in (train, sweep):
        del asked["job-name"], asked["output"]
    assert train == sweep
    assert train["signal"] == "USR1@300" and train["open-mode"] == "append" and "requeue" in train
    assert train["ntasks-per-node"] == train["gpus-per-node"]


def test_train_hands_overrides_on_untouched(submit: Submit, tmp_path: Path) -> None:
    assert submit("train.sbatch", *HARD).returncode == 0
    given = arguments(tmp_path)
    assert given[:-2] == ["train.py", *HARD]
    assert given[-2:] == ["trainer.num_nodes=2", "trainer.devices=4"]


def test_train_says_where_processes_meet(submit: Submit, tmp_path: Path) -> None:
    submit("train.sbatch")
    environment = (tmp_path / "environment").read_text().splitlines()
    assert "MASTER_ADDR=node7" in environment
    assert "MASTER_PORT=13456" in environment
    assert "--kill-on-bad-exit=1" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("code", [0, 1, 2, 75, 138, 143])
@pytest.mark.parametrize("restarts", ["", "2", "3"])
def test_only_the_signal_requeues(code: int, restarts: str, submit: Submit, tmp_path: Path) -> None:
    """Exit codes of the signal, and not for ever; any other code is the job's own."""
    variables = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    result = submit("train.sbatch", EXIT=str(code), MAX_RESTARTS="3", **variables)
    requeued = "requeue 123456" in (tmp_path / "calls").read_text().splitlines()
    assert requeued == (code in (75, 138) and restarts != "3")
    assert result.returncode == (0 if requeued else 75 if code == 138 else code)


def test_a_task_that_stopped_with_a_checkpoint_does_not_take_the_others_down(
    submit: Submit, tmp_path: Path
) -> None:
    """srun, which ends all tasks when one fails, must not see 75."""
    (tmp_path / "srun").write_text(
        f"#!/usr/bin/env bash\n{PROGRAMS['srun']}\necho $? >seen\nexit 137\n"
    )
    result = submit("train.sbatch", EXIT="75")
    assert (tmp_path / "seen").read_text().strip() == "0"
    assert "requeued" in result.stdout and result.returncode == 0


def test_scripts_say_where_to_submit(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "train.py").unlink()
    for result in (submit("train.sbatch"), submit("extract.sbatch", PYTHON="nowhere")):
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1 and "from the repository" in result.stderr


def test_extract_hands_overrides_on_untouched(submit: Submit, tmp_path: Path) -> None:
    assert submit("extract.sbatch", *HARD, EXIT="1").returncode == 1
    assert arguments(tmp_path) == ["extract.py", *HARD]


def test_sweep_takes_its_line(submit: Submit, tmp_path: Path) -> None:
    """Common settings, the run's directory, then the line; one task is requeued, not the array."""
    (tmp_path / "some seeds.txt").write_text(f"seed=0\n{shlex.join(HARD)}\n")
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2", "RUNS": "/shared"}
    submit("sweep.sbatch", "some seeds.txt", "x=[1, 2]", EXIT="75", **array)
    directory = "run_dir='/shared/some seeds/2'"
    assert arguments(tmp_path)[:-2] == ["train.py", "x=[1, 2]", directory, *HARD]
    assert "requeue 9_2" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    "given", [[], ["no.txt"], ["seeds.txt"]], ids=["nothing", "no file", "gap"]
)
def test_sweep_without_its_line_is_one_line(
    given: list[str], submit: Submit, tmp_path: Path
) -> None:
    (tmp_path / "seeds.txt").write_text("seed=0\n\nseed=2\n")
    result = submit("sweep.sbatch", *given, SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_JOB_ID="9")
    assert result.returncode == 2 and not (tmp_path / "arguments").exists()
    assert len(result.stderr.splitlines()) == 1 and "1-N" in result.stderr


def sweep(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """python train.py --multirun"""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--multirun", *overrides],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_the_launcher_asks_for_what_the_trainer_uses() -> None:
    asked = ["hydra/launcher=slurm", "trainer.devices=4", "trainer.num_nodes=3"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("train", asked, return_hydra_config=True).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (3, 4, 4)
    assert any("MASTER_ADDR" in line for line in launcher.setup)


def test_a_launcher_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()  # hides all plugins
    result = sweep("hydra/launcher=slurm", "seed=0,1", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "pip install hydra-submitit-launcher" in result.stderr


def test_a_machine_without_slurm_is_one_line(tmp_path: Path) -> None:
    where = f"hydra.sweep.dir={tmp_path}/sweep"
    result = sweep("hydra/launcher=slurm", where, "seed=0,1", PATH=str(tmp_path))
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "srun" in result.stderr and "Traceback" not in result.stderr


def test_a_setting_that_only_the_job_refuses_comes_back(tmp_path: Path) -> None:
    """Jobs are pickled, run in a process of their own, and say there what is wrong."""
    where = f"hydra.sweep.dir={tmp_path}/sweep"
    result = sweep("hydra/launcher=submitit_local", where, "space.ffn=[512,600]", "seed=0,1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "exit code 2; its log is" in result.stderr
    log = re.search(r"its log is (.*)$", result.stderr, re.MULTILINE)
    assert log is not None
    errors = Path(log[1]).with_suffix(".err").read_text() + Path(log[1]).read_text()
    assert "space.ffn=[512, 600]: must be strictly descending" in errors
