"""Rows of metrics: losses, router figures, learning rates, tokens/s."""

import time
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elastic.data import Batch
from elastic.training.callbacks.common import log_row, loss_of, new_tokens
from elastic.training.module import PARENT, ElasticModule

Sums = dict[str, tuple[float, float]]
"""Weighted sum and weight by name."""


class Metrics(Callback):
    """Named loss terms, router figures, rates and tokens/s, as means over the steps since last
    time.

    Passes count by the weight of their loss, so that a mean over budgets is what the step descends.
    A token counts once, however many budgets passed over it. Values stay on the device until a row
    is written, so that no step waits for one.

    Args:
        begun: `sums` of a row that was not written yet when the run stopped.
    """

    def __init__(self, every: int, begun: Sums | None = None) -> None:
        self.every, self.begun = every, begun or {}
        self.values: dict[str, list[tuple[Tensor | float, float]]] = defaultdict(list)
        self.tokens, self.since = 0, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.tokens, self.since = 0, time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ElasticModule)
        budget, weight = outputs["budget"], outputs["weight"]
        self.tokens += new_tokens(trainer, module, batch)
        self.values["train/loss"].append((loss_of(module, outputs), weight))
        for name, value in outputs["terms"].items():
            self.values[f"train/{name}"].append((value, weight))
            if budget != PARENT:
                self.values[f"train/{budget}/{name}"].append((value, weight))
        for name, value in outputs["figures"].items():
            key = (
                f"router/{name}" if name in ("temperature", "scale") else f"router/{budget}/{name}"
            )
            self.values[key].append((value, weight))
        if module.between_steps and module.step % self.every == 0 and self.tokens:
            self._write(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.tokens:
            self._write(trainer, module)

    def sums(self, trainer: L.Trainer, module: L.LightningModule) -> Sums:
        """What the means of the next row are made of so far, over all processes; this waits for
        the device."""
        names = sorted(self.values.keys() | self.begun.keys())  # on all the same: all draw alike
        if not names:
            return {}
        sums = [_sum(self.values[name], *self.begun.get(name, (0.0, 0.0))) for name in names]
        totals = torch.tensor([t for t, _ in sums], dtype=torch.float64, device=module.device)
        totals = trainer.strategy.reduce(totals, reduce_op="mean")
        return {n: (t, w) for n, t, (_, w) in zip(names, totals.tolist(), sums, strict=True)}

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        row = {name: total / weight for name, (total, weight) in self.sums(trainer, module).items()}
        seconds = time.monotonic() - self.since
        row["train/tokens_per_second"] = self.tokens / max(seconds, 1e-9)
        row["train/tokens"] = module.step * module.stage.config.batch_tokens
        row["train/gradient_norm"] = float(module.gradient_norm)
        row["train/skipped_steps"] = module.skipped_steps
        rates = module.rates(max(module.step - 1, 0))
        row["train/model_lr"] = rates[0]
        if module.router is not None:
            row["train/router_lr"] = rates[1]
        log_row(trainer, module, row)
        self.values.clear()
        self.begun = {}
        self.tokens, self.since = 0, time.monotonic()


def _sum(
    values: list[tuple[Tensor | float, float]], total: float, weight: float
) -> tuple[float, float]:
    """Weighted sum and weight of values, added to those of others one by one: a sum that was
    stopped and goes on is the same to the last bit."""
    for value, share in values:
        total += float(value) * share
        weight += share
    return total, weight
