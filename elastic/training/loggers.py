"""Where metrics go: metrics.csv always, Weights & Biases on request."""

import csv
import logging
import os
import queue
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from elastic.config import RunConfig
from elastic.storage.files import atomic_file

log = logging.getLogger(__name__)

START_SECONDS = 20.0
"""How long W&B may take to answer at the start; it adds about ten of its own."""

FINISH_SECONDS = 60.0
"""How long a run that is done waits for what W&B has not received yet."""

STALL_SECONDS = 30.0
"""How long the end of a stage waits for rows that W&B has not taken yet."""

ROWS_WAITING = 10_000
"""Rows kept for a W&B that takes none; more are dropped."""


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv; `ValueError` where they do not say which step they are of."""
    try:
        lines = path.read_bytes().decode().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last
        rows: list[dict[str, Any]] = list(csv.DictReader(whole, strict=True))
        for row in rows:
            int(row["step"]), float(row["stage"])
            if None in row or None in row.values() or "\0" in "".join(row.values()):
                raise ValueError(f"the row of step {row['step']} has other columns")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: damaged ({reason}); restore it, or move it away to go on without its rows"
        ) from error
    return rows


class MetricsFile(Logger):
    """metrics.csv, one row per logged step, over all stages and resumes of a run.

    Lightning's own CSV logger deletes what an earlier process wrote.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            self.rows = _rows(path)
        self.columns = list(self.rows[0]) if self.rows else ["step"]

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def forget_after(self, stage: int, step: int) -> None:
        """Drop rows past the point that a run resumes from: they will be written again.

        stage: index. A stage begins at the step with which the one before it has ended.
        """

        def before(row: dict[str, Any]) -> bool:
            return (float(row["stage"]), int(row["step"])) <= (stage, step)

        self.rows = [row for row in self.rows if before(row)]
        self._rewrite()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        self.rows.append(row)
        new = sorted(set(row) - set(self.columns))
        if new or not self.path.is_file():
            self.columns += new
            self._rewrite()
        else:
            with _named(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        with _named(self.path), atomic_file(self.path) as temporary:
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the disk name the file, which a failed write does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


class WandbMetrics(Logger):
    """Weights & Biases, which may fail, stall or be unreachable: one warning, and training
    goes on.

    Rows are handed over by a thread. W&B itself keeps what it cannot send on disk, and sends it
    when the connection is back.

    Args:
        start: makes the logger that does the work, in the mode of the environment (None), or
            "offline" if W&B does not answer.
    """

    def __init__(self, start: Callable[[str | None], WandbLogger]) -> None:
        super().__init__()
        self.lost = False
        self._rows: queue.Queue[tuple[dict[str, float], int | None]] = queue.Queue(ROWS_WAITING)
        self._inner = self._started(start)
        if self._inner is not None:
            threading.Thread(target=self._hand_over, daemon=True, name="wandb").start()

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """The configuration goes with the start."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._inner is None or self.lost:
            return
        try:
            self._rows.put_nowait((dict(metrics), step))
        except queue.Full:
            self._lose(f"takes no more than the {ROWS_WAITING} rows that wait for it")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until all rows are handed over; end W&B's own process where that hangs, since it
        would keep ours from ending."""
        deadline = time.monotonic() + STALL_SECONDS
        while self._rows.unfinished_tasks and not self.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._rows.unfinished_tasks and not self.lost:
            self._lose(f"took no row for {STALL_SECONDS:g} s")
        if self.lost and self._inner is not None:
            _end_service()

    @rank_zero_only
    def _started(self, start: Callable[[str | None], WandbLogger]) -> WandbLogger | None:
        try:
            return start(None)
        except Exception as error:  # whatever it is: it is no reason not to train
            reason = _first_line(error)
        try:
            _end_service()  # it still holds the run's name
            logger = start("offline")
        except Exception as error:
            log.warning(
                "W&B cannot be used (%s): metrics are in metrics.csv only", _first_line(error)
            )
            return None
        log.warning(
            "W&B does not answer (%s): logging offline; when the run is over: wandb sync %s",
            reason,
            Path(logger.experiment.dir).parent,
        )
        return logger

    def _hand_over(self) -> None:
        """The thread: one row after the other, until W&B is lost."""
        assert self._inner is not None
        while not self.lost:
            metrics, step = self._rows.get()
            try:
                self._inner.log_metrics(metrics, step)
            except Exception as error:
                self._lose(f"failed ({type(error).__name__}: {_first_line(error)})")
            self._rows.task_done()

    def _lose(self, how: str) -> None:
        if not self.lost:
            self.lost = True
            log.warning("W&B %s: training goes on without it, metrics are in metrics.csv", how)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _end_service() -> None:
    """Kill the process through which W&B works, a child of this one: at our exit W&B would wait
    for it, for ever."""
    import wandb

    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended meanwhile
            continue
        if name == "wandb-core" and int(rest.split()[1]) == os.getpid():
            os.kill(int(stat.parent.name), signal.SIGKILL)
    with suppress(Exception):  # it is gone already
        wandb.teardown()


def build_loggers(config: RunConfig, run_dir: Path) -> list[Logger]:
    """metrics.csv, and W&B when asked; the W&B run has the run's name and is resumed with it."""
    loggers: list[Logger] = [MetricsFile(run_dir / "metrics.csv")]
    if config.logger.wandb:
        loggers.append(WandbMetrics(partial(_start_wandb, config, run_dir)))
    return loggers


def _start_wandb(config: RunConfig, run_dir: Path, mode: str | None) -> WandbLogger:
    """Start or resume the W&B run of a run directory."""
    import wandb  # a second that most runs can do without

    logger = WandbLogger(
        name=config.name,
        id=run_dir.resolve().as_posix().replace("/", "-").strip("-")[-120:],
        save_dir=run_dir,
        project=config.logger.project,
        entity=config.logger.entity,
        group=config.logger.group,
        resume="allow",
        settings=wandb.Settings(init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS),
        mode=mode,
    )
    logger.log_hyperparams(asdict(config))
    return logger
