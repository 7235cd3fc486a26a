"""Stages, as planned from settings."""

from elastic.config import StageConfig, TrainerConfig
from elastic.routing.curriculum import Stage, plan


def stage(**fields: object) -> StageConfig:
    defaults: dict[str, object] = {
        "tokens": 1000,
        "sequence_length": 10,
        "batch_tokens": 100,
        "model_lr": 1e-3,
        "warmup_steps": 0,
    }
    return StageConfig(**(defaults | fields))  # type: ignore[arg-type]


BUDGETS = ["full", "medium", "small"]


def only(config: StageConfig, **trainer: object) -> Stage:
    """Plan of a single stage."""
    (planned,) = plan({"one": config}, TrainerConfig(**trainer))  # type: ignore[arg-type]
    return planned
