"""What preparing the text takes: tokens, disk and cores. No text is looked at."""

from typing import Any

from elastic.config import ParentShape, PlanConfig
from elastic.config.data import stored_bytes


def preparing(config: PlanConfig, shape: ParentShape) -> dict[str, Any]:
    """For text that no stage reads twice; a smaller one takes less."""
    stages = config.curriculum.stages.values()
    limits = [source.target_tokens for source in config.data.sources.values()]
    tokens = sum(stage.tokens for stage in stages)
    if all(limit is not None for limit in limits):
        tokens = min(tokens, sum(limit or 0 for limit in limits))
    return {
        "tokens": tokens,
        "disk_bytes": tokens * stored_bytes(shape.vocab_size),
        "core_hours": tokens / config.plan.tokens_per_core_second / 3600,
        "inline": tokens <= config.data.prepare_inline_tokens,
    }
