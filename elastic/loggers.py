"""Where metrics go: metrics.csv always, Weights & Biases on request."""

import csv
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from elastic.config import RunConfig
from elastic.files import atomic_file


class MetricsFile(Logger):
    """metrics.csv, one row per logged step, over all stages and resumes of a run.

    Lightning's own CSV logger deletes what an earlier process wrote.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self.columns = list(self.rows[0]) if self.rows else ["step"]

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def forget_after(self, step: int) -> None:
        """Drop rows past the step that a run resumes from: they will be written again."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
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
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        with atomic_file(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def build_loggers(config: RunConfig, run_dir: Path) -> list[Logger]:
    """metrics.csv, and W&B when asked; the W&B run has the run's name and is resumed with it."""
    loggers: list[Logger] = [MetricsFile(run_dir / "metrics.csv")]
    if config.logger.wandb:
        wandb_logger = WandbLogger(
            name=config.name,
            id=run_dir.resolve().as_posix().replace("/", "-").strip("-")[-120:],
            save_dir=run_dir,
            project=config.logger.project,
            entity=config.logger.entity,
            group=config.logger.group,
            resume="allow",
        )
        wandb_logger.log_hyperparams(asdict(config))
        loggers.append(wandb_logger)
    return loggers
