"""Chunked losses beside dense ones, in values, in gradients and in the largest tensor they make."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.config import ObjectiveConfig
from elastic.losses import (
    Head,
    budget_distance,
    cross_entropy,
    distillation,
    distillation_dense,
    identity_distance,
    router_terms,
    token_terms,
)

TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 23, 31, 5, 9
CHUNKS = [1, 4, 23, 100]
"""One token, not a divisor, all tokens, more than there are."""


def head(width: int, seed: int, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Head:
    """Random hidden states and LM head that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, width, generator=generator).requires_grad_(),
        torch.randn(vocabulary, width, generator=generator).requires_grad_(),
    )


def logits(model: Head) -> Tensor:
    return model[0] @ model[1].T


def targets() -> Tensor:
    return torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9))


def backward(loss: Tensor, model: Head) -> tuple[Tensor, Tensor]:
    """Gradients to hidden states and head weight."""
    x, weight = torch.autograd.grad(loss, model)
    return x, weight


def assert_same_loss(actual: Tensor, expected: Tensor, one: Head, two: Head) -> None:
    torch.testing.assert_close(actual, expected)
    for gradient, plain in zip(backward(actual, one), backward(expected, two), strict=True):
        torch.testing.assert_close(gradient, plain)


# Distillation


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunked_distillation_is_the_dense_one(chunk: int, temperature: float) -> None:
    """In value and in both gradients; student and teacher differ in width."""
    teacher = head(TEACHER_WIDTH, 1)
    chunked, dense = head(WIDTH, 0), head(WIDTH, 0)
    actual = distillation(chunked, teacher, temperature, chunk)
    expected = distillation_dense(logits(dense), logits(teacher).detach(), temperature)
    assert_same_loss(actual, expected, chunked, dense)


def test_dense_distillation_is_the_forward_kl_by_hand() -> None:
    """sum p log(p / q) with p the teacher's; the reverse would be another number."""
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    actual = distillation_dense(q.log()[None], p.log()[None], 1.0).item()
    assert actual == pytest.approx(forward) and abs(forward - reverse) > 0.1


def test_distillation_is_a_mean_over_tokens() -> None:
    student, teacher = head(WIDTH, 0), head(TEACHER_WIDTH, 1)
    each = [
        distillation((student[0][i : i + 1], student[1]), (teacher[0][i : i + 1], teacher[1]), 1, 4)
        for i in range(TOKENS)
    ]
    torch.testing.assert_close(distillation(student, teacher, 1.0, 4), torch.stack(each).mean())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_model_is_at_no_distance_from_itself(chunk: int) -> None:
    student, teacher = head(WIDTH, 0), head(WIDTH, 0)
    loss = distillation(student, teacher, 1.0, chunk)
    assert abs(loss.item()) < 1e-6
    for gradient in backward(loss, student):
        assert gradient.abs().max() < 1e-6


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = head(WIDTH, 0), head(TEACHER_WIDTH, 1)
    distillation(student, teacher, 1.0, 4).backward()
    assert student[0].grad is not None and student[1].grad is not None
    assert teacher[0].grad is None and teacher[1].grad is None


def test_the_temperature_is_squared_back() -> None:
    """T^2 x the KL of softened logits; at a high temperature the gradient keeps its size."""
    student, teacher = head(WIDTH, 0), head(TEACHER_WIDTH, 1)
    soft = distillation((student[0] / 4, student[1]), (teacher[0] / 4, teacher[1]), 1.0, 4)
    torch.testing.assert_close(distillation(student, teacher, 4.0, 4), 16 * soft)
    norms = [
        backward(distillation(student, teacher, t, 4), student)[0].norm() for t in (50.0, 100.0)
    ]
    assert norms[1] / norms[0] == pytest.approx(1.0, abs=0.1)


