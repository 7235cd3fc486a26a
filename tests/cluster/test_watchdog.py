"""What becomes of the others when a process dies, freezes or fails. Real processes that wait in a
gloo collective, or for ever."""

import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.cluster_processes import processes

from elastic.cluster import watchdog
from elastic.cluster.place import ALONE, Place
from elastic.cluster.rendezvous import joined
from elastic.cluster.signals import AgreedExit
from elastic.cluster.watchdog import Watchdog

Tell = Callable[[str], None]
PATIENCE, GRACE = 1.0, 1.0


def work(rank: int, count: int, tell: Tell, how: dict[int, str]) -> None:
    """A process of a run; `how` says what each rank does in it.

    reduce   collectives, again and again, 100 of 10 ms
    wait     nothing for 30 s: as if in a collective that never notices
    raise    an error; exit an error code; agree an agreed exit; late an error a little later
    leave    nothing more: it is done
    busy     long calls: a product, and a checkpoint
    """
    torch.set_num_threads(1)
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"), Watchdog(place, PATIENCE, GRACE):
        tell("ready")
        match how[rank]:
            case "reduce":
                for _ in range(100):
                    time.sleep(0.01)
                    dist.all_reduce(torch.ones(1))
            case "wait":
                time.sleep(30)
            case "raise":
                raise RuntimeError("out of luck\nand more")
            case "late":
                time.sleep(0.8)
                raise RuntimeError("out of luck")
            case "exit":
                raise SystemExit(75)
            case "agree":
                raise AgreedExit(143)
            case "busy":
                torch.randn(2500, 2500) @ torch.randn(2500, 2500)
                torch.save(torch.zeros(50_000_000), io.BytesIO())
        tell("done")


def line(rank: int, pid: int | None, what: str, count: int = 2) -> str:
    """What users see."""
    who = f"rank {rank} of {count} (host {socket.gethostname()}, process {pid})"
    return f"\nerror: {who} {what}; stopping. The same command goes on from the last checkpoint\n"


SILENT = f"gave no sign of life for {PATIENCE:g} s"


