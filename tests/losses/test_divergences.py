"""Divergences by hand, and their closed forms beside autograd through the plain ones."""

import itertools
import math

import pytest
import torch
from helpers.heads import top_k_dense
from torch import Tensor

from elastic.config.training import DIVERGENCES
from elastic.losses import TopK, distillation_dense, remainder_dense
from elastic.losses.divergences import CLOSED, PLAIN

P, Q = (0.5, 0.4, 0.1), (0.2, 0.2, 0.6)
"""A teacher and a student of three tokens."""


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def random_logits(seed: int, rows: int = 7, vocabulary: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def row(values: tuple[float, ...]) -> Tensor:
    """Logits (1, v) of a distribution."""
    return torch.tensor([values], dtype=torch.float64).log()


def test_every_setting_has_a_plain_and_a_closed_form() -> None:
    assert set(DIVERGENCES) == set(PLAIN) == set(CLOSED)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_those_by_hand(divergence: str) -> None:
    """With the teacher's distribution first in forward KL; the three differ."""
    mean = tuple((a + b) / 2 for a, b in zip(P, Q, strict=True))
    by_hand = {
        "forward_kl": kl(P, Q),
        "reverse_kl": kl(Q, P),
        "jsd": (kl(P, mean) + kl(Q, mean)) / 2,
    }
    actual = distillation_dense(row(Q), row(P), divergence, 1.0).item()
    assert actual == pytest.approx(by_hand[divergence])
    assert all(abs(actual - value) > 0.01 for key, value in by_hand.items() if key != divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_remainder_has_what_the_named_ones_leave(divergence: str) -> None:
    """Naming token 0 of three is the divergence of two events."""
    kept = TopK(torch.tensor([[0]]), torch.tensor([[math.log(P[0])]], dtype=torch.float64))
    two = distillation_dense(row((Q[0], 1 - Q[0])), row((P[0], 1 - P[0])), divergence, 1.0)
    torch.testing.assert_close(remainder_dense(row(Q), kept, divergence, 1.0), two)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("named", [10, 11], ids=["all but one", "all"])
def test_naming_the_vocabulary_is_the_whole_divergence(divergence: str, named: int) -> None:
    student, teacher = random_logits(0), random_logits(1)
    kept = top_k_dense(teacher, named, 2.0)
    expected = distillation_dense(student, teacher, divergence, 2.0)
    torch.testing.assert_close(remainder_dense(student, kept, divergence, 2.0), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_merging_tokens_never_adds_divergence(divergence: str) -> None:
    """The data processing inequality: the more tokens are named, the more there is to tell."""
    student, teacher = random_logits(0), random_logits(1)
    values = [
        remainder_dense(student, top_k_dense(teacher, k, 1.0), divergence, 1.0).item()
        for k in range(1, 12)
    ]
    rounding = 1e-12 * values[-1]
    for fewer, more in itertools.pairwise(values):
        assert fewer <= more + rounding
    assert values[0] < values[-1] - rounding


@pytest.mark.parametrize("own", [0.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_closed_form_is_autograd_of_the_plain_one(divergence: str, own: float) -> None:
    """In the value of every token and in the gradient; `own` adds as much of q."""
    u, log_p = random_logits(0).requires_grad_(), torch.log_softmax(random_logits(1), -1)
    log_q = torch.log_softmax(u, -1)
    expected = PLAIN[divergence](log_q, log_p)
    (gradient,) = torch.autograd.grad(expected.sum(), u)
    actual = log_q.detach().clone()
    spare = torch.full_like(actual, torch.nan)
    value = CLOSED[divergence](actual, log_p.clone(), spare, True, own)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(actual, gradient + own * log_q.detach().exp())
    alone = CLOSED[divergence](log_q.detach().clone(), log_p.clone(), spare, False)
    torch.testing.assert_close(alone, value)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_distributions_have_the_right_limits(divergence: str) -> None:
    """Two models sure of different tokens, in float32, where the other token's mass is zero."""
    log_q, log_p = (torch.log_softmax(torch.tensor([[s, -s]]), -1) for s in (100.0, -100.0))
    limit = {"forward_kl": 200.0, "reverse_kl": 200.0, "jsd": math.log(2)}[divergence]
    assert PLAIN[divergence](log_q, log_p).item() == pytest.approx(limit)
    value = CLOSED[divergence](log_q, log_p, torch.empty_like(log_q), True)
    assert value.item() == pytest.approx(limit)
    assert log_q.isfinite().all()
    largest = {"forward_kl": 1.0, "reverse_kl": 0.0, "jsd": 0.0}[divergence]
    assert log_q.abs().max().item() == pytest.approx(largest, abs=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_are_at_no_distance(divergence: str) -> None:
    log_p = torch.log_softmax(random_logits(0).float(), -1)
    log_q = log_p.clone()
    value = CLOSED[divergence](log_q, log_p, torch.empty_like(log_q), True)
    assert value.abs().max() < 1e-6 and log_q.abs().max() < 1e-6


@pytest.mark.parametrize(
    "stored", [[0.0], [1e-4], [-1e-9], [-0.7, -0.69]], ids=["one", "above", "almost", "two halves"]
)
def test_stored_log_probabilities_need_not_add_up(stored: list[float]) -> None:
    """Rounding may leave less than nothing for the remainder: it keeps a rounding error's worth,
    and the events are a distribution."""
    kept = TopK(torch.arange(len(stored))[None], torch.tensor([stored]))
    log_p = kept.log_events(11, torch.float32)
    assert log_p.shape == (1, len(stored) + 1) and log_p.min() > -20
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
