"""Which token terms there are and how they add up; the budget loss by hand."""

import pytest
import torch
import torch.nn.functional as F
from helpers.heads import head, logits, targets, teacher_head

from elastic.config import ObjectiveConfig
from elastic.losses import (
    distillation_dense,
    next_multiplier,
    router_terms,
    token_terms,
)

# Tokens


def test_only_terms_with_a_weight_are_computed() -> None:
    student, teacher = head(), teacher_head()
    names = [
        set(token_terms(student, teacher, targets(), ObjectiveConfig(**weights)))  # type: ignore[arg-type]
        for weights in (
            {},
            {"cross_entropy_weight": 0.5},
            {"distillation_weight": 0.0, "cross_entropy_weight": 1.0},
        )
    ]
    assert names == [
        {"distillation", "total"},
        {"distillation", "cross_entropy", "total"},
        {"cross_entropy", "total"},
    ]


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    student, teacher = head(), teacher_head()
    config = ObjectiveConfig(
        distillation_weight=2.0, cross_entropy_weight=0.3, temperature=2.0, chunk_tokens=4
    )
    terms = token_terms(student, teacher, targets(), config)
    torch.testing.assert_close(
        terms["distillation"],
        distillation_dense(logits(student), logits(teacher), "forward_kl", 2.0).detach(),
    )
    torch.testing.assert_close(
        terms["cross_entropy"], F.cross_entropy(logits(student), targets()).detach()
    )
    torch.testing.assert_close(
        terms["total"], 2.0 * terms["distillation"] + 0.3 * terms["cross_entropy"]
    )


def test_without_a_teacher_only_the_text_counts() -> None:
    """Pretraining: the weights of the elastic stages do not apply."""
    student = head()
    config = ObjectiveConfig(distillation_weight=2.0, cross_entropy_weight=0.3, top_k=4)
    terms = token_terms(student, None, targets(), config)
    assert set(terms) == {"cross_entropy", "total"}
    expected = F.cross_entropy(logits(student), targets())
    torch.testing.assert_close(terms["cross_entropy"], expected.detach())
    torch.testing.assert_close(terms["total"], expected)
    (gradient,) = torch.autograd.grad(terms["total"], student[0])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student[0])[0])


# Router


def test_the_router_pays_price_and_square_of_the_excess() -> None:
    config = ObjectiveConfig(budget_weight=3.0)
    for size, off in ((80.0, -0.2), (120.0, 0.2), (100.0, 0.0)):
        terms, excess = router_terms(torch.tensor([size]), 100.0, torch.tensor(0.5), config)
        assert excess.item() == pytest.approx(off)
        assert terms["budget"].item() == pytest.approx(abs(off))
        assert terms["total"].item() == pytest.approx(0.5 * off + 1.5 * off**2)


def test_the_price_follows_the_excess_and_no_further_than_a_tenth() -> None:
    config, price = ObjectiveConfig(budget_rate=2.0), torch.tensor(0.5)
    for excess, expected in ((0.05, 0.6), (-0.05, 0.4), (1.0, 0.7), (-0.9, 0.3), (0.0, 0.5)):
        found = next_multiplier(price, torch.tensor(excess), config)
        assert found.item() == pytest.approx(expected)
