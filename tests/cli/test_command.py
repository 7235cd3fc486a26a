"""The command line as a user meets it: one line, exit code 2, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT
from helpers.waiting import LIMIT
from safetensors.torch import load_file


def train(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.speed=1", ["trainer.speed", "log_every"]),
        ("seed=abc", ["seed", "abc", "Integer"]),
        ("experiment=huge", ["experiment/huge", "tiny"]),
        ("space.ffn=[]", ["space.ffn=[]", "non-empty"]),
        ("space.ffn=[512,600]", ["space.ffn=[512, 600]", "descending"]),
        (
            "curriculum.stages.long.budget_probabilities.full=0.9",
            ["curriculum.stages.long.budget_probabilities", "sum to 1"],
        ),
        (
            "+curriculum.stages.short.budget_probabilities.huge=0.0",
            ["curriculum.stages.short.budget_probabilities=", "huge is no budget"],
        ),
        ("parent=pretrained", ["parent.path"]),
        ("nonsense here", ["nonsense here", "key=value"]),
    ],
)
def test_a_bad_setting_is_one_line_and_leaves_nothing(
    override: str, words: list[str], tmp_path: Path
) -> None:
    """Stops before torch is even imported."""
    result = train(f"run_dir={tmp_path}/run", override)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "run").exists()


def test_budgets_named_by_a_number_can_be_set_on_the_command_line() -> None:
    """Hydra's keys cannot begin with a digit; those of the published family do."""
    result = train("experiment=nano_v2_12b", "budgets.6b.params=6.1e9", "--cfg", "job")
    budgets = yaml.safe_load(result.stdout)["budgets"]
    assert {name: float(budget["params"]) for name, budget in budgets.items()} == {
        "12b": 1.0,
        "9b": 9.0e9,
        "6b": 6.1e9,
    }
    wrong = train("experiment=nano_v2_12b", "budgets.7b.params=7e9")
    assert wrong.returncode == 2 and "budgets" in wrong.stderr


def test_the_whole_configuration_can_be_printed() -> None:
    result = train("--cfg", "job")
    assert result.returncode == 0
    assert "temperature_end: 0.05" in result.stdout and "run_dir: runs/${name}" in result.stdout


def test_multirun_gives_every_job_its_own_directory(tmp_path: Path) -> None:
    result = train(
        "--multirun",
        f"hydra.sweep.dir={tmp_path}/sweep",
        "debug=one_step",
        "data=files",
        "data.tokenizer=train",
        f"data.path='{ROOT}/elastic/*/*.py'",
        "seed=1,2",
    )
    assert result.returncode == 0, result.stderr
    seeds = [
        yaml.safe_load((tmp_path / "sweep" / job / "config.yaml").read_text())["seed"]
        for job in ("0", "1")
        if (tmp_path / "sweep" / job / "elastic" / "elastic.json").is_file()
    ]
    assert seeds == [1, 2]


SHARED = [
    "curriculum.stages.short.budgets_per_batch=3",
    "curriculum.stages.long.budgets_per_batch=2",
    "curriculum.stages.long.budget_probabilities={full:0.5,medium:0.3,small:0.2}",
    "objective.teacher=in_place",
    "objective.cross_entropy_weight=0.5",
]


@pytest.mark.parametrize("several", [[], SHARED], ids=["one_budget", "several_budgets"])
def test_two_processes_train_what_one_does(several: list[str], tmp_path: Path) -> None:
    """Same batch, same draws on both ranks (law 8), soft and sliced: equal within float32."""
    text = ["data=files", "data.tokenizer=train", f"data.path='{Path(json.__file__).parent}/*.py'"]
    # A full member that is its teacher has no gradient but rounding: no step is made of that.
    common = ["debug=one_step", *text, "data.validation_every=2", "optim.eps=1e-4", *several]
    for name, extra in {
        "one": [],
        "two": ["trainer.strategy=ddp", "trainer.devices=2"],
    }.items():
        result = train(f"run_dir={tmp_path}/{name}", *common, *extra)
        assert result.returncode == 0, result.stderr
    one, two = (load_file(tmp_path / n / "elastic" / "model.safetensors") for n in ("one", "two"))
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < 1e-5, name
