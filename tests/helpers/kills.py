"""Kill real runs, start them again with the same command, and compare how they end (law 7).

    python -m tests.kills --kills 20 --seed 0
    python -m tests.kills --kills 6 --strategy ddp        # zero1, zero2, zero3: two processes each

A run is `train.py` with its processes in a session of its own, all of which get SIGKILL from
outside: either at a point that tests/helpers/kill_points.py has stopped at, or at a random moment.
The phase is one that has been hit least so far, the point in it is drawn.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from helpers.paths import ROOT, TESTS
from helpers.run_differences import differences, weights_apart
from helpers.runs import CALIBRATION, SMALL_PARENT, SMALL_SPACE, stage
from helpers.waiting import LIMIT, until

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
}

PHASES = ["start", "step", "metrics", "validation", "checkpoint", "freeze", "stage change"]
"""Of tests/helpers/kill_points.py."""

ANY = "any moment"
"""Not a phase: a kill by the clock, wherever that is."""

STEPS = (7, 10, 5)
"""Per stage. The router is frozen after the eighth step of the second."""


def overrides(run_dir: Path, *more: str) -> list[str]:
    """A command line: three stages, and hardly anything happens in the same step."""
    pretrain, short, long = STEPS
    return [
        "experiment=tiny",
        f"run_dir='{run_dir}'",
        *SMALL_PARENT,
        *SMALL_SPACE,
        *CALIBRATION,
        *stage("pretrain", pretrain, lr=5e-3),
        *stage("short", short, lr=2e-3),
        *stage("long", long, length=256, lr=1e-3),
        *(f"curriculum.stages.{name}.budgets_per_batch=1" for name in ("short", "long")),
        "trainer.checkpoint_every=3",
        "trainer.validate_every=4",
        "trainer.log_every=2",
        f"trainer.patience={LIMIT:.0f}",
        "router.freeze_at=0.5",
        *more,
    ]


def on(strategy: str) -> list[str]:
    """Overrides for one process, or two."""
    if strategy == "single":
        return []
    more = ["parent.activation_checkpointing=true"] if strategy == "zero3" else []
    return [f"trainer.strategy={strategy}", "trainer.devices=2", *more]


class Starter:
    """Starts watched commands: fresh interpreters, or forks of one that has imported everything."""

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.server: subprocess.Popen[str] | None = None

    def start(self, log: Path, notes: Path, phase: str, number: int, command: list[str]) -> "Life":
        module = [sys.executable, "-m", "tests.helpers.kill_points"]
        environment = os.environ | ENVIRONMENT
        if self.fresh:
            with log.open("a") as output:
                process = subprocess.Popen(
                    [*module, str(notes), phase, str(number), *command],
                    stdout=output,
                    stderr=output,
                    env=environment,
                    cwd=ROOT,
                    start_new_session=True,
                )
            return Life(process.pid, process, None)
        if self.server is None:
            pipe = subprocess.PIPE
            self.server = subprocess.Popen(
                module, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT
            )
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps([str(log), str(notes), phase, number, command]) + "\n")
        self.server.stdin.flush()
        os.set_blocking(self.server.stdout.fileno(), True)
        life = Life(int(self.server.stdout.readline()), None, self.server.stdout)
        os.set_blocking(self.server.stdout.fileno(), False)
        return life

    def close(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()


@contextmanager
def starter(fresh: bool) -> Iterator[Starter]:
    """A Starter that leaves no server running."""
    one = Starter(fresh)
    try:
        yield one
    finally:
        one.close()


@dataclass
class Life:
    """One process of a run, from its start to its end."""

    pid: int
    process: subprocess.Popen | None
    told: IO[str] | None
    """Where the server tells the exit code of a fork, once."""
    code: int | None = None

    def poll(self) -> int | None:
        """Exit code, or None as long as it lives."""
        if self.process is not None:
            return self.process.poll()
        assert self.told is not None
        if self.code is None and (line := self.told.readline()):
            self.code = int(line)
        return self.code

    def wait(self) -> int:
        """Exit code, once it has one."""
        try:
            until(lambda: self.poll() is not None)
        except AssertionError:
            self.kill()
            raise
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """SIGKILL to all processes of the session; returns when the first of them is gone."""
        os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)


@dataclass(frozen=True)
class Kill:
    """Where a run was when it died."""

    phase: str
    what: str
    wanted: str
    """The phase, or ANY."""


@dataclass
class Harness:
    """Runs of one kind, killed and not."""

    root: Path
    starter: Starter
    strategy: str = "single"
    seed: int = 0
    phases: list[str] = field(default_factory=lambda: [*PHASES, ANY])
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.points: dict[str, int] = {}
        self.seconds = 0.0

    @property
    def whole(self) -> Path:
        """A run that was never stopped."""
        return self.root / "whole"

    @property
    def run_dir(self) -> Path:
        """Where all runs happen, one after another: its name is in their settings."""
        return self.root / "run"

    def uninterrupted(self) -> None:
        """The run that all others are compared with; its points and seconds are those to draw."""
        start = time.monotonic()
        self.to_the_end("whole")
        self.seconds = time.monotonic() - start
        passed = _notes(self.root / "notes")[-1]
        self.points = json.loads(passed.removeprefix("passed "))

    def to_the_end(self, name: str, strategy: str | None = None) -> None:
        """A life of the run to its end; it is called `name` from then on."""
        life = self.start("none", 0, strategy)
        code = life.wait()
        assert code == 0, f"exit code {code}\n{self.output()[-3000:]}"
        self.run_dir.rename(self.root / name)

    def killed(self, name: str, kills: int) -> list[Kill]:
        """A run that is killed so often, then ends and is called `name`; its kills.

        It may end earlier: where a phase does not come again, nobody is killed in it.
        """
        mine: list[Kill] = []
        while len(mine) < kills:
            tally = Counter(kill.wanted for kill in [*self.kills, *mine])
            least = min(tally[phase] for phase in self.phases)
            phase = self.random.choice([p for p in self.phases if tally[p] == least])
            left = 1 - len(mine) / (kills + 1)  # there is less of it after every kill
            number = 1 + self.random.randrange(max(1, int(self.points.get(phase, 1) * left)))
            delay = self.random.uniform(0, self.seconds * left) if phase == ANY else LIMIT
            died = self.kill_at(phase, number, delay)
            if died is None:
                self.run_dir.rename(self.root / name)
                break
            mine.append(died)
        else:
            self.to_the_end(name)
        self.kills += mine
        return mine

    def reach(self, checkpoint: str, strategy: str | None = None, steps: int = 1) -> Life:
        """A life of the run that waits in the first step, or a later one, after a checkpoint."""
        life = self.start(checkpoint, steps, strategy)
        until(lambda: life.poll() is not None or self.stands_still(), self.output)
        assert life.poll() is None, self.output()[-3000:]
        return life

    def stands_still(self) -> bool:
        """Whether the life has come to where it goes no further."""
        told = _notes(self.root / "notes")
        return bool(told) and told[-1].startswith("here")

    def go_on(self) -> None:
        """Let a life that `reach` has returned do so."""
        (self.root / "go").touch()

    def start(self, phase: str, number: int, strategy: str | None = None) -> Life:
        """One life of the run."""
        notes = self.root / "notes"
        notes.unlink(missing_ok=True)
        (self.root / "go").unlink(missing_ok=True)
        command = overrides(self.run_dir, *on(strategy or self.strategy))
        return self.starter.start(self.root / "log", notes, phase, number, command)

    def output(self) -> str:
        """What all lives have said."""
        return (self.root / "log").read_text()

    def kill_at(self, phase: str, number: int, after: float = LIMIT) -> Kill | None:
        """A life that is killed at a point, or after so many seconds; None if it ended."""
        life, notes = self.start(phase, number), self.root / "notes"
        start = time.monotonic()
        while (code := life.poll()) is None:
            told = _notes(notes)
            if told and told[-1].startswith("here"):
                time.sleep(self.random.uniform(0, 0.05))  # other processes go on meanwhile
                life.kill()
                return Kill(phase, told[-1].removeprefix(f"here {phase} "), phase)
            if time.monotonic() - start > after:
                life.kill()
                assert phase == ANY, f"it hangs\n{self.output()[-3000:]}"
                return Kill(*_where(_notes(notes)), ANY)
            time.sleep(0.002)
        assert code == 0, f"exit code {code}\n{self.output()[-3000:]}"
        return None


def _notes(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


def _where(notes: list[str]) -> tuple[str, str]:
    """The phase that a process was in when it wrote no more."""
    within: list[str] = []
    for line in notes:
        word, _, phase = line.partition(" ")
        if word == "enter":
            within.append(phase)
        elif word == "leave":
            within.pop()
    if within:
        return within[-1], "by the clock"
    return "between phases", "by the clock" if notes else "before the run began"


# Command


def main() -> None:
    """Kill, compare, print a table; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20, help="at least so many, over all runs")
    parser.add_argument("--per-run", type=int, default=4, help="at most so many in one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="single", help="ddp, zero1, zero2, zero3: two each")
    parser.add_argument("--forked", action="store_true", help="import only once: faster")
    parser.add_argument("--keep", type=Path, help="an empty directory that the runs stay in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, starter(not arguments.forked) as start:
        harness = Harness(
            arguments.keep or Path(temporary), start, arguments.strategy, arguments.seed
        )
        harness.root.mkdir(parents=True, exist_ok=True)
        bad = kill_often(harness, arguments.kills, arguments.per_run)
    sys.exit(bool(bad))


def kill_often(harness: Harness, kills: int, per_run: int) -> list[str]:
    """Kill runs until it was done often enough; prints each, and returns what differed."""
    harness.uninterrupted()
    print(f"uninterrupted: {harness.seconds:.1f} s, points {harness.points}", flush=True)
    bad, number = [], 0
    while len(harness.kills) < kills:
        run_dir = harness.root / f"run-{number}"
        for kill in harness.killed(run_dir.name, per_run):
            print(f"{run_dir.name}: killed in {kill.phase}, {kill.what}")
        found = differences(run_dir, harness.whole, exact=harness.strategy == "single")
        apart = weights_apart(run_dir, harness.whole)
        print(f"{run_dir.name}: weights {apart:.1e} apart; {found or 'no difference'}", flush=True)
        bad += [f"{run_dir.name}: {line}" for line in found]
        number += 1
    print(f"\n{len(harness.kills)} kills in {number} runs; {len(bad)} differences")
    for phase, count in Counter(kill.phase for kill in harness.kills).most_common():
        print(f"{phase:<15} {count}")
    return bad


if __name__ == "__main__":
    main()
