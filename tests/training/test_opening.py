"""What a run prints before torch is imported: one screen, on the first process alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.terminal import Screen, run_on_terminal
from hydra import compose, initialize_config_dir

from elastic.config import ConfigError, RunConfig, parse
from elastic.parent.stock import stock_config
from elastic.training.opening import opening, show


def config_of(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("train", list(overrides)), RunConfig)


def text_of(*overrides: str) -> str:
    return "\n".join(opening(config_of(*overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=tiny_heterogeneous"],
        ["experiment=nano_v2_12b"],
        ["experiment=nano_v2_9b"],
        ["parent=pretrained", "parent.path=some/model"],
    ],
)
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_it_is_a_screen_of_80_columns(
    overrides: list[str], begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in runs/ of the checkout."""
    monkeypatch.chdir(tmp_path)
    config = config_of(*overrides)
    if begun:
        (tmp_path / config.run_dir / "checkpoints" / "one").mkdir(parents=True)
    lines = opening(config)
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith(" ") for line in lines)


def test_it_says_what_runs_on_what_for_how_long_and_where() -> None:
    text = text_of("run_dir=some/where")
    for words in (
        "trained here from a random start",
        "1,223,240 parameters, 8 layers: 3 mamba, 4 mlp, 1 attention",
        "the source code of this Python's own library",
        "tokenizer: trained on the text, 1,024 tokens",
        "the frozen parent, on every device",
        "1 process, CPU, 32-true",
        "2.949M tokens in 1,440 steps in all",
        "some/where/ (elastic/, checkpoints/, metrics.csv)",
        "a checkpoint every 100 steps; the same command resumes",
    ):
        assert words in text
    rows = [line.split() for line in text.splitlines()]
    assert ["medium", "917,430", "parameters", "75.0%"] in rows
    assert ["long", "elastic", "368.6k", "180", "1,024", "2,048", "2:", "10/50/40%"] in rows


def test_a_cluster_is_named_in_processes_and_nodes() -> None:
    text = text_of("experiment=nano_v2_12b", "data.path=corpus/*.parquet")
    assert "128 processes on 16 nodes, GPU, zero3, bf16-mixed" in text
    assert "12,310,001,152 parameters, 62 layers: 28 mamba, 28 mlp, 6 attention" in text
    assert "partitioned over the processes (zero3)" in text
    assert "files corpus/*.parquet" in text and "tokenizer: the parent's" in text


def test_sizes_of_a_local_checkpoint_are_read_from_its_config(tmp_path: Path) -> None:
    shape = config_of().parent.shape
    assert shape is not None
    (tmp_path / "config.json").write_text(json.dumps(stock_config(shape)))
    given = ["parent=pretrained", f"parent.path={tmp_path}"]
    assert "1,223,240 parameters, 8 layers" in text_of(*given)
    (tmp_path / "config.json").write_text("{")
    assert f"sizes are read from {tmp_path}" in text_of(*given), "the check says what is wrong"


def test_sizes_of_a_checkpoint_that_is_elsewhere_are_not_known_yet() -> None:
    text = text_of("parent=pretrained", "parent.path=some/model", "budgets.small.params=1e9")
    assert "sizes are read from some/model" in text
    rows = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["medium", "75.0% of the parent's params"] in rows
    assert any(row[0] == "small" and row[1].strip() == "1,000,000,000 params" for row in rows)


def test_a_run_that_has_begun_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "one").mkdir(parents=True)
    assert "goes on from the newest" in text_of(f"run_dir={tmp_path}")


def test_the_first_process_alone_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    monkeypatch.setenv("RANK", "1")
    show(config)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SLURM_PROCID", "3")  # torchrun inside a task of Slurm
    show(config)
    assert capsys.readouterr().out.startswith("run        tiny\n")
    monkeypatch.delenv("RANK")
    show(config)
    assert capsys.readouterr().out == ""


def test_a_target_above_the_parent_stops_here() -> None:
    with pytest.raises(ConfigError, match=r"budgets\.small\.params=1e\+09: must be at most"):
        opening(config_of("budgets.small.params=1e9"))


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch ends the program."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('TORCH'); raise SystemExit(3)")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "80", "TERM": "xterm"}


def test_it_is_there_before_torch_is_imported(without_torch: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "debug=one_step"]
    code, written = run_on_terminal(command, 80, without_torch)
    assert code == 3, written
    screen = Screen(80)
    screen.feed(written)
    lines = [line for line in screen.lines if line]
    assert lines[0].split() == ["run", "debug"] and lines[-1] == "TORCH"
    assert lines[-2].endswith("the same command resumes")


def test_a_job_of_a_sweep_says_what_is_its_own(
    without_torch: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--multirun",
            "debug=one_step",
            "seed=4,5",
            f"hydra.sweep.dir={tmp_path}/sweep",
        ],
        capture_output=True,
        text=True,
        env=without_torch,
        check=False,
    )
    first = done.stdout.splitlines()[0]
    assert first.startswith("debug, job 0 of a sweep: ") and "seed=4" in first
    assert first.endswith(f"in {tmp_path}/sweep/0")
