"""One run per directory: who is refused, and what a killed run leaves behind. Real processes."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.waiting import LIMIT

from elastic.cluster.lock import LOCK, RunLock
from elastic.config import ConfigError

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from elastic.cluster.lock import RunLock
with RunLock(Path(sys.argv[1])):
    {work}
    print("held", flush=True)
    time.sleep(1200)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes that a test starts; none outlives it."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def hold(run_dir: Path, started: list[subprocess.Popen], work: str = "pass", **env: str) -> int:
    """Another process that has the lock; returns its pid."""
    command = [sys.executable, "-c", HOLDER.format(work=work), str(run_dir)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
    started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process.pid


def test_a_second_run_is_refused_in_one_line_that_says_who(
    tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    pid = hold(tmp_path, started, SLURM_JOB_ID="4711")
    with pytest.raises(ConfigError) as refused, RunLock(tmp_path):
        pass
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"run_dir={tmp_path}: in use by process {pid} on {os.uname().nodename}")
    assert re.search(r"\(Slurm job 4711\) since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line)
    assert line.endswith("wait until it has ended, or choose another run_dir")
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == pid, "a refusal changes nothing"


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
            pass
        with pytest.raises(ConfigError), RunLock(tmp_path):
            pass  # and the refused one took nothing away


def test_a_killed_run_leaves_no_lock(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    os.kill(hold(tmp_path, started), signal.SIGKILL)
    started[0].wait()
    assert (tmp_path / LOCK).is_file(), "only the file, which means nothing"
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


CHILDREN = {
    "program": "subprocess.Popen(['sleep', '1200'])",
    "program with all files": "subprocess.Popen(['sleep', '1200'], close_fds=False)",
    "fork": "r, w = os.pipe(); os.fork() or (os.write(w, b'.'), time.sleep(1200)); os.read(r, 1)",
}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_child_does_not_keep_the_lock_of_its_dead_parent(
    child: str, tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    work = f"import os; os.setpgid(0, 0); {CHILDREN[child]}"
    pid = hold(tmp_path, started, work)
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.killpg(pid, 0)  # the child is there
        with RunLock(tmp_path):
            pass
    finally:
        os.killpg(pid, signal.SIGKILL)


def test_a_fork_that_ends_gives_nothing_away(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        if (pid := os.fork()) == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(ConfigError), RunLock(tmp_path):
            pass


def test_a_run_that_ends_takes_away_what_it_made(tmp_path: Path) -> None:
    """So that settings refused later leave nothing, and a directory in use stays."""
    with RunLock(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "kept").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]
    with RunLock(tmp_path / "runs"):
        pass
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="exists and is not a directory"), RunLock(run_dir):
            pass


def test_what_an_earlier_run_left_in_the_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("what is this " * 1000)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_holder_that_has_written_nothing_yet_is_refused_too(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"in use by another run; wait"), RunLock(tmp_path):
            pass


def test_a_file_whose_owner_took_it_away_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner may leave between our opening and locking the file: two names, two locks."""
    flock, first = fcntl.flock, [True]

    def slow(descriptor: int, operation: int) -> None:
        if first.pop() if first else False:
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with RunLock(tmp_path):
        with pytest.raises(ConfigError), RunLock(tmp_path):
            pass
    assert not first


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with RunLock(tmp_path):
        pass
    (record,) = caplog.records
    assert "has no locks" in record.message and str(tmp_path) in record.message


def requeued(monkeypatch: pytest.MonkeyPatch, job: str, restarts: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)


def test_a_requeued_job_waits_for_its_earlier_life(
    tmp_path: Path, started: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server may take a while to see that a node is gone."""
    pid = hold(tmp_path, started, SLURM_JOB_ID="7")
    requeued(monkeypatch, "7", "1")
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with RunLock(tmp_path, patience=LIMIT):
        pass


@pytest.mark.parametrize(("job", "restarts"), [("7", "0"), ("8", "1")])
def test_other_jobs_do_not_wait(
    job: str,
    restarts: str,
    tmp_path: Path,
    started: list[subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hold(tmp_path, started, SLURM_JOB_ID="7")
    requeued(monkeypatch, job, restarts)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(ConfigError), RunLock(tmp_path, patience=LIMIT):
        pass


def test_waiting_ends(
    tmp_path: Path, started: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(tmp_path, started, SLURM_JOB_ID="7")
    requeued(monkeypatch, "7", "1")
    with pytest.raises(ConfigError, match="Slurm job 7"), RunLock(tmp_path, patience=0.3):
        pass
