"""The job scripts and the launcher on a real Slurm: a run that its time limit interrupts ends like
one that nothing does.

`make test-slurm` runs this file; its name keeps it out of `make test`.
"""

import csv
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT
from helpers.runs import CALIBRATION, SMALL_PARENT, SMALL_SPACE, stage
from safetensors.torch import load_file
from tests.slurm.cluster import Cluster, cluster

TEXT = ["data=files", "data.tokenizer=train", f"data.path='{ROOT}/elastic/*/*.py'"]
ONE_STEP = ["debug=one_step", *TEXT, "data.validation_every=3"]
TWO_TASKS = ["--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
ONE_TASK = ["--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1"]
TINY = [
    *SMALL_PARENT,
    *SMALL_SPACE,
    *CALIBRATION,
    *stage("pretrain", 40, batch=2048, lr=5e-3),
    *stage("short", 220, batch=2048, lr=2e-3),
    *stage("long", 40, length=256, batch=2048, lr=1e-3),
    "trainer.accelerator=cpu",
    "trainer.strategy=ddp",
    "trainer.patience=600",
    "trainer.validate_every=25",
    "trainer.checkpoint_every=1000",  # only the signal and the ends of stages write one
]
"""Long enough for a signal that may take 30 s to come."""


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """One thread a process; our Python in the jobs; Ctrl-C, also from `kill`, lets fixtures end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHON", sys.executable)
        patch.chdir(ROOT)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def slurm(environment: None) -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where runs and logs go, for as long as the tests take."""
    with tempfile.TemporaryDirectory(prefix="elastic-runs-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster, folder: Path) -> Path:
    """The same command outside Slurm, with two processes."""
    command = [sys.executable, "train.py", f"run_dir={folder}/plain", "trainer.devices=2", *TINY]
    result = subprocess.run(
        command, env=slurm.environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "plain"


@pytest.fixture(scope="module")
def requeued(slurm: Cluster, folder: Path) -> tuple[Path, str, dict[str, str]]:
    """Run directory, log and final state of a job that its time limit has interrupted."""
    run, log = folder / "requeued", folder / "requeued.log"
    options = [*TWO_TASKS, "--time=60", "--signal=USR1@120"]
    job = slurm.submit("slurm/train.sbatch", f"run_dir={run}", *TINY, options=options, log=log)
    slurm.wait(job, "RUNNING", 60)
    until(lambda: "val/small/loss" in text(run / "metrics.csv"), 240)  # beyond pretraining
    hours, minutes, _ = map(int, slurm.show(job)["RunTime"].split(":"))
    limit = 60 * hours + minutes + 2  # at most 120 s from now: the signal comes within 30
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    slurm.wait(job, "PENDING", 120)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    state = slurm.wait(job, "COMPLETED", 600)
    print(f"\n--- {log.name}\n{log.read_text()}---")
    return run, log.read_text(), state


def until(condition: Callable[[], bool], timeout: float) -> None:
    """Wait; what comes too late, the assertions after it show."""
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end:
        time.sleep(0.5)


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def validation(run: Path) -> dict[tuple[int, str], float]:
    """Every validation figure of a run, by step and name."""
    with (run / "metrics.csv").open(newline="") as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if name.startswith("val/") and value
        }


def test_the_time_limit_requeues_and_the_run_ends(
    requeued: tuple[Path, str, dict[str, str]],
) -> None:
    run, log, state = requeued
    assert int(state["Restarts"]) >= 1 and state["ExitCode"] == "0:0"
    assert "start 1: stopped at the signal; requeued" in log
    assert "start 2: begins" in log and "resuming stage" in log
    assert log.rstrip().endswith("ended with exit code 0")
    assert (run / "elastic" / "elastic.json").is_file()


def test_interrupted_equals_uninterrupted(
    requeued: tuple[Path, str, dict[str, str]], uninterrupted: Path
) -> None:
    """Validation losses on the way, and the elastic checkpoint at the end."""
    found, expected = validation(requeued[0]), validation(uninterrupted)
    assert len(expected) > 50 and found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    worst = max(abs(found[key] - value) for key, value in expected.items())
    weights = load_file(uninterrupted / "elastic" / "model.safetensors")
    others = load_file(requeued[0] / "elastic" / "model.safetensors")
    assert weights.keys() == others.keys()
    largest = max(float((others[name] - weight).abs().max()) for name, weight in weights.items())
    print(f"\nlargest difference: {worst:.1e} in validation figures, {largest:.1e} in weights")
    for name, weight in weights.items():
        assert others[name].sub(weight).abs().max() <= 1e-4 * weight.abs().max(), name


def test_extract(slurm: Cluster, requeued: tuple[Path, str, dict[str, str]], folder: Path) -> None:
    job = slurm.submit(
        "slurm/extract.sbatch",
        f"checkpoint={requeued[0]}/elastic",
        "budget=small",
        f"output={folder}/small",
        options=["--cpus-per-task=1", "--mem=0"],
        log=folder / "extract.log",
    )
    slurm.wait(job, "COMPLETED", 120)
    assert (folder / "small" / "config.json").is_file()


def seeds(*runs: Path) -> list[int]:
    """The seeds of runs that have ended with a checkpoint."""
    done = [run for run in runs if (run / "elastic" / "elastic.json").is_file()]
    return [yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in done]


def test_sweep(slurm: Cluster, folder: Path) -> None:
    """Each line of the file is a run in a directory of its own."""
    lines = folder / "seeds.txt"
    lines.write_text("seed=1 'name=\"the first\"'\nseed=2\n")
    job = slurm.submit(
        "slurm/sweep.sbatch",
        lines,
        *ONE_STEP,
        options=[*ONE_TASK, "--array=1-2", f"--export=ALL,RUNS={folder}/sweeps"],
        log=folder / "sweep-%a.log",
    )
    for index in (1, 2):
        slurm.wait(f"{job}_{index}", "COMPLETED", 240)
    assert seeds(*(folder / "sweeps" / "seeds" / name for name in ("1", "2"))) == [1, 2]


def test_launcher(slurm: Cluster, folder: Path) -> None:
    """Two jobs of two processes each from one command, which waits; one is told to stop."""
    runs = [folder / "launched" / name for name in ("0", "1")]
    command = [
        *(sys.executable, "train.py", "--multirun", "hydra/launcher=slurm", "seed=1,2"),
        *("hydra.launcher.cpus_per_task=1", f"hydra.sweep.dir={folder}/launched"),
        *ONE_STEP,
        *("curriculum.stages.short.tokens=25600", "trainer.strategy=ddp", "trainer.devices=2"),
    ]
    log = folder / "launched.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=slurm.environment, stdout=output, stderr=output)
    try:
        until(lambda: "val/small/loss" in text(runs[0] / "metrics.csv"), 120)
        job = slurm.run("squeue", "--noheader", "--format=%F").split()[0]
        slurm.run("scancel", "--signal=USR1", f"{job}_0")
        try:
            assert process.wait(300) == 0, log.read_text()
        except subprocess.TimeoutExpired:
            logs = sorted((folder / "launched" / ".submitit").rglob("*_log.out"))
            said = [f"--- {path.name}\n{path.read_text()[-4000:]}" for path in logs]
            pytest.fail("\n".join([*said, slurm.report()]))
    finally:
        process.kill()
    assert seeds(*runs) == [1, 2]
    assert [slurm.show(f"{job}_{index}")["Restarts"] for index in (0, 1)] == ["1", "0"]
