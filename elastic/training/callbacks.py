"""What happens beside the steps: metrics, progress, validation of every budget, checkpoints."""

import logging
import sys
import time
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from elastic.cluster.place import Place
from elastic.config import ObjectiveConfig
from elastic.losses import Head, TopK, token_terms
from elastic.parent import Member
from elastic.routing.family import sizes
from elastic.teacher import CachedTeacher, Teacher
from elastic.training.module import PARENT, ElasticModule
from elastic.training.resume import CheckpointStore, Saved, load_state, local_pieces, restore_random

log = logging.getLogger(__name__)

Outputs = dict[str, Any]
Sums = dict[str, tuple[float, float]]
"""Weighted sum and weight by name."""


def _log(trainer: L.Trainer, module: ElasticModule, metrics: dict[str, float]) -> None:
    """Write a row; its step counts over all stages."""
    row = metrics | {"stage": module.stage.index}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=module.stage.steps_before + module.step)


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
        _log(trainer, module, row)
        self.values.clear()
        self.begun = {}
        self.tokens, self.since = 0, time.monotonic()


def _new_tokens(trainer: L.Trainer, module: ElasticModule, batch: Tensor) -> int:
    """Tokens of text, over all processes, that the last pass has finished with."""
    finished = module.micro_step % module.stage.passes == 0
    return batch[:, 1:].numel() * trainer.world_size if finished else 0


def _loss(module: ElasticModule, outputs: Outputs) -> Tensor:
    """A pass' own loss: before its weight, and before Lightning divided it."""
    loss: Tensor = outputs["loss"].detach() * (module.stage.accumulation / outputs["weight"])
    return loss


def _sum(
    values: list[tuple[Tensor | float, float]], total: float, weight: float
) -> tuple[float, float]:
    """Weighted sum and weight of values, added to those of others one by one: a sum that was
    stopped and goes on is the same to the last bit."""
    for value, share in values:
        total += float(value) * share
        weight += share
    return total, weight


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
            initial=module.step * stage.config.batch_tokens,
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

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, module)  # what is wrong gets a line of its own


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
        if module.between_steps and module.step % self.every == 0:
            self.validate(trainer, module)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        if module.step == 0:
            self.validate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validate(trainer, module)

    @torch.no_grad()
    def validate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure and log, once per optimizer step."""
        assert isinstance(module, ElasticModule)
        if module.step == self.last_step:
            return
        self.last_step = module.step
        row: dict[str, float] = {}
        if module.family is None:
            losses, _ = self._measure(trainer, module, {PARENT: None})
        else:
            choices = module.family.choices(module.progress)
            members = {name: module.family.member(choice) for name, choice in choices.items()}
            losses, divergences = self._measure(trainer, module, members)
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
        log.info("%s step %d: validation loss %s", module.stage.name, module.step, shown)

    def _measure(
        self, trainer: L.Trainer, module: ElasticModule, members: dict[str, Member]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Mean loss of every member and of the teacher, and mean KL to it, in nats per token.

        Without a frozen teacher the first member, the full one, teaches the others.
        """
        losses: dict[str, float] = defaultdict(float)
        divergences: dict[str, float] = defaultdict(float)
        # Forward KL and cross-entropy in one go, the same for all runs whatever they optimise. A
        # teacher cache is at the temperature of the run alone, and has all other tokens as one.
        offline = isinstance(module.teacher, CachedTeacher)
        config = ObjectiveConfig(
            cross_entropy_weight=1.0,
            chunk_tokens=module.objective.chunk_tokens,
            temperature=module.objective.temperature if offline else 1.0,
        )
        count, rows = 0, 0
        for batch in self.data:
            batch = batch.to(module.device)
            targets = batch[:, 1:].flatten()
            teacher: Head | TopK | None = None
            if module.teacher is not None:  # once for all members
                teacher = module.teacher.distributions(batch, "validation", rows)
                loss = _teacher_loss(module.teacher, teacher, targets, config, rows, len(batch))
                losses[PARENT] += loss * len(targets)
            for name, member in members.items():
                assert trainer.strategy.model is not None
                with trainer.precision_plugin.val_step_context():
                    terms, student = trainer.strategy.model(batch, member, teacher, config)
                losses[name] += float(terms["cross_entropy"]) * len(targets)
                if teacher is not None:
                    divergences[name] += float(terms["distillation"]) * len(targets)
                elif module.family is not None:
                    teacher = student
            count += len(targets)
            rows += len(batch)
        return (
            {name: total / count for name, total in losses.items()},
            {name: total / count for name, total in divergences.items()},
        )


def _teacher_loss(
    teacher: Teacher,
    predicted: Head | TopK,
    targets: Tensor,
    config: ObjectiveConfig,
    first: int,
    rows: int,
) -> float:
    """Cross-entropy of the teacher itself on validation rows, in nats per token."""
    if isinstance(predicted, TopK):
        assert isinstance(teacher, CachedTeacher)
        return teacher.cross_entropy("validation", first, rows)
    return float(token_terms(predicted, None, targets, config)["cross_entropy"])


class Checkpoints(Callback):
    """Resume checkpoints: every few steps, at each stage's end, and when a signal asks to stop."""

    def __init__(self, store: CheckpointStore, every: int, metrics: Metrics) -> None:
        self.store, self.every, self.metrics = store, every, metrics

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ElasticModule)
        if module.resumable and module.step % self.every == 0:
            self.save(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        if module.family is not None:  # a stage may end where the router freezes
            module.family.freeze_if_due(module.progress)
        self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: ElasticModule) -> None:
        """Write where the run stands, once per step; every process takes part."""
        state = module.state()
        latest = self.store.latest
        at = (state["stage"], state["step"])
        if latest is not None and at == (latest.state["stage"], latest.state["step"]):
            return
        pieces, steps = local_pieces(
            module.parent, trainer.optimizers[0], trainer.global_rank, trainer.world_size
        )
        shared = {} if module.router_optimizer is None else module.router_optimizer.state()
        state |= {"optimizer_steps": steps, "row": self.metrics.sums(trainer, module)}
        self.store.save(state, pieces, shared, module.step == module.stage.steps)


class Restore(Callback):
    """Sets optimizer and random generators to a checkpoint, once the strategy has made its own of
    them; weights and routers were loaded before."""

    def __init__(self, saved: Saved, place: Place) -> None:
        self.saved, self.place = saved, place

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        steps = self.saved.state["optimizer_steps"]
        load_state(module.parent, trainer.optimizers[0], self.saved.pieces, steps, self.place.rank)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Only now: PyTorch's loaders draw a seed whenever they start, whether they need it or not.
        random = self.saved.random(self.place)
        if random is not None:
            restore_random(random)
