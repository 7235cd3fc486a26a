"""The line that starts a run, and what a run without a launcher is told."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from elastic.cluster.start import check_started, start_command
from elastic.config import ConfigError, TrainerConfig


def trainer(devices: int, num_nodes: int, accelerator: str = "gpu") -> TrainerConfig:
    strategy = "single" if devices * num_nodes == 1 else "ddp"
    return TrainerConfig(
        accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy
    )


def test_one_machine_needs_no_launcher() -> None:
    given = ["experiment=medium", "trainer.devices=8", "space.hidden=[512, 480]"]
    line = start_command(trainer(8, 1), given)
    assert shlex.split(line) == ["elastic", "train", *given]
    check_started(trainer(8, 1))


@pytest.mark.parametrize(("accelerator", "gpus"), [("gpu", 8), ("cpu", 0)])
def test_several_machines_are_asked_of_slurm(accelerator: str, gpus: int) -> None:
    """The script says how many there are, so that the settings need not."""
    given = ["data.path=corpus/*.parquet", "trainer.num_nodes=4", "trainer.devices=8"]
    words = shlex.split(start_command(trainer(8, 4, accelerator), given))
    assert words == [
        "sbatch", "--nodes=4", f"--gpus-per-node={gpus}", "--ntasks-per-node=8",
        "slurm/train.sbatch", "data.path=corpus/*.parquet",
    ]  # fmt: skip


def test_a_launcher_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    check_started(trainer(8, 2))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: a launcher"):
        check_started(trainer(8, 2))


def test_a_run_of_several_nodes_without_a_launcher_says_what_to_run(tmp_path: Path) -> None:
    """One line, before torch is there and before anything is written."""
    command = [sys.executable, "-X", "importtime", "train.py", "experiment=nano_v2_12b"]
    given = ["data.path=corpus/*.parquet", f"run_dir={tmp_path}/run", "trainer.num_nodes=4"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, cwd=ROOT, check=False)
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if line not in imported]
    assert done.returncode == 2 and len(said) == 1
    assert not any(line.endswith(" torch") for line in imported)
    settings = f"experiment=nano_v2_12b 'data.path=corpus/*.parquet' run_dir={tmp_path}/run"
    for line in (
        f"sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 slurm/train.sbatch {settings}`",
        "torchrun --nnodes=4 --nproc-per-node=8 ",
        f"train.py {settings} trainer.num_nodes=4`",
        "trainer.num_nodes=1",
    ):
        assert line in said[0]
    assert list(tmp_path.iterdir()) == []
