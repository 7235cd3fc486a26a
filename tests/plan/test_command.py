"""`python -m elastic.plan` as a user runs it: text, JSON, errors, and no torch."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from plan.test_fit import made, plan_settings

from elastic.cli.command import CONF
from elastic.config import PlanConfig, RunConfig
from elastic.config.plan import PlanSettings
from elastic.parent.stock import stock_config
from elastic.plan.text import describe
from elastic.plan.work import find_shape

ROOT = CONF.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elastic.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_prints_and_writes_the_same_plan(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.json"
    wasteful = ["trainer.strategy=zero2", "objective.teacher=replicated"]
    wasteful += [f"curriculum.stages.{stage}.draws=1" for stage in ("short", "long")]
    done = run("experiment=nano_v2_12b", *wasteful, "plan.gpus=[8]", f"json={path}")
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads(path.read_text())
    assert done.stdout == describe(written) + "\n"
    assert [entry["gpus"] for entry in written["memory"]["gpus"]] == [8, 128]
    assert done.stdout.startswith("Plan of nano_v2_12b: DOES NOT FIT on 128 GPUs\n")
    for words in ("12,310,001,152", "8 GPUs", "It fits with", "GiB", "it fits with"):
        assert words in done.stdout
    changes = "trainer.strategy=zero3 objective.teacher=zero3"
    command = written["verdict"]["command"]
    assert " experiment=nano_v2_12b " in command and command.endswith(f" {changes}")


@pytest.mark.parametrize("name", ["nano_v2_12b", "nano_v2_9b"])
def test_the_published_experiments_fit_their_gpus(name: str) -> None:
    """As they are configured: users start from them."""
    configured = made(f"experiment={name}")["memory"]["configured"]
    assert configured["gpus"] == 128 and configured["fits"]


def test_an_unreachable_budget_is_one_line_and_exit_code_2() -> None:
    done = run("budgets.small.params=0.01")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: budgets.small: no combination of space is within")
    assert done.stderr.count("\n") == 1


def test_impossible_assumptions_are_refused() -> None:
    for override, key in (
        ("plan.utilisation=1.5", "plan.utilisation"),
        ("plan.reserve_gib=100", "plan.reserve_gib"),
        ("plan.gpus=[0]", "plan.gpus"),
        ("plan.price_per_gpu_hour=-1", "plan.price_per_gpu_hour"),
    ):
        with pytest.raises(ValueError, match=key):
            plan_settings(override)


def test_planning_imports_no_torch() -> None:
    code = "import sys, elastic.plan.work, elastic.plan.text; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_parent_without_announced_sizes_is_read_from_its_config(tmp_path: Path) -> None:
    """config.json alone: no weights are there."""
    config = plan_settings("experiment=nano_v2_12b")
    shape = config.parent.shape
    assert shape is not None
    (tmp_path / "config.json").write_text(json.dumps(stock_config(shape)))
    config.parent.shape, config.parent.path = None, str(tmp_path)
    assert find_shape(config) == shape


def test_the_settings_are_spelled_out() -> None:
    written = OmegaConf.load(CONF / "plan.yaml")
    run_settings = {field.name for field in fields(RunConfig)}
    own = {field.name for field in fields(PlanConfig)} - run_settings
    assert set(map(str, written)) - {"defaults"} == own
    assert set(map(str, written.plan)) == {field.name for field in fields(PlanSettings)}
