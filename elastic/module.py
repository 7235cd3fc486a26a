"""The LightningModule: when a step happens, and to what. How is in parent, family and losses."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from elastic.config import ObjectiveConfig, OptimConfig
from elastic.curriculum import Stage, draw_passes, draw_seed, learning_rate_factor
from elastic.family import Family
from elastic.losses import Head, token_terms
from elastic.parent import HybridParent, Member

PARENT = "parent"
"""Name of the only member in a pretrain stage."""


class ElasticModule(L.LightningModule):
    """One stage of training: the parent alone (pretrain), or all budgets together (elastic).

    Args:
        parent: the weights that train; sorted in an elastic stage.
        family: members and router; None in a pretrain stage.
        teacher: the frozen, unsorted parent; None in a pretrain stage, and where the full budget's
            own pass teaches. It is neither saved nor seen by the optimizer.
        probabilities: how often each budget is drawn in this stage; the largest first.
        carried: optimizer state of the stage before, to go on with.
        document_start: the token that begins a document which sees nothing of those before it; None
            lets state and attention cross.
    """

    def __init__(
        self,
        parent: HybridParent,
        family: Family | None,
        teacher: HybridParent | None,
        stage: Stage,
        probabilities: dict[str, float],
        objective: ObjectiveConfig,
        optim: OptimConfig,
        seed: int,
        carried: dict[str, Any] | None = None,
        document_start: int | None = None,
    ) -> None:
        super().__init__()
        pretrain = stage.config.mode == "pretrain"
        assert (family is None) == pretrain
        assert (teacher is None) == (pretrain or objective.teacher == "in_place")
        self.parent = parent
        self.router = None if family is None else family.router
        self.family, self.stage = family, stage
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule
        self.probabilities, self.objective, self.optim = probabilities, objective, optim
        self.seed, self.carried, self.document_start = seed, carried, document_start
        self.micro_step = 0
        self._kept: Head | None = None

    @property
    def teacher(self) -> HybridParent | None:
        return self._teacher[0]

    @property
    def between_steps(self) -> bool:
        """Whether the last forward pass ended an optimizer step, or none has begun."""
        return self.micro_step % self.stage.accumulation == 0

    @property
    def progress(self) -> float:
        """Share of the tokens of this mode seen before the current optimizer step."""
        return self.stage.progress(self.trainer.global_step)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device).requires_grad_(False).eval()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.family is not None and self.between_steps:
            self.family.freeze_if_due(self.progress)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """One pass over a batch (b, t + 1) int64 -> its weighted loss, and what to log.

        The `stage.passes` passes over a micro-batch follow each other, the largest budget first.
        Each is a step of the gradient accumulation, so that one member's activations exist at a
        time; what the teacher says is computed in the first and kept until the last.
        """
        step, position = divmod(self.micro_step, self.stage.accumulation)
        micro_batch, turn = divmod(position, self.stage.passes)
        last = turn + 1 == self.stage.passes
        member: Member = None
        terms: dict[str, Tensor] = {}
        figures: dict[str, Tensor | float] = {}
        budget, weight, loss = PARENT, 1.0, torch.zeros((), device=self.device)
        if self.family is not None:
            seed = draw_seed(self.seed, "budget", self.stage.index, step, micro_batch)
            drawn = draw_passes(self.stage.config.budgets_per_batch, self.probabilities, seed)[turn]
            budget, weight = drawn.budget, drawn.weight
            seed = draw_seed(self.seed, "router", self.stage.index, step, position)
            draw = self.family.draw(budget, self.progress, seed)
            member, figures = draw.member, draw.figures
            terms = {name: value for name, value in draw.terms.items() if name != "total"}
            loss = draw.terms.get("total", loss)
        student = self.head(self.parent, batch, member)
        teacher = self.teach(batch) if turn == 0 else self._kept
        token_losses = token_terms(student, teacher, batch[:, 1:].flatten(), self.objective)
        scale = 1.0
        if teacher is None and self.family is not None:  # this pass teaches, by what the text says
            assert turn == 0 and self.objective.teacher == "in_place"
            scale = self.objective.cross_entropy_weight
            teacher = student[0].detach(), student[1].detach()
        self._kept = None if last else teacher
        loss = loss + scale * token_losses.pop("total")
        terms |= token_losses
        logged = {name: value.detach() for name, value in terms.items()}
        self.micro_step += 1  # before the callbacks that save it
        return {
            "loss": weight * loss,
            "budget": budget,
            "weight": weight,
            "terms": logged,
            "figures": figures,
        }

    def head(self, model: HybridParent, batch: Tensor, member: Member) -> Head:
        """Hidden states (tokens, d) of a member, and the LM head that reads them."""
        tokens, documents = batch[:, :-1], None
        if self.document_start is not None:
            documents = (tokens == self.document_start).cumsum(-1, dtype=torch.int32)
        return model(tokens, member, documents).flatten(0, 1), model.head_weight(member)

    @torch.no_grad()
    def teach(self, batch: Tensor) -> Head | None:
        """What the frozen parent says about a batch; None where there is none."""
        return None if self.teacher is None else self.head(self.teacher, batch, None)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW; vectors and scalars are never decayed, the router has a rate of its own."""
        stage, optim = self.stage.config, self.optim
        weights = list(self.parent.parameters())
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [{**group, "lr": stage.model_lr} for group in groups]
        routers = [] if self.router is None else list(self.router.parameters())
        if routers:
            groups.append({"params": routers, "weight_decay": 0.0, "lr": stage.router_lr})
        betas = (optim.beta1, optim.beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=optim.eps, fused=True)
        if self.carried is not None:
            groups_now = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self.carried["state"], "param_groups": groups_now})
        factor = LambdaLR(
            optimizer, lambda step: learning_rate_factor(stage, self.stage.steps, step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zeros, not None: a layer that no member of the step ran has a gradient, and it is
        zero."""
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.requires_grad:
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                    weight.grad.zero_()
                else:
                    weight.grad = None  # the frozen router: Adam leaves it alone

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Weights and routers apart: the router's steep gradients must not shrink the model's."""
        routers = [] if self.router is None else list(self.router.parameters())
        for weights in (list(self.parent.parameters()), routers):
            if weights:
                torch.nn.utils.clip_grad_norm_(weights, self.optim.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["elastic"] = {
            "stage": self.stage.name,
            "step": self.trainer.global_step,
            "micro_step": self.micro_step,
            "family": None if self.family is None else self.family.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["elastic"]
        self.micro_step = state["micro_step"]
        assert self.between_steps, "what was accumulated is not in a checkpoint"
        if self.family is not None:
            self.family.load_state(state["family"])