@pytest.mark.parametrize("waiting", ["reduce", "wait"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_run_down_at_once(
    victim: int, waiting: str, tmp_path: Path
) -> None:
    with processes(tmp_path, work, 2, {0: waiting, 1: waiting}) as run:
        run.wait_until("ready")
        run.signal(victim, signal.SIGKILL)
        assert run.codes(within=PATIENCE) in ([-9, 1], [1, -9])
        expected = line(victim, run.all[victim].pid, "died without a word")
        assert run.errors(1 - victim) == expected, "and no traceback of a collective"


def test_a_frozen_process_takes_the_run_down_within_its_patience(tmp_path: Path) -> None:
    """Rank 0 in one run, and rank 1 in another beside it."""
    how = {0: "reduce", 1: "reduce"}
    with (
        processes(tmp_path / "0", work, 2, how) as first,
        processes(tmp_path / "1", work, 2, how) as second,
    ):
        for victim, run in enumerate((first, second)):
            run.wait_until("ready")
            run.signal(victim, signal.SIGSTOP)
        start = time.monotonic()
        assert first.codes(1) == second.codes(0) == [1]
        assert 0.7 * PATIENCE < time.monotonic() - start < 2 * PATIENCE
        for victim, run in enumerate((first, second)):
            assert run.errors(1 - victim) == line(victim, run.all[victim].pid, SILENT)


def test_all_others_leave_and_one_of_a_machine_says_why(tmp_path: Path) -> None:
    with processes(tmp_path, work, 4, dict.fromkeys(range(4), "wait")) as run:
        run.wait_until("ready")
        run.signal(2, signal.SIGKILL)
        assert run.codes(within=PATIENCE) == [1, 1, -9, 1]
        said = [run.errors(rank) for rank in range(4)]
        assert said == [line(2, run.all[2].pid, "died without a word", 4), "", "", ""]


def test_a_failure_is_told_to_those_who_do_not_notice(tmp_path: Path) -> None:
    with processes(tmp_path, work, 2, {0: "wait", 1: "raise"}) as run:
        assert run.codes(within=10) == [1, 1]
        said = run.errors(0)
        assert said == line(1, run.all[1].pid, "failed: RuntimeError: out of luck")


def test_an_exit_code_is_handed_on(tmp_path: Path) -> None:
    """A signal outside a fit may reach one process only."""
    with processes(tmp_path, work, 2, {0: "exit", 1: "wait"}) as run:
        assert run.codes(within=10) == [75, 75]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_that_ends_one_is_no_failure_of_the_others(victim: int, tmp_path: Path) -> None:
    """Whose collective then fails: a job that only one process may requeue must go on."""
    how = {rank: "exit" if rank == victim else "reduce" for rank in range(4)}
    with processes(tmp_path, work, 4, how) as run:
        assert run.codes(within=10) == [75] * 4, run.errors(1 - victim)
        assert not any("error:" in run.errors(rank) for rank in range(4))


def requeueing(rank: int, count: int, tell: Tell, folder: str) -> None:
    """Rank 0 waits where it never hears of the signal that rank 1 has received."""
    os.environ |= {"PATH": folder, "REQUEUE_AT_MOST": "2", "SLURM_JOB_ID": "7"}
    work(rank, count, tell, {0: "wait", 1: "exit"})


def test_who_must_leave_hard_requeues_its_job_first(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n')
    scontrol.chmod(0o755)
    with processes(tmp_path / "told", requeueing, 2, str(tmp_path)) as run:
        assert run.codes(within=10) == [75, 75]
    assert (tmp_path / "calls").read_text() == "requeue 7\n"


def slow_door(rank: int, count: int, tell: Tell) -> None:
    """Rank 0 leaves before it has looked who is there."""
    admit = Watchdog._admit

    def later(self: Watchdog) -> None:
        time.sleep(0.3)
        admit(self)

    Watchdog._admit = later  # type: ignore[method-assign]
    work(rank, count, tell, {0: "exit", 1: "wait"})


def test_what_is_said_first_of_all_is_heard(tmp_path: Path) -> None:
    with processes(tmp_path, slow_door, 2) as run:
        assert run.codes(within=10) == [75, 75]


@pytest.mark.parametrize("what", ["raise", "late", "exit", "agree"])
def test_who_fails_too_is_not_interrupted(what: str, tmp_path: Path) -> None:
    """Most errors come on all processes; each reports its own."""
    with processes(tmp_path, work, 2, {0: what, 1: what if what != "late" else "raise"}) as run:
        code = {"raise": 1, "late": 1, "exit": 75, "agree": 143}[what]
        assert run.codes(within=10) == [code, code]
        for rank in (0, 1):
            assert "error: rank" not in run.errors(rank)


def stay(rank: int, count: int, tell: Tell) -> None:
    """Rank 0, then rank 2, are done long before rank 1."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"):
        with Watchdog(place, 0.4, 0.1):
            time.sleep((0.0, 1.0, 0.3)[rank])
        time.sleep((1.0, 0.0, 0.7)[rank])


def test_who_is_done_is_not_missed(tmp_path: Path) -> None:
    with processes(tmp_path, stay, 3) as run:
        assert run.codes() == [0, 0, 0]
        assert run.errors(0) + run.errors(1) + run.errors(2) == ""


@pytest.mark.slow
def test_long_native_calls_are_signs_of_life(tmp_path: Path) -> None:
    with processes(tmp_path, work, 2, {0: "busy", 1: "busy"}) as run:
        assert run.codes() == [0, 0]


def test_a_machine_that_slept_accuses_nobody(tmp_path: Path) -> None:
    """Ctrl-Z and fg, or a closed laptop."""
    with processes(tmp_path, work, 2, {0: "reduce", 1: "reduce"}) as run:
        run.wait_until("ready")
        for rank in (0, 1):
            run.signal(rank, signal.SIGSTOP)
        time.sleep(1.3 * PATIENCE)
        for rank in (0, 1):
            run.signal(rank, signal.SIGCONT)
        assert run.codes() == [0, 0]


def hang(rank: int, count: int, tell: Tell) -> None:
    """A process that fails, and then hangs while it leaves."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"):
        try:
            with Watchdog(place, PATIENCE, GRACE):
                raise ValueError("no")
        except ValueError:
            time.sleep(30)


def test_who_hangs_on_the_way_out_is_ended(tmp_path: Path) -> None:
    with processes(tmp_path, hang, 2) as run:
        assert run.codes(within=10) == [1, 1]


def parent(rank: int, count: int, tell: Tell) -> None:
    """Rank 0, which starts rank 1 itself."""
    child = os.fork()
    tell(f"child {child}" if child else "forked")
    work(1 if child == 0 else 0, 2, tell, {0: "wait", 1: "wait"})


def test_a_frozen_child_is_not_left_behind(tmp_path: Path) -> None:
    """Rank 0 ends the processes that it started itself: nobody else will."""
    with processes(tmp_path, parent, 1) as run:
        while run.told(0).count("ready") < 2:
            time.sleep(0.01)
        child = next(int(line.split()[1]) for line in run.told(0) if line.startswith("child"))
        os.kill(child, signal.SIGSTOP)
        assert run.codes() == [1]
        assert run.errors(0) == line(1, child, SILENT)
        deadline = time.monotonic() + 5
        while state(child) not in ("Z", ""):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def state(pid: int) -> str:
    """What the kernel says of a process: T for a frozen one, Z or nothing for a dead one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def strangers(rank: int, count: int, tell: Tell, say: bytes) -> None:
    """Somebody else comes to the door of rank 0 and says something."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"), Watchdog(place, PATIENCE, GRACE) as ours:
        if rank == 0:
            assert ours._door is not None
            port = ours._door.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(say)
                stranger.settimeout(PATIENCE / 2)
                tell("sent away" if stranger.recv(1) == b"" else "answered")
            socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.2)


@pytest.mark.parametrize(
    "say",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'["hello", "abc", 1, "here", 1, 1]\n["lost", 1, "you"]\n',
        b'["lost", 1, "you"]\n',
        b'["bye"]\n',
        b"[]\n",
        b"{}\n",
    ],
)
def test_strangers_are_sent_away(say: bytes, tmp_path: Path) -> None:
    """A port scanner, or a process of another run, is neither heard nor missed."""
    with processes(tmp_path, strangers, 2, say) as run:
        assert run.codes() == [0, 0]
        assert run.told(0) == ["sent away"] and run.errors(0) == ""


def unreachable(rank: int, count: int, tell: Tell) -> None:
    """A firewall between two machines."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"):
        os.environ["MASTER_ADDR"] = "127.0.0.2" if rank else "127.0.0.1"
        if rank == 0:
            watchdog.listen = lambda port, visitors: socket.create_server(("127.0.0.1", 0))
        with Watchdog(place, PATIENCE, GRACE):
            time.sleep(0.2)


def test_a_run_goes_on_where_nobody_can_be_reached(tmp_path: Path) -> None:
    with processes(tmp_path, unreachable, 2) as run:
        assert run.codes() == [0, 0]
        assert "rank 1 cannot reach 127.0.0.2" in run.errors(1)


def test_a_single_process_is_not_watched() -> None:
    before = threading.active_count()
    with Watchdog(ALONE):
        assert threading.active_count() == before
