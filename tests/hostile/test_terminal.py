"""A terminal that goes away, a log on a full disk, streams that are closed: printing ends no run.

What a command writes is there, nothing is said of it line by line, and only what was all printed
ends with another exit code.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forked import Forked
from helpers.runs import SMALL_RUN

STREAMS = [
    pytest.param({2: "/dev/full"}, id="full-stderr"),
    pytest.param({2: "left"}, id="stderr-without-reader"),
    pytest.param({1: "left", 2: "left"}, id="both-without-reader"),
    pytest.param({1: "closed"}, id="closed-stdout"),
    pytest.param({1: "closed", 2: "closed"}, id="both-closed"),
    pytest.param({1: "/dev/full"}, id="full-stdout"),
]


def said_nothing_bad(said: str) -> None:
    for word in ("Traceback", "Errno", "BrokenPipe", "Exception ignored"):
        assert word not in said, said[-2000:]


@pytest.mark.parametrize("streams", STREAMS)
def test_extract_writes_its_result(
    streams: dict[int, str], forked: Forked, finished: Path, tmp_path: Path
) -> None:
    words = ["elastic", "extract", f"checkpoint='{finished / 'elastic'}'", "budget=small"]
    code, said = forked.run([*words, f"output='{tmp_path / 'small'}'"], {}, streams)
    said_nothing_bad(said)
    assert code == 0 and (tmp_path / "small" / "config.json").is_file()


@pytest.mark.parametrize("streams", STREAMS)
def test_evaluate_writes_its_result(
    streams: dict[int, str], forked: Forked, finished: Path, tmp_path: Path
) -> None:
    words = ["elastic", "evaluate", f"run_dir='{finished}'", "sequences=2", "sequence_length=32"]
    code, said = forked.run([*words, f"output='{tmp_path / 'family.json'}'"], {}, streams)
    said_nothing_bad(said)
    assert code == 0 and (tmp_path / "family.json").is_file()


@pytest.mark.parametrize("streams", [STREAMS[0], STREAMS[2], STREAMS[4]])
def test_training_goes_on(streams: dict[int, str], forked: Forked, tmp_path: Path) -> None:
    words = ["elastic", "train", *SMALL_RUN, f"run_dir='{tmp_path / 'run'}'"]
    code, said = forked.run(words, {}, streams)
    said_nothing_bad(said)
    assert code == 0 and (tmp_path / "run" / "elastic" / "elastic.json").is_file()


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ({2: "/dev/full"}, 0),
        ({1: "closed"}, 0),
        ({1: "left"}, 141),
        ({1: "left", 2: "left"}, 141),
        ({1: "/dev/full"}, 1),
    ],
    ids=str,
)
def test_plan_ends_with_a_line_at_most(
    streams: dict[int, str], expected: int, forked: Forked
) -> None:
    code, said = forked.run(["elastic", "plan"], {}, streams)
    assert code == expected and "Traceback" not in said
    if expected:
        assert said.count("\n") <= 1, said


@pytest.mark.parametrize("streams", STREAMS[:5])
def test_an_error_that_nobody_reads_keeps_its_exit_code(
    streams: dict[int, str], forked: Forked
) -> None:
    code, said = forked.run(["elastic", "train", "seed=-1"], {}, streams)
    said_nothing_bad(said)
    assert code == 2


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Outside a fit, whose own handlers write a checkpoint first."""
    program = (
        "import os, signal, pathlib\n"
        "from elastic.cli.command import _end_at\n"
        "from elastic.storage.files import atomic_directory\n"
        "_end_at(signal.SIGTERM)\n"
        f"with atomic_directory(pathlib.Path({str(tmp_path / 'out')!r})):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (143, "ended by SIGTERM")
    assert not list(tmp_path.iterdir())
