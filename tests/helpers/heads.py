"""Random hidden states and LM heads for the tests of losses, and the plain way through them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.config import ObjectiveConfig
from elastic.losses import Head, TopK, distillation_dense, remainder_dense

TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 23, 31, 5, 9
WEIGHTS = {
    "distillation": (1.0, 0.0),
    "cross-entropy": (0.0, 0.6),
    "both": (1.7, 0.6),
}
"""Of distillation and of cross-entropy."""


def head(
    width: int = WIDTH,
    seed: int = 0,
    tokens: int = TOKENS,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float64,
) -> Head:
    """Hidden states and LM head that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, width, generator=generator) for n in (tokens, vocabulary))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def teacher_head(dtype: torch.dtype = torch.float64) -> Head:
    return head(TEACHER_WIDTH, 1, dtype=dtype)


def logits(model: Head) -> Tensor:
    return F.linear(model[0], model[1])


def targets(tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(9))


def top_k_dense(teacher: Tensor, k: int, temperature: float) -> TopK:
    """Of whole logits."""
    values, indices = torch.log_softmax(teacher.detach() / temperature, dim=-1).topk(k)
    return TopK(indices, values)


def objective(weights: str = "distillation", **settings: Any) -> ObjectiveConfig:
    distillation, cross_entropy = WEIGHTS[weights]
    return ObjectiveConfig(
        distillation_weight=distillation, cross_entropy_weight=cross_entropy, **settings
    )


def dense_terms(
    student: Head, teacher: Head | None, text: Tensor, config: ObjectiveConfig
) -> dict[str, Tensor]:
    """What `token_terms` computes, on logits that exist whole and by autograd alone."""
    z = logits(student)
    terms: dict[str, Tensor] = {}
    divergence, temperature = config.divergence, config.temperature
    if teacher is not None and config.distillation_weight:
        y = logits(teacher).detach()
        if config.top_k is None:
            loss = distillation_dense(z, y, divergence, temperature)
        else:
            kept = top_k_dense(y, config.top_k, temperature)
            loss = remainder_dense(z, kept, divergence, temperature)
        terms["distillation"] = loss
    if config.cross_entropy_weight:
        terms["cross_entropy"] = F.cross_entropy(z, text)
    weights = {
        "distillation": config.distillation_weight,
        "cross_entropy": config.cross_entropy_weight,
    }
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return terms | {"total": total}


def gradients(loss: Tensor, model: Head) -> tuple[Tensor, Tensor]:
    """To hidden states and head."""
    x, weight = torch.autograd.grad(loss, model)
    return x, weight
