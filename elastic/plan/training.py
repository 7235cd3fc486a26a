"""What training takes: tokens, steps, passes, FLOPs and GPU-hours, stage by stage."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from elastic.config import ParentShape, PlanConfig, RunConfig
from elastic.members.architecture import Architecture
from elastic.members.cost import flops_per_token
from elastic.plan.memory import on_gpu
from elastic.plan.ranking import ranking_work
from elastic.routing.curriculum import Stage, budget_probabilities, inclusion, plan
from elastic.routing.sizes import Sizes

SEPARATE_TOKENS, SCRATCH_TOKENS = 750e9, 40e12
"""6B and 9B by sequential compression, and pretrained from scratch (arXiv 2511.16664, table 2)."""


@dataclass(frozen=True)
class StageWork:
    """One stage; FLOPs are totals over all processes."""

    name: str
    tokens: int
    steps: int
    batch_tokens: int
    sequence_length: int
    passes_per_step: int
    """Forward passes of one process for one optimizer step."""
    sequences_per_pass: int
    soft_share: float
    """Of its tokens, those before the router freezes."""
    forward: float
    """FLOPs of the members' forward passes."""
    backward: float
    recomputed: float
    teacher: float

    @property
    def flops(self) -> float:
        return self.forward + self.backward + self.recomputed + self.teacher


def stage_work(
    config: RunConfig, shape: ParentShape, stage: Stage, members: Mapping[str, Architecture]
) -> StageWork:
    """What a stage computes.

    While the router learns, every budget computes the whole parent; afterwards each its own member.
    The backward pass costs twice the forward pass, and checkpointing one more of these.
    """
    length, tokens = stage.config.sequence_length, stage.tokens
    whole = flops_per_token(shape, Architecture.full(shape), length)
    soft, forward, teacher = 0.0, float(whole), 0.0
    if stage.config.mode == "elastic":
        soft = 0.0 if config.members_given else _soft_share(stage, config.router.freeze_at)
        passes = passes_per_token(stage, list(members))
        frozen = sum(
            times * flops_per_token(shape, members[name], length) for name, times in passes.items()
        )
        forward = soft * sum(passes.values()) * whole + (1 - soft) * frozen
        teacher = 0.0 if config.objective.teacher in ("offline", "in_place") else float(whole)
    again = forward if config.parent.activation_checkpointing else 0.0
    return StageWork(
        name=stage.name,
        tokens=tokens,
        steps=stage.steps,
        batch_tokens=stage.config.batch_tokens,
        sequence_length=length,
        passes_per_step=stage.accumulation,
        sequences_per_pass=stage.batch_sequences,
        soft_share=soft,
        forward=tokens * forward,
        backward=2 * tokens * forward,
        recomputed=tokens * again,
        teacher=tokens * teacher,
    )


def _soft_share(stage: Stage, freeze_at: float) -> float:
    """Share of a stage's tokens before the freeze."""
    until = freeze_at * stage.tokens_of_mode - stage.tokens_before
    return min(max(until / stage.tokens, 0.0), 1.0)


def passes_per_token(stage: Stage, budgets: list[str]) -> dict[str, float]:
    """How often, on average, a token passes through each budget's member; largest first."""
    return inclusion(budget_probabilities(stage.config, budgets), stage.passes)


def gpu_hours(config: PlanConfig, flops: float) -> float:
    """At the assumed share of the peak."""
    return flops / (config.plan.gpu_tflops * 1e12 * config.plan.utilisation) / 3600


def cost_of(config: PlanConfig, hours: float) -> float | None:
    """Of so many GPU-hours, in the price's currency; None without a price or on CPU processes."""
    price = config.plan.price_per_gpu_hour
    return price * hours if price is not None and on_gpu(config) else None


def training(
    config: PlanConfig, sizes: Sizes, members: Mapping[str, Architecture]
) -> dict[str, Any]:
    """Ranking, all stages and their sums, as JSON."""
    shape, stages = sizes.space.shape, []
    ranking = _ranking(config, sizes)
    for stage in plan(config.curriculum.stages, config.trainer):
        work = stage_work(config, shape, stage, members)
        hours = gpu_hours(config, work.flops)
        stages.append(
            asdict(work) | {"mode": stage.config.mode, "flops": work.flops, "gpu_hours": hours}
        )
    elastic = sum(stage["tokens"] for stage in stages if stage["mode"] == "elastic")
    hours = ranking["gpu_hours"] + sum(stage["gpu_hours"] for stage in stages)
    return {
        "ranking": ranking,
        "stages": stages,
        "gpus": config.trainer.world_size,
        "tokens": sum(stage["tokens"] for stage in stages),
        "elastic_tokens": elastic,
        "flops": ranking["flops"] + sum(stage["flops"] for stage in stages),
        "gpu_hours": hours,
        "days": hours / config.trainer.world_size / 24,
        "cost": cost_of(config, hours),
        "separate_tokens": SEPARATE_TOKENS,
        "scratch_tokens": SCRATCH_TOKENS,
        "separate_over_elastic": SEPARATE_TOKENS / elastic if elastic else None,
        "scratch_over_elastic": SCRATCH_TOKENS / elastic if elastic else None,
    }


def _ranking(config: PlanConfig, sizes: Sizes) -> dict[str, Any]:
    """Of ranking; all GPUs are taken until the busiest one is done."""
    work = ranking_work(config, sizes)
    hours = gpu_hours(config, work.busiest * config.trainer.world_size)
    days = hours / config.trainer.world_size / 24
    return asdict(work) | {"flops": work.flops, "gpu_hours": hours, "days": days}
