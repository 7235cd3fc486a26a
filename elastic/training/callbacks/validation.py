"""Validation of every budget on fixed text."""

import logging
import math
from collections import defaultdict
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from elastic.cluster.place import from_first
from elastic.config import ObjectiveConfig
from elastic.data import Batch
from elastic.losses import Head, TopK, token_terms
from elastic.parent import Member
from elastic.routing.decide import Candidates
from elastic.routing.table import sizes
from elastic.storage.reading import all_finite
from elastic.teacher import CachedTeacher, Teacher
from elastic.training.callbacks.common import log_row
from elastic.training.module import PARENT, ElasticModule, TrainingDiverged

log = logging.getLogger(__name__)


class BudgetValidation(Callback):
    """Every budget on fixed text: loss, KL to the teacher, gap to the teacher; and the sizes
    chosen.

    The teacher is the frozen parent or, where there is none, the full member.
    """

    def __init__(self, data: DataLoader[Batch], every: int) -> None:
        self.data, self.every = data, every
        self.last_step = -1

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ElasticModule)
        if module.between_steps and module.step % self.every == 0:
            self.validate(trainer, module)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        module.compare = partial(self.compare, trainer, module)
        if module.step == 0:
            self.validate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validate(trainer, module)

    @torch.no_grad()
    def validate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure and log, once per optimizer step.

        Raises:
            TrainingDiverged: a loss is not finite. Nothing of this step is kept: stages end here
                before their checkpoint is written.
        """
        assert isinstance(module, ElasticModule)
        if module.step == self.last_step:
            return
        self.last_step = module.step
        row: dict[str, float] = {}
        if module.family is None:
            losses, divergences = self._measure(trainer, module, {PARENT: (PARENT, None)})
        else:
            choices = module.family.choices(module.progress)
            members = {
                name: (name, module.family.member(choice)) for name, choice in choices.items()
            }
            losses, divergences = self._measure(trainer, module, members)
            teacher = next(iter(members)) if module.teacher is None else PARENT
            for name, choice in choices.items():
                if name in divergences:
                    row[f"val/{name}/kl"] = divergences[name]
                    row[f"val/{name}/gap"] = losses[name] / losses[teacher] - 1
                for axis, size in sizes(choice).items():
                    row[f"router/{name}/{axis}"] = size
        row |= {f"val/{name}/loss": loss for name, loss in losses.items()}
        log_row(trainer, module, row)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        log.info("%s step %d: validation loss %s", module.stage.name, module.step, shown)
        _require_finite(module, losses, divergences)

    @torch.no_grad()
    def compare(
        self, trainer: L.Trainer, module: ElasticModule, candidates: Candidates
    ) -> dict[str, list[float]]:
        """Mean KL of every candidate to the teacher, in nats per token; that of the first process,
        on every one.

        Raises:
            TrainingDiverged: one is not finite.
        """
        assert module.family is not None
        members = {
            f"{name}/{index}": (name, module.family.member(choice))
            for name, choices in candidates.items()
            for index, choice in enumerate(choices)
        }
        divergences = from_first(self._measure(trainer, module, members)[1])
        _require_finite(module, {}, divergences)
        return {
            # Without a frozen teacher the full member teaches, and is its own best.
            name: [divergences.get(f"{name}/{index}", 0.0) for index in range(len(choices))]
            for name, choices in candidates.items()
        }

    def _measure(
        self, trainer: L.Trainer, module: ElasticModule, members: dict[str, tuple[str, Member]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Mean loss of every member and of the teacher, and mean KL to it, in nats per token.

        members: by a name for the results, the budget and how it runs.

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
            counted = batch.target_count
            teacher: Head | TopK | None = None
            if module.teacher is not None:  # once for all members
                teacher = module.teacher.distributions(batch, "validation", rows)
                loss = _teacher_loss(module.teacher, teacher, batch, config, rows)
                losses[PARENT] += loss * counted
            for name, (budget, member) in members.items():
                assert trainer.strategy.model is not None
                with trainer.precision_plugin.val_step_context():
                    terms, student = trainer.strategy.model(batch, budget, member, teacher, config)
                losses[name] += float(terms["cross_entropy"]) * counted
                if teacher is not None:
                    divergences[name] += float(terms["distillation"]) * counted
                elif module.family is not None:
                    teacher = student
            count += counted
            rows += len(batch)
        return (
            {name: total / count for name, total in losses.items()},
            {name: total / count for name, total in divergences.items()},
        )


def _require_finite(
    module: ElasticModule, losses: dict[str, float], divergences: dict[str, float]
) -> None:
    """Raise `TrainingDiverged` unless every loss and every KL is finite, on all processes alike;
    names a tensor if one is the reason."""
    figures = {f"loss of {name}": loss for name, loss in losses.items()}
    figures |= {f"KL of {name}": divergence for name, divergence in divergences.items()}
    lost = [name for name, value in figures.items() if not math.isfinite(value)]
    if not lost:
        return
    why = "no weight of this process is, so that activations overflow"
    for name, weight in module.parent.named_parameters():
        values = getattr(weight, "ds_tensor", weight)  # ZeRO-3 has a share of each
        if not all_finite(values):
            why = f"tensor {name} holds NaN or infinity"
            break
    raise TrainingDiverged(
        f"curriculum.stages.{module.stage.name}: step {module.step}: validation {', '.join(lost)} "
        f"not finite ({why}); lower model_lr or look at the data, then start again from the last "
        "checkpoint"
    )


def _teacher_loss(
    teacher: Teacher,
    predicted: Head | TopK,
    batch: Batch,
    config: ObjectiveConfig,
    first: int,
) -> float:
    """Cross-entropy of the teacher itself on validation rows, in nats per token."""
    if isinstance(predicted, TopK):
        assert isinstance(teacher, CachedTeacher)
        return teacher.cross_entropy("validation", first, batch)
    terms = token_terms(predicted, None, batch.targets, config, batch.counted)
    return float(terms["cross_entropy"])
