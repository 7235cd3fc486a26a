"""Commands run in children of one process that has imported everything, a checkout of its own.

    python forked.py   reads a line of JSON per command, answers each with its exit code

Importing takes longer than most commands do at reduced size.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self


class Forked:
    """Starts commands in a directory, whose `elastic` they import."""

    def __init__(self, directory: Path, logs: Path | None = None) -> None:
        self.directory, self.logs = directory, logs or directory

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONPATH": str(self.directory), "OMP_NUM_THREADS": "1"}
        environment.pop("WANDB_MODE", None)
        self.process = subprocess.Popen(
            [sys.executable, str(self.directory / "tests" / "helpers" / "forked.py")],
            cwd=self.directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()

    def run(
        self, words: list[str], environment: dict[str, str], streams: dict[int, str] | None = None
    ) -> tuple[int, str]:
        """Exit code and output of a command.

        `streams` says where standard output (1) or error (2) go instead of to the output: a file,
        `closed`, or `left`, a pipe whose reader has gone.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        log = self.logs / "command.log"
        order = {"words": words, "environment": environment, "log": str(log)}
        line = json.dumps(order | {"streams": streams or {}})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks has died"
        return int(answer), log.read_text()


def start(words: list[str]) -> None:
    """Be `python SCRIPT ...` or `elastic ...`."""
    if words[0] == "python":
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_path(words[1], run_name="__main__")
    else:
        from elastic.cli.main import main

        sys.argv = words
        main()


def redirect(number: int, target: str) -> None:
    """Standard output or error into a file, a pipe without a reader, or closed, as at a start."""
    if target == "closed":
        os.close(number)
        setattr(sys, "stdout" if number == 1 else "stderr", None)
        return
    reader, writer = os.pipe()
    if target != "left":
        writer = os.open(target, os.O_WRONLY)
    os.close(reader)
    os.dup2(writer, number)
    os.close(writer)


def child(order: dict) -> int:
    """Run one command; returns its exit code."""
    os.environ |= order["environment"]
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    for number, target in order["streams"].items():
        redirect(int(number), target)
    try:
        start(order["words"])
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Fork for every line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print at import is no answer
    import deepspeed  # noqa: F401
    import transformers.models.nemotron_h.modeling_nemotron_h  # noqa: F401

    import elastic.bench.run
    import elastic.evaluate.family
    import elastic.extract.export
    import elastic.plan.work
    import elastic.teacher.cache.write
    import elastic.training.launch  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = child(json.loads(line))
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
