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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.cluster_processes import is_allowed, processes, state, wait_until_allowed
from helpers.waiting import LIMIT, until

from elastic.cluster import watchdog
from elastic.cluster.place import ALONE, Place
from elastic.cluster.rendezvous import joined
from elastic.cluster.signals import AgreedExit
from elastic.cluster.watchdog import Watchdog

Tell = Callable[[str], None]
PATIENCE, GRACE = 1.0, 1.0


class Trusting(Watchdog):
    """Finds nobody frozen until the test, which has frozen somebody for good by then, allows it: on
    a busy machine anybody may be silent for a second. Notes when it gave signs of life."""

    def __init__(self, place: Place, patience: float = PATIENCE, grace: float = GRACE) -> None:
        super().__init__(place, patience, grace)
        self.beats: list[float] = []

    def _lose(self, peer: Any, how: str) -> None:
        if "no heartbeat" not in how or is_allowed("suspicion"):
            super()._lose(peer, how)

    def _send(self, message: list) -> None:
        super()._send(message)
        if message == ["heartbeat"]:
            self.beats.append(time.monotonic())


def work(rank: int, count: int, tell: Tell, how: dict[int, str]) -> None:
    """A process of a run; `how` says what each rank does in it.

    reduce   collectives, again and again; a failed one waits for its cause as long as it takes
    follow   the same, with as much time to leave as it needs
    wait     nothing: as if in a collective that never notices
    raise    an error; exit an error code; agree an agreed exit
    late     an error, once it has heard of that of another
    busy     long calls: products, and checkpoints
    """
    torch.set_num_threads(1)
    place = Place(rank, rank, count, count)
    # Only who would stay for ever is ended from outside.
    stays = how[rank] in ("reduce", "wait", "busy")
    limits = (PATIENCE, GRACE) if stays else (LIMIT, LIMIT)
    with joined(place, torch.device("cpu"), "test"), Trusting(place, *limits) as dog:
        tell("ready")
        match how[rank]:
            case "reduce" | "follow":
                watchdog.MOMENT = LIMIT
                while True:
                    dist.all_reduce(torch.ones(1))
            case "wait":
                wait_until_allowed("anything")
            case "raise":
                raise RuntimeError("out of luck\nand more")
            case "late":
                until(lambda: dog._cause)
                raise RuntimeError("out of luck")
            case "exit":
                raise SystemExit(75)
            case "agree":
                raise AgreedExit(143)
            case "busy":
                matrix, large = torch.randn(2500, 2500), torch.zeros(50_000_000)
                until(lambda: beats_during(dog, lambda: matrix @ matrix))
                until(lambda: beats_during(dog, lambda: torch.save(large, io.BytesIO())))
        tell("done")


def beats_during(dog: Trusting, call: Callable[[], object]) -> bool:
    """Whether a heartbeat was sent in the midst of a call, not just before or after it."""
    begin = time.monotonic()
    call()
    end = time.monotonic()
    edge = 0.2 * (end - begin)
    return any(begin + edge < beat < end - edge for beat in list(dog.beats))


def line(rank: int, pid: int | None, what: str, count: int = 2) -> str:
    """What users see."""
    who = f"rank {rank} of {count} (host {socket.gethostname()}, process {pid})"
    return f"\nerror: {who} {what}; stopping. The same command goes on from the last checkpoint\n"


SILENT = f"sent no heartbeat for {PATIENCE:g} s"


