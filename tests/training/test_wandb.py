"""A Weights & Biases that fails, stalls or is away stops no training, nor its end.

A stand-in for what it does to us; then W&B itself, in processes of their own, with what happens to
it done to it.
"""

import atexit
import csv
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
from helpers.cluster_processes import processes, wait_until_allowed
from helpers.runs import settings
from helpers.waiting import LIMIT, until
from lightning.pytorch.loggers import WandbLogger

from elastic.training import loggers
from elastic.training.loggers import WandbMetrics, build_loggers


class Inner:
    """Stands in for the logger that does the work."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self.work = work
        self.steps: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.work(step)
        self.steps.append(step)


@pytest.fixture(autouse=True)
def nothing_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "STALL_SECONDS", LIMIT)


def over(inner: Inner) -> WandbMetrics:
    return WandbMetrics(lambda mode: cast(WandbLogger, inner))


def test_rows_arrive_in_order(caplog: pytest.LogCaptureFixture) -> None:
    inner = Inner(lambda step: time.sleep(0.001))
    logger = over(inner)
    for step in range(50):
        logger.log_metrics({"loss": 0.5}, step)
    logger.finalize("success")
    assert inner.steps == list(range(50)) and not caplog.records


def test_an_error_of_wandb_is_a_warning_and_only_one(caplog: pytest.LogCaptureFixture) -> None:
    def fail(step: int) -> None:
        if step >= 2:
            raise ConnectionResetError("Connection lost\nand more")

    inner = Inner(fail)
    logger = over(inner)
    for step in range(6):
        logger.log_metrics({"loss": 0.5}, step)
        time.sleep(0.01)
    logger.finalize("success")
    logger.finalize("success")
    assert inner.steps == [0, 1] and logger.lost
    (record,) = caplog.records
    assert record.getMessage() == (
        "W&B failed (ConnectionResetError: Connection lost): training goes on without it, "
        "metrics are in metrics.csv"
    )


def test_a_wandb_that_takes_no_rows_stops_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "STALL_SECONDS", 0.1)
    stalled = threading.Event()
    inner = Inner(lambda step: cast(None, stalled.wait(2 * LIMIT)))
    logger = over(inner)
    for step in range(100):
        logger.log_metrics({"loss": 0.5}, step)
    logger.finalize("success")
    assert inner.steps == [], "training has ended while the first row still waits"
    (record,) = caplog.records
    assert record.getMessage().startswith("W&B took no row for 0.1 s: training goes on")
    stalled.set()


def test_rows_that_nobody_takes_do_not_fill_the_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "ROWS_WAITING", 10)
    stalled = threading.Event()
    logger = over(Inner(lambda step: cast(None, stalled.wait(2 * LIMIT))))
    for step in range(100):
        logger.log_metrics({"loss": 0.5}, step)
    assert logger.lost and len(caplog.records) == 1
    assert "takes no more than the 10 rows that wait for it" in caplog.text
    stalled.set()


def test_where_wandb_cannot_start_at_all_there_is_metrics_csv(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(mode: str | None) -> WandbLogger:
        raise OSError("disk full")

    logger = WandbMetrics(fail)
    logger.log_metrics({"loss": 0.5}, 0)
    logger.finalize("success")
    (record,) = caplog.records
    assert "W&B cannot be used (disk full): metrics are in metrics.csv only" in record.message


def trouble(
    rank: int, count: int, tell: Callable[[str], None], how: str, environment: dict[str, str]
) -> None:
    """A process that logs 300 rows to W&B, to which something happens after the first. Only for
    what can never come is waited no longer than a second."""
    os.environ.update({"HOME": "/nowhere", "WANDB_SILENT": "true"} | environment)
    loggers.START_SECONDS = 1.0 if how == "unreachable" else LIMIT
    loggers.STALL_SECONDS = 1.0 if how in ("SIGKILL", "SIGSTOP") else LIMIT
    loggers.FINISH_SECONDS = 1.0 if how in ("SIGKILL", "SIGSTOP", "disconnected") else LIMIT
    run_dir = Path(environment["RUN_DIR"])
    os.chdir(run_dir)
    both = build_loggers(settings(run_dir, "logger=wandb"), run_dir)

    def log(steps: range) -> None:
        for step in steps:
            for logger in both:
                row = {f"metric/{k}": step / 7 for k in range(200 if step else 1)}
                logger.log_metrics(row, step)

    log(range(1))
    until(lambda: not cast(WandbMetrics, both[1])._rows.unfinished_tasks)
    if how == "disconnected":
        tell("connected")
        wait_until_allowed("the rest")
    elif how not in ("fine", "unreachable"):
        os.kill(service(), signal.Signals[how])
    log(range(1, 300))
    for logger in both:
        logger.finalize("success")
    atexit._run_exitfuncs()  # W&B's too, as at the end of an ordinary process
    sys.exit(3)


def service() -> int:
    """The process through which W&B works for this one."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        text = stat.read_text()
        if "(wandb-core)" in text and int(text.rpartition(")")[2].split()[1]) == os.getpid():
            return int(stat.parent.name)
    raise AssertionError("there is none")


