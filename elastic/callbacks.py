"""What happens beside the steps: metrics, progress, validation of every budget, checkpoints."""

import logging
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from elastic.family import sizes
from elastic.files import atomic_file
from elastic.losses import cross_entropy, distillation
from elastic.module import PARENT, ElasticModule

log = logging.getLogger(__name__)

Outputs = dict[str, Any]


def _step(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Optimizer steps over all stages."""
    assert isinstance(module, ElasticModule)
    return module.stage.steps_before + trainer.global_step


def _log(trainer: L.Trainer, module: L.LightningModule, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=_step(trainer, module))


class Metrics(Callback):
    """Named loss terms, router figures, rates and tokens/s, as means over the steps since last
    time.

    Values stay on the device until a row is written, so that no step waits for one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.values: dict[str, list[Tensor | float]] = defaultdict(list)
        self.tokens, self.since = 0, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.values.clear()
        self.tokens, self.since = 0, time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ElasticModule)
        budget = outputs["budget"]
        self.tokens += batch[:, 1:].numel() * trainer.world_size
        self.values["train/loss"].append(outputs["loss"].detach() * module.stage.accumulation)
        for name, value in outputs["terms"].items():
            self.values[f"train/{name}"].append(value)
            if budget != PARENT:
                self.values[f"train/{budget}/{name}"].append(value)
        for name, value in outputs["figures"].items():
            key = (
                f"router/{name}" if name in ("temperature", "scale") else f"router/{budget}/{name}"
            )
            self.values[key].append(value)
        stepped = module.micro_step % module.stage.accumulation == 0
        if stepped and trainer.global_step % self.every == 0 and self.tokens:
            self._write(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.tokens:
            self._write(trainer, module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        row = {
            name: float(torch.stack([torch.as_tensor(v).float().cpu() for v in values]).mean())
            for name, values in self.values.items()
        }
        seconds = time.monotonic() - self.since
        row["train/tokens_per_second"] = self.tokens / max(seconds, 1e-9)
        row["train/stage"] = module.stage.index
        row["train/tokens"] = trainer.global_step * module.stage.config.batch_tokens
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        row["train/model_lr"] = rates[0]
        if module.router is not None:
            row["train/router_lr"] = rates[-1]
        _log(trainer, module, row)
        self.on_train_start(trainer, module)


class Progress(Callback):
    """One bar per stage: budget, loss, tokens/s and time left; a line now and then without a
    terminal."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.loss = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        if not trainer.is_global_zero:
            return
        stage = module.stage
        self.bar = tqdm(
            desc=stage.name,
            total=stage.tokens,
            initial=trainer.global_step * stage.config.batch_tokens,
            unit="tok",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        if self.bar is None:
            return
        due = time.time() - self.bar.last_print_t >= self.bar.mininterval
        if due:  # only then is the loss fetched from the device
            assert isinstance(module, ElasticModule)
            self.loss = float(outputs["loss"]) * module.stage.accumulation
            phase = (
                "" if module.family is None else "soft " if not module.family.frozen else "sliced "
            )
            self.bar.set_postfix_str(f"{phase}{outputs['budget']} loss {self.loss:.3f}", False)
        self.bar.update(batch[:, 1:].numel() * trainer.world_size)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()


class BudgetValidation(Callback):
    """Every budget on fixed text: loss, KL to the teacher, gap to the parent; and the sizes
    chosen."""

    def __init__(self, data: DataLoader[Tensor], every: int) -> None:
        self.data, self.every = data, every
        self.last_step = -1
        self.parent_loss: float | None = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step > 0:
            self.validate(trainer, module)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self.validate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validate(trainer, module)

    @torch.no_grad()
    def validate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure and log, once per optimizer step."""
        assert isinstance(module, ElasticModule)
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        row: dict[str, float] = {}
        if module.family is None:
            row[f"val/{PARENT}/loss"] = self._measure(module, None)[0]
        else:
            if self.parent_loss is None:
                self.parent_loss = self._teacher_loss(module)
            row[f"val/{PARENT}/loss"] = self.parent_loss
            for name, choice in module.family.choices(module.progress).items():
                loss, divergence = self._measure(module, module.family.member(choice))
                row[f"val/{name}/loss"] = loss
                row[f"val/{name}/kl"] = divergence
                row[f"val/{name}/gap"] = loss / self.parent_loss - 1
                for axis, size in sizes(choice).items():
                    row[f"router/{name}/{axis}"] = size
        _log(trainer, module, row)
        shown = ", ".join(
            f"{name.split('/')[1]} {value:.4f}" for name, value in row.items() if "/loss" in name
        )
        log.info("%s step %d: validation loss %s", module.stage.name, trainer.global_step, shown)

    def _measure(self, module: ElasticModule, member: Any) -> tuple[float, float]:
        """Mean loss, and mean KL to the teacher (0 without one), in nats per token."""
        chunk, totals, count = module.objective.chunk_tokens, torch.zeros(2), 0
        for batch in self.data:
            batch = batch.to(module.device)
            tokens = batch[:, 1:].numel()
            student, teacher = module.head(module.parent, batch, member), module.teach(batch)
            loss = cross_entropy(student, batch[:, 1:].flatten(), chunk)
            kl = torch.zeros(()) if teacher is None else distillation(student, teacher, 1.0, chunk)
            totals += torch.stack([loss.cpu(), kl.cpu()]) * tokens
            count += tokens
        loss_mean, kl_mean = (totals / count).tolist()
        return loss_mean, kl_mean

    def _teacher_loss(self, module: ElasticModule) -> float:
        total, count = 0.0, 0
        for batch in self.data:
            batch = batch.to(module.device)
            targets = batch[:, 1:].flatten()
            head = module.teach(batch)
            assert head is not None
            total += float(cross_entropy(head, targets, module.objective.chunk_tokens)) * len(
                targets
            )
            count += len(targets)
        return total / count


class Checkpoints(Callback):
    """checkpoints/last.ckpt: everything a run needs to go on, every few steps and at each stage's
    end."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ElasticModule)
        stepped = module.micro_step % module.stage.accumulation == 0
        if stepped and trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write atomically; every rank takes part, the first one writes."""
        if trainer.is_global_zero:
            with atomic_file(self.path) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            trainer.save_checkpoint(self.path)
        trainer.strategy.barrier()  # no rank may read the file before it has its name
