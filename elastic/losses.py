"""Losses, pure: distillation and cross-entropy through the LM heads in chunks, budget, identity.

Token losses are means over tokens, in nats. A [tokens, vocabulary] tensor never exists whole: each
chunk is recomputed in the backward pass, so that the extra memory is O(chunk x vocabulary).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elastic.config import ObjectiveConfig

Head = tuple[Tensor, Tensor]
"""Hidden states (tokens, d) and the LM head (v, d) that reads them; d may differ between models."""


def distillation_dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Forward KL(teacher || student) of logits (tokens, v), times temperature^2, mean over tokens.

    The squared temperature keeps the gradient's size (arXiv 1503.02531); the plain twin of the
    chunked loss.
    """
    targets = torch.log_softmax(teacher.float() / temperature, dim=-1)
    guesses = torch.log_softmax(student.float() / temperature, dim=-1)
    return (targets.exp() * (targets - guesses)).sum(-1).mean() * temperature**2


def distillation(student: Head, teacher: Head, temperature: float, chunk: int) -> Tensor:
    """`distillation_dense` from hidden states, `chunk` tokens at a time. No gradient to the
    teacher."""
    head, teacher_head = student[1], teacher[1].detach()

    def of_chunk(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        loss = distillation_dense(F.linear(x, weight), F.linear(y, teacher_head), temperature)
        return loss * x.shape[0]

    return _chunked(of_chunk, student[0], teacher[0].detach(), head, chunk)


def cross_entropy(student: Head, targets: Tensor, chunk: int) -> Tensor:
    """Mean negative log-likelihood of targets (tokens,), `chunk` tokens at a time."""

    def of_chunk(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), y, reduction="sum")

    return _chunked(of_chunk, student[0], targets, student[1], chunk)


def _chunked(
    of_chunk: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    head: Tensor,
    chunk: int,
) -> Tensor:
    """Sum a loss over chunks of tokens and divide by their number."""
    tokens = x.shape[0]
    total = x.new_zeros((), dtype=torch.float32)
    for start in range(0, tokens, chunk):
        part = x[start : start + chunk], y[start : start + chunk], head
        if torch.is_grad_enabled() and tokens > chunk:  # a single chunk is within the bound anyway
            total = total + checkpoint(of_chunk, *part, use_reentrant=False)
        else:
            total = total + of_chunk(*part)
    return total / tokens


def budget_distance(expected: Tensor, target: float) -> Tensor:
    """|expected size / target - 1|, mean over the batch (arXiv 2511.16664, section 3.3)."""
    return (expected / target - 1).abs().mean()


def identity_distance(distributions: Mapping[str, Tensor]) -> Tensor:
    """Squared distance of every axis from the full-size choice, index 0; for the full budget."""
    total = torch.zeros(())
    for values in distributions.values():
        one_hot = torch.zeros_like(values)
        one_hot[..., 0] = 1.0
        total = total.to(values.device) + (values - one_hot).square().mean()
    return total


def token_terms(
    student: Head, teacher: Head | None, targets: Tensor, config: ObjectiveConfig
) -> dict[str, Tensor]:
    """Named token losses that have a weight; `total` is their weighted sum.

    teacher None trains on the text alone (pretraining).
    """
    if teacher is None:
        loss = cross_entropy(student, targets, config.chunk_tokens)
        return {"cross_entropy": loss, "total": loss}
    terms = {}
    total = torch.zeros((), device=student[0].device)
    if config.distillation_weight > 0:
        terms["distillation"] = distillation(
            student, teacher, config.temperature, config.chunk_tokens
        )
        total = total + config.distillation_weight * terms["distillation"]
    if config.cross_entropy_weight > 0:
        terms["cross_entropy"] = cross_entropy(student, targets, config.chunk_tokens)
        total = total + config.cross_entropy_weight * terms["cross_entropy"]
    return terms | {"total": total}


def router_terms(
    expected: Tensor,
    target: float,
    is_full: bool,
    distributions: Mapping[str, Tensor],
    config: ObjectiveConfig,
) -> dict[str, Tensor]:
    """Named router losses; `total` is their weighted sum. Only the full budget has an identity
    loss."""
    terms = {"budget": budget_distance(expected, target)}
    total = config.budget_weight * terms["budget"]
    if is_full:
        terms["identity"] = identity_distance(distributions)
        total = total + config.identity_weight * terms["identity"]
    return terms | {"total": total}
