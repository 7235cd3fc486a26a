"""Resuming == never stopping (law 7), for real processes, real kills and a real full disk.

What is not in `make test`:  pytest tests/training/test_kills.py -m slow -s
"""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.kills import ENVIRONMENT, ROOT, Harness, Starter, kill_often, overrides, starter
from helpers.run_differences import differences, losses_apart, weights_apart

PRETRAIN, PARENT = "00-pretrain-000000003", "00-pretrain-000000007"
SOFT, SLICED, END = "01-short-000000003", "01-short-000000009", "01-short-000000010"
"""Checkpoints: while the parent is trained and when it is there, before and after the freeze, and
at the end of that stage."""


@pytest.fixture(scope="module")
def forks() -> Iterator[Starter]:
    """One interpreter that has imported everything; a process costs milliseconds then."""
    with starter(fresh=False) as one:
        yield one


@pytest.fixture(scope="module")
def harness(forks: Starter, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """With a run of one process that was never stopped."""
    one = Harness(tmp_path_factory.mktemp("kills"), forks)
    one.uninterrupted()
    return one


def test_three_kills_change_no_bit_of_any_file(harness: Harness) -> None:
    """`train.py` is started again and again, and dies while it writes a checkpoint, where the
    router is frozen, and while it writes elastic/ between two stages."""
    kills = [harness.kill_at(*p) for p in (("checkpoint", 100), ("freeze", 2), ("stage change", 9))]
    print(kills)
    harness.to_the_end("killed")
    assert differences(harness.root / "killed", harness.whole, exact=True) == [], kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "kills"), [("single", 24), ("ddp", 8), ("zero2", 8), ("zero3", 8)]
)
def test_many_kills_change_nothing(strategy: str, kills: int, tmp_path: Path) -> None:
    """In every phase and by the clock; each life is a fresh interpreter. One process ends bit for
    bit, in every file; several within float tolerance."""
    with starter(fresh=True) as fresh:
        harness = Harness(tmp_path, fresh, strategy, seed=4)
        assert kill_often(harness, kills, per_run=4) == []
    assert {kill.wanted for kill in harness.kills} == set(harness.phases)


def test_signals_change_no_bit_either(harness: Harness) -> None:
    """They leave a checkpoint of their own at whatever step it is, also between two logged rows;
    the run ends the same, but for which checkpoints it still has."""
    asked = (
        (signal.SIGINT, 130, PRETRAIN, 1),
        (signal.SIGTERM, 143, SOFT, 2),
        (signal.SIGUSR1, 75, SLICED, 1),
    )
    for number, code, checkpoint, steps in asked:
        life = harness.reach(checkpoint, steps=steps)
        os.kill(life.pid, number)
        harness.go_on()
        assert life.wait() == code
    harness.to_the_end("asked")
    found = differences(harness.root / "asked", harness.whole, exact=True)
    assert [line for line in found if not line.startswith("checkpoints/")] == []


# Other numbers of processes, other strategies


def moved(harness: Harness, name: str, *lives: tuple[str, str], last: str = "single") -> None:
    """A run whose lives, each until some checkpoint, have one strategy after another."""
    for strategy, checkpoint in lives:
        harness.reach(checkpoint, strategy).kill()
    harness.to_the_end(name, last)
    where = harness.root / name
    print(
        f"{name}: weights {weights_apart(where, harness.whole):.1e}, "
        f"figures {losses_apart(where, harness.whole)} apart"
    )
    assert differences(where, harness.whole, exact=False) == []


def test_a_run_moves_from_one_process_to_two_and_back(harness: Harness) -> None:
    """In the soft phase, and again after the freeze."""
    moved(harness, "there-and-back", ("single", SOFT), ("ddp", SLICED))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lives",
    [
        [("single", PARENT), ("zero1", SOFT), ("zero3", SLICED)],
        [("single", PARENT), ("zero3", SOFT), ("zero1", END)],
        [("single", SOFT), ("zero2", SLICED), ("ddp", END)],
        [("single", PARENT), ("ddp", END), ("zero3", "02-long-000000003")],
    ],
    ids=lambda lives: "-".join(strategy for strategy, _ in lives),
)
def test_a_run_moves_between_strategies(harness: Harness, lives: list[tuple[str, str]]) -> None:
    """In the soft phase, after the freeze and from one stage to the next.

    Not while the parent is trained: one that is 1e-7 apart has other principal directions where two
    are nearly as long, and the same function in a basis that is 4e-4 apart.
    """
    moved(harness, "-".join(strategy for strategy, _ in lives), *lives)


# A full disk


def test_a_full_disk_stops_a_run_cleanly(harness: Harness) -> None:
    """From outside, a limit on the size of files: no other checkpoint can be written. One line,
    exit code 1, the one before is whole; once there is room the same command ends bit for bit."""
    life = harness.reach(PRETRAIN)
    said = len(harness.output())
    limit = resource.prlimit(life.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (300_000, limit[1]))
    harness.go_on()
    assert life.wait() == 1
    output = harness.output()[said:]
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    newest = sorted(path.name for path in (harness.run_dir / "checkpoints").iterdir())[-1]
    for part in ("could not be written", "File too large", f"checkpoints/{newest}, which is whole"):
        assert part in line
    assert "Traceback" not in output
    harness.to_the_end("room-again")
    assert differences(harness.root / "room-again", harness.whole, exact=True) == []


def can_mount() -> bool:
    """Whether a small file system can be had here, in a namespace of its own."""
    try:
        command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no user namespaces here")
@pytest.mark.parametrize("size", [200, 1400, 5000, 5800, 7000])
def test_a_disk_that_is_really_full(size: int, tmp_path: Path) -> None:
    """A file system of so many KiB, full at one place or another: while tokens, a checkpoint, the
    parent, or elastic/ is written. Then it grows, and the same command goes on."""
    disk, train = tmp_path / "disk", f"{sys.executable} train.py"
    disk.mkdir()
    command = " ".join(f'"{word}"' for word in overrides(disk / "run"))
    script = f"""
        mount -t tmpfs -o size={size}k tmpfs {disk}
        {train} {command} 2> {tmp_path}/errors; echo $? > {tmp_path}/code
        find {disk} -name '.?*' > {tmp_path}/hidden
        mount -o remount,size=100m {disk}
        {train} {command} > {tmp_path}/again && cp -r {disk}/run {tmp_path}/run
    """
    subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], cwd=ROOT, env=os.environ | ENVIRONMENT, check=True
    )
    errors = (tmp_path / "errors").read_text()
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    print(size, line)
    assert (tmp_path / "code").read_text().strip() == "1"
    assert "Traceback" not in errors and str(disk / "run") in line
    assert (tmp_path / "hidden").read_text() == "", "something temporary is left"
    assert (tmp_path / "run" / "elastic" / "elastic.json").is_file()
