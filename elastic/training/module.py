"""The LightningModule: when a step happens, and to what. How is in parent, family and losses."""

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.adamw import AdamW

from elastic.cluster.strategies import ZeroStrategy
from elastic.config import ObjectiveConfig, OptimConfig
from elastic.data import Batch
from elastic.losses import Head, TopK, token_terms
from elastic.parent import HybridParent, Member
from elastic.parent.hybrid import Block
from elastic.routing.curriculum import Stage, draw_seed, learning_rate_factor, step_passes
from elastic.routing.decide import Compare
from elastic.routing.family import Family
from elastic.routing.nested import FamilyRouter
from elastic.routing.router import Router, RouterOptimizer
from elastic.teacher import Teacher

log = logging.getLogger(__name__)

PARENT = "parent"
"""Name of the only member in a pretrain stage."""


class TrainingDiverged(FloatingPointError):
    """Loss or gradient was not finite for too many steps in a row."""


class ElasticModule(L.LightningModule):
    """One stage of training: the parent alone (pretrain), or all budgets together (elastic).

    Only the parent is a submodule, so that the strategy sees nothing else. The routers are stepped
    here, alike on every process.

    Args:
        parent: the weights that train; sorted in an elastic stage.
        family: members and router; None in a pretrain stage.
        teacher: predictions of the frozen, unsorted parent; None in a pretrain stage, and
            where the full budget's own pass teaches.
        router_optimizer: None in a pretrain stage.
        probabilities: how often each budget is drawn in this stage; the largest first.
        max_bad_steps: as trainer.max_bad_steps.
    """

    leaf_classes = [Block]
    """Modules whose weights ZeRO-3 gathers together."""

    def __init__(
        self,
        parent: HybridParent,
        family: Family | None,
        teacher: Teacher | None,
        router_optimizer: RouterOptimizer | None,
        stage: Stage,
        probabilities: dict[str, float],
        objective: ObjectiveConfig,
        optim: OptimConfig,
        seed: int,
        max_bad_steps: int = 10,
    ) -> None:
        super().__init__()
        pretrain = stage.config.mode == "pretrain"
        assert (family is None) == (router_optimizer is None) == pretrain
        assert (teacher is None) == (pretrain or objective.teacher == "in_place")
        self.parent = parent
        self.family, self.stage, self.teacher = family, stage, teacher
        self.router_optimizer = router_optimizer
        self.probabilities, self.objective, self.optim = probabilities, objective, optim
        self.seed = seed
        self.max_bad_steps = max_bad_steps
        self.micro_step = 0
        self.bad_steps, self.skipped_steps = 0, 0
        """Steps that were skipped: in a row, and in the whole stage."""
        self.gradient_norm: Tensor | float = 0.0
        """Of the last step, of all weights, before clipping."""
        self.compare: Compare | None = None
        """Measures candidates when the router freezes."""
        self._kept: Head | TopK | None = None
        self._finite = True

    @property
    def router(self) -> Router | FamilyRouter | None:
        return None if self.family is None else self.family.router

    @property
    def zero(self) -> ZeroStrategy | None:
        """What zeroes, clips and steps the weights instead of us, if something does."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, ZeroStrategy) else None

    @property
    def step(self) -> int:
        """Optimizer steps of this stage that are done."""
        return self.micro_step // self.stage.accumulation

    @property
    def between_steps(self) -> bool:
        """Whether the last forward pass ended an optimizer step, or none has begun."""
        return self.micro_step % self.stage.accumulation == 0

    @property
    def resumable(self) -> bool:
        """Whether a run may stop here and lose nothing. At its end a stage has still to be
        measured; then it writes a checkpoint in any case."""
        return self.between_steps and self.step < self.stage.steps

    @property
    def progress(self) -> float:
        """Share of the tokens of this mode seen before the current optimizer step."""
        return self.stage.progress(self.step)

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of weights and routers in optimizer step `step` of the stage."""
        held = 0.0 if self.family is None else self.family.held_until
        factor = learning_rate_factor(self.stage, step, held)
        return self.stage.config.model_lr * factor, self.stage.config.router_lr * factor

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.start(self.device, self.stage.name)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if not self.between_steps:
            return
        if self.family is not None:
            self.family.freeze_if_due(self.progress, self.compare)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.rates(self.step)[0]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One pass over a batch -> its weighted loss, and what to log.

        The `stage.passes` passes over a micro-batch follow each other, the largest budget first.
        Each is a step of the gradient accumulation, so that one member's activations exist at a
        time; the teacher's predictions are computed in the first and kept until the last.
        """
        step, position = divmod(self.micro_step, self.stage.accumulation)
        micro_batch, turn = divmod(position, self.stage.passes)
        last = turn + 1 == self.stage.passes
        member: Member = None
        terms: dict[str, Tensor] = {}
        figures: dict[str, Tensor | float] = {}
        budget, weight, loss = PARENT, 1.0, torch.zeros((), device=self.device)
        if self.family is not None:
            number = micro_batch // self.stage.micro_batches
            drawn = step_passes(self.stage, self.probabilities, self.seed, step)[number][turn]
            budget, weight = drawn.budget, drawn.weight
            world, group = self.trainer.world_size, 0
            if self.family.soft:  # a member that runs sliced is the same on every process
                group = self.global_rank * self.family.config.noise_groups // world
            where = (self.stage.index, step, number, turn, group)
            seed = draw_seed(self.seed, "router", *where)
            tokens = batch.inputs.numel() * world
            draw = self.family.draw(budget, self.progress, seed, tokens)
            member, figures = draw.member, draw.figures
            terms = {name: value for name, value in draw.terms.items() if name != "total"}
            loss = draw.terms.get("total", loss)
        student = self.head(batch, member, self.own(budget))
        teacher = self.distributions(batch) if turn == 0 else self._kept
        token_losses = token_terms(student, teacher, batch.targets, self.objective, batch.counted)
        scale = 1.0
        if teacher is None and self.family is not None:  # this pass teaches, and learns by text
            assert turn == 0 and self.objective.teacher == "in_place"
            scale = self.objective.cross_entropy_weight
            teacher = student[0].detach(), student[1].detach()
        self._kept = None if last else teacher
        loss = loss + scale * batch.share * token_losses.pop("total")
        terms |= token_losses
        logged = {name: value.detach() for name, value in terms.items()}
        # A loss that is not finite makes every gradient so, and the step is skipped.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        self.micro_step += 1
        return {
            "loss": weight * loss,
            "budget": budget,
            "weight": weight,
            "terms": logged,
            "figures": figures,
        }

    def forward(
        self,
        batch: Batch,
        budget: str,
        member: Member,
        teacher: Head | TopK | None,
        objective: ObjectiveConfig,
    ) -> tuple[dict[str, Tensor], Head]:
        """Loss terms of a budget's member on a batch, and its head, for validation: inside a
        forward pass ZeRO-3 has the weights."""
        x, weight = self.head(batch, member, self.own(budget))
        terms = token_terms((x, weight), teacher, batch.targets, objective, batch.counted)
        return terms, (x.detach(), weight.detach())

    def own(self, budget: str) -> int | None:
        """Position of a budget whose own norm weights count; None for the whole parent."""
        return None if self.family is None else self.family.smaller.get(budget)

    def head(self, batch: Batch, member: Member, own: int | None = None) -> Head:
        """Hidden states (tokens, d) of a member, and the LM head that reads them."""
        hidden = self.parent(batch.inputs, member, batch.documents, own)
        return hidden.flatten(0, 1), self.parent.head_weight(member)

    def distributions(self, batch: Batch) -> Head | TopK | None:
        """The teacher's predictions for the training batch at hand; None where there is none."""
        if self.teacher is None:
            return None
        number = self.micro_step // self.stage.passes
        first = (number * self.trainer.world_size + self.global_rank) * len(batch)
        return self.teacher.distributions(batch, "train", first)

    def configure_optimizers(self) -> Optimizer:
        """AdamW; vectors (those of several budgets too) and scalars are never decayed. The rate is
        set in every step."""
        optim, weights = self.optim, list(self.parent.parameters())
        norms = {w for name, w in self.parent.named_parameters() if name.endswith(".own")}
        # Weights that ZeRO-3 has partitioned have no dimensions left but in `ds_shape`.
        ndim = {w: 1 if w in norms else len(getattr(w, "ds_shape", w.shape)) for w in weights}
        groups: list[dict[str, Any]] = [
            {"params": [w for w in weights if ndim[w] > 1], "weight_decay": optim.weight_decay},
            {"params": [w for w in weights if ndim[w] <= 1], "weight_decay": 0.0},
        ]
        betas = (optim.beta1, optim.beta2)
        return AdamW(groups, lr=self.rates(self.step)[0], betas=betas, eps=optim.eps, fused=True)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zeros, not None: a layer that no member of the step ran has a gradient, and it is
        zero."""
        if self.zero is not None:
            return  # its own affair
        for weight in self.parent.parameters():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.zero_()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and drop what is not finite: a weight without gradient is not stepped."""
        if self.zero is not None:
            return  # its own affair
        weights = list(self.parent.parameters())
        self.gradient_norm = clip_grad_norm_(weights, self.optim.gradient_clip)
        self._finite = bool(self.gradient_norm.isfinite())
        if not self._finite:
            for weight in weights:
                weight.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step the weights, then the routers; count what had to be skipped."""
        optimizer.step(closure=optimizer_closure)
        if not self.between_steps:
            return
        if self.zero is not None:
            self.gradient_norm, self._finite = self.zero.gradient_norm, not self.zero.overflow
        good = self._finite
        if self.router_optimizer is not None:
            if good:
                good = self.router_optimizer.step(self.rates(self.step - 1)[1])
            else:
                self.router_optimizer.forget()
        if self.family is not None:
            self.family.stepped(good)
        self.bad_steps = 0 if good else self.bad_steps + 1
        if good:
            return
        self.skipped_steps += 1
        log.warning(
            "%s step %d: loss or gradient is not finite; skipped (%d in a row, "
            "trainer.max_bad_steps=%d)",
            self.stage.name, self.step, self.bad_steps, self.max_bad_steps,
        )  # fmt: skip
        if self.bad_steps >= self.max_bad_steps:
            raise TrainingDiverged(
                f"curriculum.stages.{self.stage.name}: step {self.step} was number "
                f"{self.bad_steps} in a row whose loss or gradient is not finite "
                "(trainer.max_bad_steps); lower model_lr or look at the data, then start again "
                "from the last checkpoint"
            )
        if self.skipped_steps == self.step == self.stage.steps:  # fewer than max_bad_steps
            raise TrainingDiverged(
                f"curriculum.stages.{self.stage.name}: loss or gradient was not finite in any of "
                f"its {self.step} steps, and nothing was trained; lower model_lr or look at the "
                "data, then start again from the last checkpoint"
            )

    def state(self) -> dict[str, Any]:
        """Where the stage stands, as JSON; weights, optimizer and router are apart."""
        assert self.between_steps, "what was accumulated is not in a checkpoint"
        return {
            "stage_index": self.stage.index,
            "stage": self.stage.name,
            "step": self.step,
            "bad_steps": self.bad_steps,
            "skipped_steps": self.skipped_steps,
            "family": None if self.family is None else self.family.state(),
        }

    def load_state(self, state: dict[str, Any], routers: dict[str, Tensor]) -> None:
        """Go on from a checkpoint: within the same stage, or at the end of the one before.

        routers: as `RouterOptimizer.state`; empty in a pretrain stage.
        """
        self.bad_steps = state["bad_steps"]
        if state["stage"] == self.stage.name:
            # Another number of processes may need another number of passes for a step.
            self.micro_step = state["step"] * self.stage.accumulation
            self.skipped_steps = state["skipped_steps"]
        if self.family is not None and self.router_optimizer is not None:
            self.router_optimizer.load_state(routers)
            self.family.load_state(state["family"])
