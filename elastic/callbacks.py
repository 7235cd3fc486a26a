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

from elastic.config import ObjectiveConfig
from elastic.family import sizes
from elastic.files import atomic_file
from elastic.losses import token_terms
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

    Passes count by the weight of their loss, so that a mean over budgets is what the step descends.
    A token counts once, however many budgets passed over it. Values stay on the device until a row
    is written, so that no step waits for one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.values: dict[str, list[tuple[Tensor | float, float]]] = defaultdict(list)
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
        budget, weight = outputs["budget"], outputs["weight"]
        self.tokens += _new_tokens(trainer, module, batch)
        self.values["train/loss"].append((_loss(module, outputs), weight))
        for name, value in outputs["terms"].items():
            self.values[f"train/{name}"].append((value, weight))
            if budget != PARENT:
                self.values[f"train/{budget}/{name}"].append((value, weight))
        for name, value in outputs["figures"].items():
            key = (
                f"router/{name}" if name in ("temperature", "scale") else f"router/{budget}/{name}"
            )
            self.values[key].append((value, weight))
        if module.between_steps and trainer.global_step % self.every == 0 and self.tokens:
            self._write(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.tokens:
            self._write(trainer, module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        row = {name: _mean(values) for name, values in self.values.items()}
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


def _new_tokens(trainer: L.Trainer, module: ElasticModule, batch: Tensor) -> int:
    """Tokens of text, over all processes, that the last pass has finished with."""
    finished = module.micro_step % module.stage.passes == 0
    return batch[:, 1:].numel() * trainer.world_size if finished else 0


def _loss(module: ElasticModule, outputs: Outputs) -> Tensor:
    """A pass' own loss: before its weight, and before Lightning divided it."""
    loss: Tensor = outputs["loss"].detach() * (module.stage.accumulation / outputs["weight"])
    return loss


def _mean(values: list[tuple[Tensor | float, float]]) -> float:
    """Weighted mean; this waits for the device."""
    total = sum(weight for _, weight in values)
    return sum(float(value) * weight for value, weight in values) / total


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
        assert isinstance(module, ElasticModule)
        due = time.time() - self.bar.last_print_t >= self.bar.mininterval
        if due:  # only then is the loss fetched from the device
            self.loss = float(_loss(module, outputs))
            phase = (
                "" if module.family is None else "soft " if not module.family.frozen else "sliced "
            )
            self.bar.set_postfix_str(f"{phase}{outputs['budget']} loss {self.loss:.3f}", False)
        self.bar.update(_new_tokens(trainer, module, batch))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()


class BudgetValidation(Callback):
    """Every budget on fixed text: loss, KL to the teacher, gap to the teacher; and the sizes
    chosen.

    The teacher is the frozen parent or, where there is none, the full member.
    """

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
        assert isinstance(module, ElasticModule)
        if module.between_steps and trainer.global_step % self.every == 0:
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
            teacher = next(iter(members)) if module.teacher is None else PARENT
            for name, choice in choices.items():
                if name in divergences:
                    row[f"val/{name}/kl"] = divergences[name]
                    row[f"val/{name}/gap"] = losses[name] / losses[teacher] - 1
                for axis, size in sizes(choice).items():
                    row[f"router/{name}/{axis}"] = size
        row |= {f"val/{name}/loss": loss for name, loss in losses.items()}
        _log(trainer, module, row)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        log.info("%s step %d: validation loss %s", module.stage.name, trainer.global_step, shown)

    def _measure(
        self, module: ElasticModule, members: dict[str, Member]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Mean loss of every member and of the teacher, and mean KL to it, in nats per token.

        Without a frozen teacher the first member, the full one, teaches the others.
        """
        losses: dict[str, float] = defaultdict(float)
        divergences: dict[str, float] = defaultdict(float)
        # Forward KL and cross-entropy in one go, the same for all runs whatever they optimise.
        config = ObjectiveConfig(
            cross_entropy_weight=1.0, chunk_tokens=module.objective.chunk_tokens
        )
        count = 0
        for batch in self.data:
            batch = batch.to(module.device)
            targets = batch[:, 1:].flatten()
            teacher = module.teach(batch)  # once for all members
            if teacher is not None:
                terms = token_terms(teacher, None, targets, config)
                losses[PARENT] += float(terms["cross_entropy"]) * len(targets)
            for name, member in members.items():
                student = module.head(module.parent, batch, member)
                terms = token_terms(student, teacher, targets, config)
                losses[name] += float(terms["cross_entropy"]) * len(targets)
                if teacher is not None:
                    divergences[name] += float(terms["distillation"]) * len(targets)
                elif module.family is not None:
                    teacher = student
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
        if module.between_steps and trainer.global_step % self.every == 0:
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
