"""Planned memory against real training steps on a CPU: the trainer's own module on small parents.

Compared: weights, gradients and optimizer state byte by byte; what autograd keeps between the
passes, tensor by tensor, with weights left out; and the most that is alive at any time in a step.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.alive import Alive, saved_bytes
from helpers.runs import settings
from helpers.strategies import tiny_shape

from elastic.bench.subjects import TrainingStep, autocast
from elastic.cluster import strategies
from elastic.config import OptimConfig, ParentShape, RunConfig, SpaceConfig
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer, Space
from elastic.members.families import nested_families
from elastic.members.search import Search
from elastic.members.targets import smaller_budgets, stand_in_drop_order, targets_of
from elastic.parent import HybridParent, Keep, Member, ssd, ssd_ref
from elastic.plan import blocks, memory
from elastic.plan.memory import Run, pass_memory, router_weights, static_memory
from elastic.routing.masks import hard_keep
from elastic.routing.nested import FamilyRouter
from elastic.routing.router import Router, RouterOptimizer
from elastic.teacher import OnlineTeacher

SHAPE = tiny_shape(
    pattern="M-M*-M-",
    hidden_size=96,
    vocab_size=512,
    intermediate_size=400,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=24,
    n_groups=2,
    ssm_state_size=16,
)
WIDE = dataclasses.replace(SHAPE, hidden_size=256, intermediate_size=1024, pattern="M-*-M-")
MEMBER = Architecture(
    64, (MambaLayer(0, 4, 16), MLPLayer(1, 208), AttentionLayer(3, 4), MLPLayer(4, 304))
)
SOFT = frozenset({"hidden", "ffn", "mamba_heads", "depth"})
CASES: dict[str, tuple[ParentShape, Any, int, int]] = {
    "short": (SHAPE, None, 4, 50),
    "long": (SHAPE, None, 1, 512),
    "wide": (WIDE, None, 2, 200),
    "sliced": (SHAPE, MEMBER, 2, 256),
    "soft": (SHAPE, "soft", 2, 256),
}
SMALL: dict[str, tuple[ParentShape, Any, int, int]] = {
    "few": (SHAPE, None, 2, 40),
    "few, sliced": (SHAPE, MEMBER, 2, 40),
}
"""Parent, how it runs, sequences, and tokens per sequence; few where products are slow."""

CHECKPOINTED = "parent.activation_checkpointing=true"

both_ways = pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointed"])


@cache
def base(checkpointing: bool, precision: str = "32-true") -> RunConfig:
    """One CPU process; weights in bfloat16 are a matter of ZeRO, which plans a pass alike."""
    config = settings(
        Path("unused"),
        f"trainer.strategy={'zero1' if precision == 'bf16-true' else 'single'}",
        f"parent.activation_checkpointing={checkpointing}",
        f"trainer.precision={precision}",
    )
    config.objective.chunk_tokens = 64
    return config


def soft_masks(shape: ParentShape) -> Keep:
    """Masks as the router makes them, with gradients; attention heads are left alone."""
    keep = hard_keep(shape, Architecture.full(shape))
    layers = []
    for kind, layer in zip(shape.kinds, keep.layers, strict=True):
        assert layer.gate is not None and layer.width is not None
        layer.gate.requires_grad_()
        width = None if kind == "attention" else layer.width.requires_grad_()
        layers.append(dataclasses.replace(layer, width=width, channels=None, share=None))
    assert keep.hidden is not None
    return Keep(keep.hidden.requires_grad_(), tuple(layers))


def prepared(
    case: str, checkpointing: bool, distils: bool = False, precision: str = "32-true"
) -> tuple[TrainingStep, Member]:
    """A step with its gradients and optimizer state, as from the second one on."""
    shape, how, sequences, length = (CASES | SMALL)[case]
    parent = HybridParent(shape, activation_checkpointing=checkpointing)
    parent.initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(shape.vocab_size, (sequences, length + 1), generator=generator)
    member: Member = soft_masks(shape) if how == "soft" else how
    step = TrainingStep(parent, batch, 64, precision, distils)
    step.module.optimizer_zero_grad(0, 0, step.optimizer)
    step.optimizer.step()
    return step, member


def planned(
    case: str, checkpointing: bool, distils: bool = False, precision: str = "32-true"
) -> memory.Pass:
    shape, how, sequences, length = (CASES | SMALL)[case]
    sliced = how if isinstance(how, Architecture) else Architecture.full(shape)
    run = Run(case, sliced, SOFT if how == "soft" else frozenset())
    return pass_memory(base(checkpointing, precision), shape, run, sequences, length, distils)


def rounded_weights(shape: ParentShape, checkpointing: bool, precision: str) -> float:
    """Copies of the weights that autocast makes, which the plan counts as weights."""
    space = Space.build(SpaceConfig(), shape)
    own = static_memory(
        base(True, precision), shape, router_weights(base(True, precision), space)
    ).weights
    return (
        static_memory(
            base(checkpointing, precision),
            shape,
            router_weights(base(checkpointing, precision), space),
        ).weights
        - own
    )


@pytest.mark.parametrize("shape", [SHAPE, WIDE, dataclasses.replace(SHAPE, tied_head=True)])
def test_weights_gradients_optimizer_and_teacher_are_exact(shape: ParentShape) -> None:
    parent = HybridParent(shape).initialise(torch.Generator())
    step = TrainingStep(parent, torch.zeros(1, 9, dtype=torch.int64), 64, "32-true", distils=True)
    step()
    plan = static_memory(
        base(False), shape, router_weights(base(False), Space.build(SpaceConfig(), shape))
    )
    weights = list(parent.parameters())
    assert isinstance(step.teacher, OnlineTeacher)
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    assert plan.weights == sum(w.nbytes for w in weights)
    assert plan.gradients == sum(w.grad.nbytes for w in weights if w.grad is not None)
    assert plan.optimizer == sum(value.nbytes for value in states if value.ndim)
    assert plan.teacher == sum(w.nbytes for w in step.teacher.model.parameters())
    assert plan.total == plan.weights + plan.gradients + plan.optimizer + plan.teacher


def test_a_router_over_families_is_exact() -> None:
    kind = dataclasses.replace(base(False).router, kind="members")
    config = dataclasses.replace(base(False), router=kind)
    space = Space.build(config.space, config.parent.shape)
    order = stand_in_drop_order(space, config.importance)
    search = Search(space, order, config.space.tolerance)
    families = nested_families(search, targets_of(config.budgets, space.shape), config.space.nested)
    router = FamilyRouter(families, config.router, torch.Generator())
    count = sum(weight.numel() for weight in router.parameters())
    planned_bytes = static_memory(config, config.parent.shape, router_weights(config, space)).router
    assert planned_bytes == 16 * count


def test_the_router_is_exact() -> None:
    """Weights, gradients and two moments, all float32."""
    config = base(False)
    space = Space.build(
        dataclasses.replace(config.space, heterogeneous=["ffn"]), config.parent.shape
    )
    learned = smaller_budgets(targets_of(config.budgets, space.shape))
    router = Router(space, len(learned), config.router, torch.Generator())
    weights = list(router.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    tensors = [*weights, *(weight.grad for weight in weights)]
    optimizer = RouterOptimizer(router, OptimConfig())
    optimizer.step(1e-3)
    tensors += [s for state in optimizer.adam.state.values() for s in state.values() if s.ndim]
    plan = static_memory(config, config.parent.shape, router_weights(config, space))
    assert plan.router == sum(tensor.nbytes for tensor in tensors)


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_what_a_pass_keeps_is_what_autograd_keeps(case: str, checkpointing: bool) -> None:
    """Unique storages of saved tensors, parameters left out; masks are the rest of the 1%."""
    step, member = prepared(case, checkpointing)
    measured = saved_bytes(
        lambda: step.module.head(step.batch, member), list(step.module.parent.parameters())
    )
    assert planned(case, checkpointing).activations == pytest.approx(measured, rel=0.01)


@both_ways
@pytest.mark.parametrize(
    ("case", "distils"),
    [("short", True), ("long", False), ("wide", True), ("sliced", True), ("soft", False)],
)
def test_the_peak_of_a_step_is_the_planned_one(
    case: str, checkpointing: bool, distils: bool
) -> None:
    """What the step needs beside weights, gradients and optimizer state: within 5%."""
    step, member = prepared(case, checkpointing, distils)
    with Alive() as alive:
        step(member)
    assert planned(case, checkpointing, distils).peak == pytest.approx(alive.peak, rel=0.05)


@pytest.mark.parametrize(
    ("case", "precision", "checkpointing"),
    [
        ("few", "bf16-mixed", False),
        ("few", "bf16-mixed", True),
        ("few", "bf16-true", False),
        ("few, sliced", "bf16-true", True),
    ],
)
def test_types_are_those_of_the_precision(case: str, precision: str, checkpointing: bool) -> None:
    """Kept tensors and peak under autocast, and with weights in bfloat16: within 10%."""
    step, member = prepared(case, checkpointing, True, precision)

    def forward() -> Any:
        with autocast(step.device, precision):
            return step.module.head(step.batch, member)

    measured = saved_bytes(forward, list(step.module.parent.parameters()))
    copies = rounded_weights(SHAPE, checkpointing, precision)
    plan = planned(case, checkpointing, True, precision)
    assert plan.activations + copies == pytest.approx(measured, rel=0.05)
    with Alive() as alive:
        step(member)
    assert plan.peak + copies == pytest.approx(alive.peak, rel=0.10)


def test_constants_are_those_of_the_code() -> None:
    assert blocks.TORCH_CHUNK == ssd_ref.CHUNK
    assert blocks.MAMBA_SSM_CHUNK == ssd.MAMBA_SSM_CHUNK
    assert memory.BUCKET == strategies.BUCKET


def test_zero_partitions_what_its_stage_says() -> None:
    """Bytes per weight of W processes, as measured once on two (docs/planning.md)."""
    stages = [f"curriculum.stages.{stage}.batch_tokens=8192" for stage in ("short", "long")]
    config = settings(Path("unused"), "trainer.precision=bf16-mixed", CHECKPOINTED, *stages)
    space = Space.build(SpaceConfig(), SHAPE)
    count = memory.held_parameters(SHAPE)

    def parts(strategy: str, world: int, offload: bool = False) -> tuple[float, ...]:
        trainer = dataclasses.replace(
            config.trainer,
            strategy=strategy, devices=world, offload_optimizer=offload, micro_batch_tokens=None,
        )  # fmt: skip
        static = static_memory(
            dataclasses.replace(config, trainer=trainer), SHAPE, router_weights(config, space)
        )
        return tuple(
            round(part / count, 9) for part in (static.weights, static.gradients, static.optimizer)
        )

    assert parts("zero1", 2) == (2, 6, 6)
    assert parts("zero2", 2) == (2, 2, 6)
    assert parts("zero3", 2) == (1, 2, 6)
    assert parts("zero3", 8) == (0.25, 0.5, 1.5)
    assert parts("zero2", 8, offload=True) == (2, 0, 0)