@pytest.mark.parametrize("waiting", ["reduce", "wait"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_run_down_at_once(
    victim: int, waiting: str, tmp_path: Path
) -> None:
    with processes(tmp_path, work, 2, {0: waiting, 1: waiting}) as run:
        run.wait_until("ready")
        run.send(victim, signal.SIGKILL)
        assert run.codes() in ([-9, 1], [1, -9]), "the silence of the dead is not waited for"
        expected = line(victim, run.all[victim].pid, "died")
        assert run.errors(1 - victim) == expected, "and no traceback of a collective"


def test_a_frozen_process_takes_the_run_down_when_patience_ends(tmp_path: Path) -> None:
    """Rank 0 in one run, and rank 1 in another beside it."""
    how = {0: "reduce", 1: "reduce"}
    with (
        processes(tmp_path / "0", work, 2, how) as first,
        processes(tmp_path / "1", work, 2, how) as second,
    ):
        for victim, run in enumerate((first, second)):
            run.wait_until("ready")
            run.freeze(run.all[victim].pid)
            run.allow("suspicion")
        assert first.codes(1) == second.codes(0) == [1]
        for victim, run in enumerate((first, second)):
            assert run.errors(1 - victim) == line(victim, run.all[victim].pid, SILENT)


def test_all_others_leave_and_one_of_a_machine_says_why(tmp_path: Path) -> None:
    with processes(tmp_path, work, 4, dict.fromkeys(range(4), "wait")) as run:
        run.wait_until("ready")
        run.send(2, signal.SIGKILL)
        assert run.codes() == [1, 1, -9, 1]
        said = [run.errors(rank) for rank in range(4)]
        assert said == [line(2, run.all[2].pid, "died", 4), "", "", ""]


def test_a_failure_is_told_to_those_who_do_not_notice(tmp_path: Path) -> None:
    with processes(tmp_path, work, 2, {0: "wait", 1: "raise"}) as run:
        assert run.codes() == [1, 1]
        said = run.errors(0)
        assert said == line(1, run.all[1].pid, "failed: RuntimeError: out of luck")


def test_an_exit_code_is_handed_on(tmp_path: Path) -> None:
    """A signal outside a fit may reach one process only."""
    with processes(tmp_path, work, 2, {0: "exit", 1: "wait"}) as run:
        assert run.codes() == [75, 75]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_that_ends_one_is_no_failure_of_the_others(victim: int, tmp_path: Path) -> None:
    """Whose collective then fails: a job that only one process may requeue must go on."""
    how = {rank: "exit" if rank == victim else "follow" for rank in range(4)}
    with processes(tmp_path, work, 4, how) as run:
        assert run.codes() == [75] * 4, run.errors(1 - victim)
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
        assert run.codes() == [75, 75]
    assert (tmp_path / "calls").read_text() == "requeue 7\n"


def slow_door(rank: int, count: int, tell: Tell) -> None:
    """Rank 0 leaves before it has looked who is there."""
    admit = Watchdog._accept

    def later(self: Watchdog) -> None:
        time.sleep(0.3)
        admit(self)

    Watchdog._accept = later  # type: ignore[method-assign]
    work(rank, count, tell, {0: "exit", 1: "wait"})


def test_what_is_said_first_of_all_is_heard(tmp_path: Path) -> None:
    with processes(tmp_path, slow_door, 2) as run:
        assert run.codes() == [75, 75]


@pytest.mark.parametrize("what", ["raise", "late", "exit", "agree"])
def test_who_fails_too_is_not_interrupted(what: str, tmp_path: Path) -> None:
    """Most errors come on all processes; each reports its own."""
    with processes(tmp_path, work, 2, {0: what, 1: what if what != "late" else "raise"}) as run:
        code = {"raise": 1, "late": 1, "exit": 75, "agree": 143}[what]
        assert run.codes() == [code, code]
        for rank in (0, 1):
            assert "error: rank" not in run.errors(rank)


def stay(rank: int, count: int, tell: Tell) -> None:
    """Rank 0, then rank 2, are done before rank 1, which has heard of the former."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"):
        with Trusting(place) as dog:
            if rank == 1:
                until(lambda: not dog._peers)
            if rank != 0:
                wait_until_allowed(f"the end of {rank}")
        tell("done")
        wait_until_allowed("farewell")


def test_who_is_done_is_not_missed(tmp_path: Path) -> None:
    with processes(tmp_path, stay, 3) as run:
        run.allow("suspicion")  # of whoever is still watched
        for rank in (0, 2, 1):
            run.allow(f"the end of {rank}")
            run.wait_until("done", rank)
        run.allow("farewell")
        assert run.codes() == [0, 0, 0]
        assert run.errors(0) + run.errors(1) + run.errors(2) == ""


def slow_end(rank: int, count: int, tell: Tell) -> None:
    """Rank 0 is done, and other threads of it go on before its last message."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"), Trusting(place) as dog:
        send = dog._send

        def later(message: list) -> None:
            if message == ["done"] and rank == 0:
                seen = len(dog.beats)
                until(lambda: len(dog.beats) > seen + 1 or not dog._thread.is_alive())
            send(message)

        dog._send = later  # type: ignore[method-assign]
        if rank == 1:
            until(lambda: not dog._peers)


def test_the_last_message_is_sent_before_connections_are_closed(tmp_path: Path) -> None:
    with processes(tmp_path, slow_end, 2) as run:
        assert run.codes() == [0, 0]


def test_heartbeats_are_sent_during_long_native_calls(tmp_path: Path) -> None:
    with processes(tmp_path, work, 2, {0: "busy", 1: "busy"}) as run:
        assert run.codes() == [0, 0]


def sleep(rank: int, count: int, tell: Tell) -> None:
    """A machine whose clock goes on by an hour; then rank 1 sends a heartbeat, rank 2 none."""
    asleep = 0.0
    watchdog.time = SimpleNamespace(  # type: ignore[assignment]
        monotonic=lambda: time.monotonic() + asleep, sleep=time.sleep
    )
    place = Place(rank, rank, count, count)
    with (
        joined(place, torch.device("cpu"), "test"),
        Watchdog(place, patience=LIMIT, grace=LIMIT) as dog,
    ):
        dist.barrier()
        asleep = 3600.0
        dist.barrier()
        if rank == 1:
            dog._send(["heartbeat"])  # rank 0 looks round
        if rank == 0:
            until(lambda: all(peer.last_seen > time.monotonic() for peer in dog._peers.values()))
        dist.barrier()


def test_a_machine_that_slept_accuses_nobody(tmp_path: Path) -> None:
    """Ctrl-Z and fg, or a closed laptop."""
    with processes(tmp_path, sleep, 3) as run:
        assert run.codes() == [0, 0, 0], run.errors(0)


def hang(rank: int, count: int, tell: Tell) -> None:
    """A process that fails, and then hangs while it leaves."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"):
        try:
            with Trusting(place):
                raise ValueError("no")
        except ValueError:
            wait_until_allowed("anything")


def test_who_hangs_on_the_way_out_is_ended(tmp_path: Path) -> None:
    with processes(tmp_path, hang, 2) as run:
        assert run.codes() == [1, 1]


def parent(rank: int, count: int, tell: Tell) -> None:
    """Rank 0, which starts rank 1 itself."""
    child = os.fork()
    tell(f"child {child}" if child else "forked")
    work(1 if child == 0 else 0, 2, tell, {0: "wait", 1: "wait"})


def test_a_frozen_child_is_not_left_behind(tmp_path: Path) -> None:
    """Rank 0 ends the processes that it started itself: nobody else will."""
    with processes(tmp_path, parent, 1) as run:
        until(lambda: run.told(0).count("ready") == 2)
        child = next(int(line.split()[1]) for line in run.told(0) if line.startswith("child"))
        run.freeze(child)
        run.allow("suspicion")
        assert run.codes() == [1]
        assert run.errors(0) == line(1, child, SILENT)
        until(lambda: state(child) in ("Z", ""))


def strangers(rank: int, count: int, tell: Tell, say: bytes) -> None:
    """Somebody else comes to the door of rank 0 and says something."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"), Trusting(place) as ours:
        if rank == 0:
            assert ours._listener is not None
            port = ours._listener.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(say)
                stranger.settimeout(LIMIT)
                tell("sent away" if stranger.recv(1) == b"" else "answered")
            socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.2)


@pytest.mark.parametrize(
    "say",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'["hello", "abc", 1, "here", 1, 1]\n["lost", 1, "you"]\n',
        b'["lost", 1, "you"]\n',
        b'["done"]\n',
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
        with Trusting(place):
            time.sleep(0.2)


def test_a_run_goes_on_where_nobody_can_be_reached(tmp_path: Path) -> None:
    with processes(tmp_path, unreachable, 2) as run:
        assert run.codes() == [0, 0]
        assert "rank 1 cannot reach 127.0.0.2" in run.errors(1)


def test_a_single_process_is_not_watched() -> None:
    before = threading.active_count()
    with Watchdog(ALONE):
        assert threading.active_count() == before
