"""train.py, stopped dead at a named point of its life, so that somebody can kill it right there.

    python -m tests.helpers.kill_points NOTES PHASE NUMBER [override ...]
    python -m tests.helpers.kill_points           # forks one such process per line of JSON on stdin

The command is the real one; only the functions named in PHASES and the operations inside them are
watched. In NOTES the process writes a line when it enters and leaves a phase, `here PHASE WHAT`
when it has come to point NUMBER of PHASE and goes no further, and how many points it has passed
when it ends by itself. Only the process that is started here is watched, not those that it starts.
"""

import json
import os
import runpy
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.paths import ROOT
from helpers.waiting import until

import elastic.storage.writing
import elastic.training.launch
import elastic.training.rank
import elastic.training.resume.store
import elastic.training.run
import elastic.training.write
from elastic.parent import HybridParent
from elastic.routing.family import Family
from elastic.training.callbacks import BudgetValidation
from elastic.training.loggers import MetricsFile
from elastic.training.module import ElasticModule
from elastic.training.resume import CheckpointStore
from elastic.training.run import Run

PHASES: dict[str, list[tuple[Any, str]]] = {
    "start": [(Run, "begin"), (CheckpointStore, "newest")],
    "step": [(ElasticModule, "training_step"), (ElasticModule, "optimizer_step")],
    "metrics": [(MetricsFile, "log_metrics")],
    "validation": [(BudgetValidation, "validate")],
    "checkpoint": [(CheckpointStore, "save")],
    "freeze": [(Family, "freeze")],
    "stage change": [
        (elastic.training.run, "write_parent"),
        (elastic.training.rank, "rank"),
        (elastic.training.rank, "sort_checkpoint"),
        (elastic.training.run, "write_elastic"),
    ],
}
"""Every call of these is a point when it begins and when it has ended, and so is every operation
within it. A phase inside another one counts as itself."""

FILES = [(os, name) for name in ("fsync", "mkdir", "rename", "replace", "unlink")]
OPERATIONS: list[tuple[Any, str]] = [*FILES, (shutil, "rmtree"), (HybridParent, "forward")]
"""Points are before these."""

WRITERS: list[tuple[Any, str]] = [
    (elastic.training.resume.store, "save_file"),
    (elastic.training.write, "save_file"),
    (elastic.storage.writing, "write_shard"),
    (sys.modules["elastic.importance.rank"], "write_shard"),
]
"""Points are in the midst of these: half of the file is there."""


class Points:
    """Counts the points of every phase, and goes no further at one of them."""

    def __init__(self, notes: Path, phase: str, number: int) -> None:
        self.file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.phase, self.number = phase, number
        self.go = notes.with_name("go")
        self.steps_left = 0
        self.within: list[str] = []
        self.passed: Counter[str] = Counter()

    def note(self, *words: str) -> None:
        os.write(self.file, (" ".join(words) + "\n").encode())

    def point(self, what: str, before: Callable[[], None] | None = None) -> None:
        """A moment at which the process may be killed; `before` is done only if it is."""
        phase = self.within[-1]
        self.passed[phase] += 1
        if (phase, self.passed[phase]) != (self.phase, self.number):
            return
        if before is not None:
            before()
        self.note("here", phase, what)
        while True:
            time.sleep(60)

    def step(self) -> None:
        """Where PHASE is the name of a checkpoint: wait at the beginning of the NUMBER-th step that
        comes after it, until somebody lets this process go on."""
        self.steps_left -= 1
        if self.steps_left == 0:
            self.note("here", self.phase, "a step")
            until(self.go.exists)

    def watch_phase(self, owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.within.append(phase)
            self.note("enter", phase)
            self.point(f"{name} begins")
            if name == "training_step":
                self.step()
            result = original(*args, **kwargs)
            if name == "save" and result.path.name == self.phase:
                self.steps_left = self.number
            if name == "log_metrics":
                self.point("half a row", lambda: _tear(args[0].path))
            self.point(f"{name} has ended")
            self.within.pop()
            self.note("leave", phase)
            return result

        setattr(owner, name, watched)

    def watch_operation(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.within:
                self.point(f"before {name}")
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    def watch_writer(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> Any:
            def half() -> None:
                original(tensors, path, *args, **kwargs)
                os.truncate(path, os.stat(path).st_size // 2)

            if self.within:
                self.point(f"half of {Path(path).name}", half)
            return original(tensors, path, *args, **kwargs)

        setattr(owner, name, watched)


def _tear(path: Path) -> None:
    """Take away the second half of a file's last line."""
    text = path.read_bytes()
    start = text.rstrip(b"\n").rfind(b"\n") + 1
    os.truncate(path, (start + len(text)) // 2)


def run(notes: str, phase: str, number: int, overrides: list[str]) -> None:
    """Be `python train.py OVERRIDES`, watched."""
    points = Points(Path(notes), phase, number)
    for name, functions in PHASES.items():
        for function in functions:
            points.watch_phase(*function, name)
    for operation in OPERATIONS:
        points.watch_operation(*operation)
    for writer in WRITERS:
        points.watch_writer(*writer)
    sys.argv = ["train.py", *overrides]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    points.note("passed", json.dumps(points.passed))


def serve() -> None:
    """Fork a process per line [log, notes, phase, number, overrides]; say its id, then its end."""
    for line in sys.stdin:
        log, *request = json.loads(line)
        process = os.fork()
        if process == 0:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            run(*request)
            return
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
