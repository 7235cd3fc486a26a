"""Named terms of the objective: losses of tokens, and of the router's expected sizes."""

import dataclasses

from torch import Tensor

from elastic.config import ObjectiveConfig
from elastic.losses.chunked import Head, head_loss, require_top_k
from elastic.losses.divergences import TopK

FAR = 0.1
"""Largest distance from the target, as a share of it, that a multiplier grows by."""


def check_objective(config: ObjectiveConfig, vocab_size: int) -> None:
    """Raise ConfigError when the objective does not fit a parent's vocabulary."""
    if config.top_k is not None:
        require_top_k(config.top_k, vocab_size)


def token_terms(
    student: Head,
    teacher: Head | TopK | None,
    targets: Tensor,
    config: ObjectiveConfig,
    counted: Tensor | None = None,
) -> dict[str, Tensor]:
    """Token losses that have a weight, and `total`, their weighted sum.

    Only `total` is differentiable, once, in the student's hidden states and head; the named terms
    are for the log. Terms are means over the counted tokens, in nats.

    Args:
        teacher: hidden states and head, or its cached top-k; no gradient reaches it. None trains on
            the text alone (pretraining), whatever the weights.
        targets: (tokens,) int64, the next token of each.
        counted: (n,) int64, the tokens that count. No logit of any other is formed, and their
            gradient is exactly zero. None counts all.
    """
    if teacher is None:
        config = dataclasses.replace(config, distillation_weight=0.0, cross_entropy_weight=1.0)
    if counted is not None:
        student = student[0].index_select(0, counted), student[1]
        targets = targets.index_select(0, counted)
        if isinstance(teacher, TopK):
            teacher = teacher.take(counted)
        elif teacher is not None:
            teacher = teacher[0].index_select(0, counted), teacher[1]
    total, terms = head_loss(student, teacher, targets, config)
    return terms | {"total": total}


def router_terms(
    expected: Tensor, target: float, multiplier: Tensor, config: ObjectiveConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """What a budget's router pays for an expected cost that is not its goal, and the excess
    expected / target - 1 itself, without gradient.

    An augmented Lagrangian: multiplier x excess + budget_weight / 2 x excess^2. A fixed price of
    the distance (arXiv 2511.16664, section 3.3) ends off the target wherever distillation gains
    more by size than that price; the multiplier grows until it does not (`next_multiplier`).
    """
    excess = (expected / target - 1).mean()
    total = multiplier * excess + config.budget_weight / 2 * excess.square()
    return {"budget": excess.abs(), "total": total}, excess.detach()


def next_multiplier(multiplier: Tensor, excess: Tensor, config: ObjectiveConfig) -> Tensor:
    """Dual ascent, once per optimizer step: the price rises while a member is too large, and falls
    while it is too small.

    An excess counts at most `FAR`: on the way from the whole parent down the quadratic term does
    the work, and a price that grew all the way would carry the size far below the target.
    """
    return multiplier + config.budget_rate * excess.clamp(-FAR, FAR)
