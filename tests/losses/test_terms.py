"""Which token terms there are and how they add up; budget and identity losses by hand."""

import pytest
import torch
import torch.nn.functional as F
from helpers.heads import head, logits, targets, teacher_head
from torch import Tensor

from elastic.config import ObjectiveConfig
from elastic.losses import (
    budget_distance,
    distillation_dense,
    identity_distance,
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


def test_budget_distance_is_relative_and_absolute() -> None:
    assert budget_distance(torch.tensor([80.0]), 100).item() == pytest.approx(0.2)
    assert budget_distance(torch.tensor([120.0]), 100).item() == pytest.approx(0.2)
    assert budget_distance(torch.tensor([80.0, 100.0]), 100).item() == pytest.approx(0.1)
    assert budget_distance(torch.tensor([80.0, 120.0]), 100).item() == pytest.approx(0.2)
    assert budget_distance(torch.tensor([12e9]), 6e9).item() == pytest.approx(1.0)


def one_hot(index: int, decisions: int = 1, choices: int = 3) -> Tensor:
    return torch.eye(choices)[index].expand(1, decisions, choices)


def test_identity_distance_is_zero_at_the_full_choice_and_only_there() -> None:
    full = {"hidden": one_hot(0), "ffn": one_hot(0, decisions=2)}
    assert identity_distance(full).item() == 0.0
    assert identity_distance({}).item() == 0.0
    for axis in full:
        moved = full | {axis: 0.9 * full[axis] + 0.1 / 3}
        assert identity_distance(moved).item() > 0
        assert identity_distance(full | {axis: one_hot(1, full[axis].shape[1])}).item() > 0.5


def test_identity_distance_is_a_sum_over_axes_of_mean_squares() -> None:
    """method.md, section 5.3, point 5."""
    wrong = {"hidden": one_hot(2), "ffn": one_hot(1, decisions=4)}
    assert identity_distance(wrong).item() == pytest.approx(2 / 3 + 2 / 3)
    half = {"ffn": torch.cat([one_hot(0), one_hot(1)], dim=1)}
    assert identity_distance(half).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("is_full", [True, False])
def test_only_the_full_budget_is_pulled_to_the_identity(is_full: bool) -> None:
    config = ObjectiveConfig(budget_weight=3.0, identity_weight=5.0)
    distributions = {"hidden": one_hot(1)}
    terms = router_terms(torch.tensor([80.0]), 100.0, is_full, distributions, config)
    assert set(terms) == {"budget", "total"} | ({"identity"} if is_full else set())
    identity = 5.0 * 2 / 3 if is_full else 0.0
    assert terms["budget"].item() == pytest.approx(0.2)
    assert terms["total"].item() == pytest.approx(3.0 * 0.2 + identity)
