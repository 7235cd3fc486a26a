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
from elastic.parent import Member

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
            losses, _ = self._measure(module, {PARENT: None})
        else:
            choices = module.family.choices(module.progress)
            members = {name: module.family.member(choice) for name, choice in choices.items()}
            losses, divergences = self._measure(module, members)
            for name, choice in choices.items():
                row[f"val/{name}/kl"] = divergences[name]
                row[f"val/{name}/gap"] = losses[name] / losses[PARENT] - 1
                for axis, size in sizes(choice).items():
                    row[f"router/{name}/{axis}"] = size
        row |= {f"val/{name}/loss": loss for name, loss in losses.items()}
        _log(trainer, module, row)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        log.info("%s step %d: validation loss %s", module.stage.name, trainer.global_step, shown)

    def _measure(
        self, module: ElasticModule, members: dict[str, Member]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Mean loss of every member and of the teacher, and mean KL to it, in nats per token."""
        losses: dict[str, float] = defaultdict(float)
        divergences: dict[str, float] = defaultdict(float)
        chunk, count = module.objective.chunk_tokens, 0
        for batch in self.data:
            batch = batch.to(module.device)
            targets = batch[:, 1:].flatten()
            teacher = module.teach(batch)  # once for all members
            if teacher is not None:
                losses[PARENT] += float(cross_entropy(teacher, targets, chunk)) * len(targets)
            for name, member in members.items():
                student = module.head(module.parent, batch, member)
                losses[name] += float(cross_entropy(student, targets, chunk)) * len(targets)
                if teacher is not None:
                    divergence = float(distillation(student, teacher, 1.0, chunk))
                    divergences[name] += divergence * len(targets)
            count += len(targets)
        return (
            {name: total / count for name, total in losses.items()},
            {name: total / count for name, total in divergences.items()},
        )


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