def in_trouble(directory: Path, how: str | Callable[[], None], **environment: str) -> str:
    """The errors of such a process. All rows must be there.

    how: a signal for the process of W&B, something to do after the first row, "fine", or
    "unreachable".
    """
    run_dir = directory / "run"
    run_dir.mkdir()
    environment["RUN_DIR"] = str(run_dir)
    what = how if isinstance(how, str) else "disconnected"
    with processes(directory, trouble, 1, what, environment) as run:
        if not isinstance(how, str):
            run.wait_until("connected")
            how()
            run.allow("the rest")
        assert run.codes() == [3], run.errors(0)
        with (run_dir / "metrics.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == 300
        return run.errors(0)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_run_outlives_the_process_of_wandb(how: str, tmp_path: Path) -> None:
    """For real: it is killed, or frozen; ours ends with its own exit code."""
    errors = in_trouble(tmp_path, how, WANDB_MODE="offline")
    assert errors.count("W&B") == 1 and "Traceback" not in errors, errors


def test_without_a_key_a_run_is_logged_offline(tmp_path: Path) -> None:
    errors = in_trouble(tmp_path, "fine")
    (store,) = (tmp_path / "run").glob("wandb/offline-run-*")
    why = "No API key configured. Use `wandb login` to log in."
    line = f"W&B does not answer ({why}): logging offline; when the run is over: wandb sync {store}"
    assert line in errors and errors.count("W&B") == 1, errors


class Pretender(BaseHTTPRequestHandler):
    """Answers what W&B asks at the start of a run, and takes all that is sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        if self.server.socket.fileno() < 0:  # it is gone
            self.close_connection = True
            return
        query = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        answer: dict = {"model": project | {"bucket": None}}
        if "upsertBucket" in query:
            bucket = {"id": "x", "name": "run", "displayName": "run", "config": "{}"}
            answer = {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}}
        elif "createRunFiles" in query:
            answer = {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}}
        elif "iewer" in query:
            answer = {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def network(port: int) -> dict[str, str]:
    return {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a" * 40}


def test_a_lost_connection_stops_neither_training_nor_its_end(tmp_path: Path) -> None:
    """A server that is there at the start and gone later; W&B alone would wait for it for ever."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pretender)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def disconnect() -> None:
        server.shutdown()
        server.server_close()

    errors = in_trouble(tmp_path, disconnect, **network(server.server_port))
    assert "W&B" not in errors, errors
    assert list((tmp_path / "run").glob("wandb/run-*/run-*.wandb")), "to be synced later"


@pytest.mark.slow
def test_without_a_network_a_run_starts_offline_after_a_while(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = in_trouble(tmp_path, "unreachable", **network(port))
    assert errors.count("wandb sync") == 1, errors
