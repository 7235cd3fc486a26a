"""Ctrl-C on a terminal: every process of a real run gets SIGINT, wherever it is."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.kills import ENVIRONMENT, ROOT
from helpers.runs import CALIBRATION, SMALL_PARENT, SMALL_SPACE, stage
from helpers.waiting import LIMIT, until

DDP = ["trainer.devices=2", "trainer.strategy=ddp", f"trainer.patience={LIMIT:.0f}"]


class Terminal:
    """A run in a process group of its own, as a shell would start it."""

    def __init__(self, run_dir: Path, *more: str) -> None:
        self.output = run_dir.with_name("output")
        self.output.touch()
        self.begin = self.output.stat().st_size
        command = [
            *(sys.executable, "train.py", "experiment=tiny", f"run_dir='{run_dir}'"),
            *(*SMALL_PARENT, *SMALL_SPACE, *CALIBRATION),
            *(*stage("pretrain", 100_000), *stage("short", 5), *stage("long", 5, length=256)),
            *("trainer.log_every=1", "trainer.checkpoint_every=100000", *more),
        ]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=os.environ | ENVIRONMENT,
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def said(self) -> str:
        return self.output.read_text()[self.begin :]

    def wait_until(self, true: Callable[[], bool]) -> None:
        until(lambda: true() or self.process.poll() is not None, lambda: self.said[-3000:])
        assert self.process.poll() is None, self.said[-3000:]

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)


@contextmanager
def terminal(run_dir: Path, *more: str) -> Iterator[Terminal]:
    one = Terminal(run_dir, *more)
    try:
        yield one
    finally:
        try:
            os.killpg(one.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        one.process.wait()


def steps(run_dir: Path) -> int:
    """Optimizer steps in metrics.csv."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        return max([int(row["step"] or 0) for row in csv.DictReader(file)], default=0)


@pytest.mark.parametrize("more", [[], DDP], ids=["one", "two"])
def test_no_step_is_lost_and_the_same_command_goes_on(more: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with terminal(run_dir, *more) as run:
        run.wait_until(lambda: steps(run_dir) >= 3)
        run.interrupt()
        assert run.process.wait(LIMIT) == 130, run.said[-3000:]
        assert run.said.count("Ctrl-C: a checkpoint follows the step at hand") == 1
        assert "SIGINT: a checkpoint is written; the same command goes on" in run.said
        assert "Traceback" not in run.said
    (saved,) = (run_dir / "checkpoints").iterdir()
    step = int(saved.name.rpartition("-")[2])
    assert step == steps(run_dir) >= 3
    with terminal(run_dir, *more) as again:
        again.wait_until(lambda: steps(run_dir) > step)
        assert f"resuming stage pretrain at step {step} of 100000" in again.said


@pytest.mark.parametrize("who", [0, 1], ids=["this one imports", "the other one imports"])
def test_ctrl_c_before_anything_is_there_is_one_line(who: int, tmp_path: Path) -> None:
    """No traceback, no report of a process that has died."""
    run_dir = tmp_path / "run"
    with terminal(run_dir, *DDP) as run:
        run.wait_until(lambda: len(children(run.process.pid)) >= who and imports(run.process.pid))
        run.interrupt()
        assert run.process.wait(LIMIT) == 130, run.said[-3000:]
        assert "interrupted" in run.said or "Ctrl-C" in run.said
        assert "Traceback" not in run.said and "error:" not in run.said


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def imports(pid: int) -> bool:
    """Whether a process is past Python's own start: torch's library is mapped."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
