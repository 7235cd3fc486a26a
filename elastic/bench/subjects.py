"""What is measured: a random parent with members of given sizes, and one training step of it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic.config import (
    BudgetConfig,
    ImportanceConfig,
    ObjectiveConfig,
    OptimConfig,
    ParentConfig,
    ParentShape,
    SpaceConfig,
    StageConfig,
    TrainerConfig,
)
from elastic.data import one_document
from elastic.losses import token_terms
from elastic.members.architecture import Space
from elastic.members.balanced import balanced_family
from elastic.members.search import Choice
from elastic.members.targets import stand_in_drop_order
from elastic.parent import HybridParent, Member
from elastic.parent.ssd import resolve_kernels
from elastic.parent.stock import stock_config
from elastic.routing.curriculum import plan
from elastic.routing.sizes import check_sizes
from elastic.teacher import OnlineTeacher
from elastic.training.module import PARENT, ElasticModule


def shape_of(config: ParentConfig) -> ParentShape:
    assert config.shape is not None, "the settings make sure of it"
    return config.shape


def random_parent(config: ParentConfig, seed: int, device: torch.device) -> HybridParent:
    """A parent as a run would start it."""
    kernels = resolve_kernels(config.kernels, device)
    parent = HybridParent(shape_of(config), kernels, config.activation_checkpointing)
    return parent.initialise(torch.Generator().manual_seed(seed)).to(device)


def random_tokens(vocabulary: int, batch: int, time: int, seed: int) -> Tensor:
    """(b, t + 1) int64: the inputs and the last target."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, time + 1), generator=generator)


# Members


def drop_order(space: Space) -> tuple[int, ...]:
    """Which layers go first: no ranking is there, and for the cost any order will do."""
    return stand_in_drop_order(space, ImportanceConfig())


def balanced_members(
    config: SpaceConfig, shape: ParentShape, shares: Sequence[float]
) -> dict[str, Choice]:
    """A family in which every axis shrinks by about the same factor; keyed by share.

    Raises:
        ConfigError: the space does not fit the parent, or reaches no member of such a size.
    """
    budgets = {key(share): BudgetConfig(params=share) for share in shares}
    space, targets, *_ = check_sizes(shape, config, budgets, ImportanceConfig(), {})
    return balanced_family(space, drop_order(space), targets, config.tolerance, config.nested)


def key(share: float) -> str:
    """Name of a budget."""
    return f"{share:g}"


# Training steps


class TrainingStep:
    """A parent under the trainer's own module: optimizer, zeroing, clipping and losses are its.

    Only Lightning's loop is left out. `distils` adds a frozen copy of the parent as teacher.
    """

    def __init__(
        self,
        parent: HybridParent,
        batch: Tensor,
        chunk_tokens: int,
        precision: str,
        distils: bool = False,
    ) -> None:
        self.batch = one_document(batch)
        batch_tokens = self.batch.inputs.numel()
        stage = StageConfig(
            mode="pretrain",
            tokens=batch_tokens,
            sequence_length=self.batch.inputs.shape[1],
            batch_tokens=batch_tokens,
            model_lr=1e-4,
        )
        (planned,) = plan({"bench": stage}, TrainerConfig())
        self.device = next(parent.parameters()).device
        self.batch = self.batch.to(self.device)
        self.precision = precision
        self.teacher = OnlineTeacher(parent, precision) if distils else None
        if self.teacher is not None:
            self.teacher.start(self.device, "bench")
        parent.to(_stored(precision))
        objective = ObjectiveConfig(chunk_tokens=chunk_tokens)
        self.module = ElasticModule(
            parent, None, None, None, planned, {PARENT: 1.0}, objective, OptimConfig(), seed=0
        )
        self.optimizer = self.module.configure_optimizers()

    def __call__(self, member: Member = None) -> None:
        """One optimizer step."""
        module, batch, teacher = self.module, self.batch, None
        with autocast(self.device, self.precision):
            student = module.head(batch, member)
            if self.teacher is not None:
                teacher = self.teacher.distributions(batch, "train", 0)
            loss = token_terms(student, teacher, batch.targets, module.objective)["total"]
        module.optimizer_zero_grad(0, 0, self.optimizer)
        loss.backward()
        module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()


class StockStep:
    """The same step of stock transformers, in the way that is usual there."""

    def __init__(
        self, shape: ParentShape, batch: Tensor, precision: str, device: torch.device
    ) -> None:
        config = NemotronHConfig(**stock_config(shape), use_cache=False)
        self.model = NemotronHForCausalLM(config).float().to(device, _stored(precision)).train()
        self.batch, self.precision, self.device = batch.to(device), precision, device
        optim = OptimConfig()
        self.clip = optim.gradient_clip
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-4,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def copy_weights(self, parent: HybridParent) -> None:
        """Take over a parent's weights."""
        weights = parent.state_dict()
        self.model.load_state_dict(
            {name.replace("backbone.", "model.", 1): weight for name, weight in weights.items()}
        )

    def __call__(self, chunk: int) -> None:
        """One optimizer step, the scan in chunks of that size."""
        for layer in self.model.model.layers:
            if hasattr(layer.mixer, "chunk_size"):
                layer.mixer.chunk_size = chunk
        with autocast(self.device, self.precision):
            logits = self.model(self.batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), self.batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()


def _stored(precision: str) -> torch.dtype:
    """Type of the weights."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """What Lightning does around a step in bf16-mixed."""
    if precision == "bf16-mixed":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