def test_distillation_is_finite_for_extreme_logits() -> None:
    student, teacher = (torch.tensor([[100.0, -100.0]]), torch.tensor([[-100.0, 100.0]]))
    assert distillation_dense(student, teacher, 1.0).item() == pytest.approx(200.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    student, teacher = ((x.to(dtype), w.to(dtype)) for x, w in (head(WIDTH, 0), head(WIDTH, 1)))
    assert distillation(student, teacher, 1.0, 4).dtype == torch.float32
    assert cross_entropy(student, targets(), 4).dtype == torch.float32


# Cross-entropy


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunked_cross_entropy_is_that_of_torch(chunk: int) -> None:
    chunked, dense = head(WIDTH, 0), head(WIDTH, 0)
    actual = cross_entropy(chunked, targets(), chunk)
    assert_same_loss(actual, F.cross_entropy(logits(dense), targets()), chunked, dense)


def test_losses_without_gradients_are_the_same() -> None:
    student, teacher = head(WIDTH, 0), head(TEACHER_WIDTH, 1)
    with_gradients = [
        distillation(student, teacher, 2.0, 4),
        cross_entropy(student, targets(), 4),
    ]
    with torch.no_grad():
        without = [distillation(student, teacher, 2.0, 4), cross_entropy(student, targets(), 4)]
    torch.testing.assert_close(torch.stack(without), torch.stack(with_gradients).detach())
    assert not any(loss.requires_grad for loss in without)


# Memory


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_logits_of_all_tokens_never_exist() -> None:
    """The largest tensor is a chunk's logits or the head itself, forward and backward."""
    tokens, vocabulary, chunk = 400, 50, 16
    student, teacher = (head(width, 0, tokens, vocabulary) for width in (WIDTH, TEACHER_WIDTH))
    text = torch.zeros(tokens, dtype=torch.long)
    allowed = max(chunk * vocabulary, TEACHER_WIDTH * max(tokens, vocabulary))
    assert allowed < tokens * vocabulary / 5
    for loss in (
        lambda: distillation(student, teacher, 1.0, chunk),
        lambda: cross_entropy(student, text, chunk),
    ):
        with LargestTensor() as largest:
            loss().backward()
        assert chunk * vocabulary <= largest.elements <= allowed
    with LargestTensor() as dense:
        distillation_dense(logits(student), logits(teacher), 1.0).backward()
    assert dense.elements == tokens * vocabulary, "guards the guard"


def test_nothing_of_a_chunk_is_kept_for_the_backward_pass() -> None:
    """Each chunk is recomputed: what is saved does not grow with the vocabulary."""
    tokens, chunk = 64, 8
    kept = {}
    for vocabulary in (50, 100):
        student, teacher = (head(WIDTH, seed, tokens, vocabulary) for seed in (0, 1))
        known = {tensor.data_ptr() for tensor in (*student, *teacher)}
        saved: list[int] = []

        def pack(tensor: Tensor, known: set[int] = known, saved: list[int] = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            distillation(student, teacher, 1.0, chunk)
        kept[vocabulary] = sum(saved)
    assert kept[100] == kept[50] < chunk * 50


# Named terms


def test_only_terms_with_a_weight_are_computed() -> None:
    student, teacher = head(WIDTH, 0), head(TEACHER_WIDTH, 1)
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
    student, teacher = head(WIDTH, 0), head(TEACHER_WIDTH, 1)
    config = ObjectiveConfig(
        distillation_weight=2.0, cross_entropy_weight=0.3, temperature=2.0, chunk_tokens=4
    )
    terms = token_terms(student, teacher, targets(), config)
    torch.testing.assert_close(
        terms["distillation"], distillation_dense(logits(student), logits(teacher), 2.0)
    )
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(logits(student), targets()))
    torch.testing.assert_close(
        terms["total"], 2.0 * terms["distillation"] + 0.3 * terms["cross_entropy"]
    )


def test_without_a_teacher_only_the_text_counts() -> None:
    """Pretraining: the weights of the elastic stages do not apply."""
    student = head(WIDTH, 0)
    config = ObjectiveConfig(distillation_weight=2.0, cross_entropy_weight=0.3)
    terms = token_terms(student, None, targets(), config)
    assert set(terms) == {"cross_entropy", "total"}
    expected = F.cross_entropy(logits(student), targets())
    torch.testing.assert_close(terms["cross_entropy"], expected)
    torch.testing.assert_close(terms["total"], expected)


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
