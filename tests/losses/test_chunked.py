"""Token losses in chunks beside dense ones, in values and gradients, and whose gradients come."""

import dataclasses

import pytest
import torch
from helpers.heads import (
    TEACHER_WIDTH,
    TOKENS,
    VOCABULARY,
    WEIGHTS,
    WIDTH,
    dense_terms,
    gradients,
    head,
    logits,
    objective,
    targets,
    teacher_head,
    top_k_dense,
)
from torch import Tensor

from elastic.config import ConfigError
from elastic.config.training import DIVERGENCES
from elastic.losses import Head, TopK, check_objective, token_terms, top_k_of

CHUNKS = [1, 4, 23, 100]
"""One token, not a divisor, all tokens, more than there are."""
TOP_KS = [None, 1, 6, VOCABULARY]
"""The whole distribution, one token named, a few, all of them (no remainder)."""


def assert_equal_terms(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        wanted = expected[name].to(value.dtype)
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=atol)


# Clever == plain


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunked_losses_are_the_dense_ones(
    divergence: str, weights: str, top_k: int | None, temperature: float, chunk: int
) -> None:
    """In every term and in both gradients; student and teacher differ in width."""
    config = objective(
        weights, divergence=divergence, top_k=top_k, temperature=temperature, chunk_tokens=chunk
    )
    student, teacher = head(), teacher_head()
    actual = token_terms(student, teacher, targets(), config)
    expected = dense_terms(student, teacher, targets(), config)
    assert_equal_terms(actual, expected)
    torch.testing.assert_close(
        gradients(actual["total"], student), gradients(expected["total"], student)
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_chunked_losses_are_the_dense_ones_in_float32(weights: str, divergence: str) -> None:
    """The path of matmuls that need no cast."""
    config = objective(weights, divergence=divergence, chunk_tokens=4)
    student, teacher = head(dtype=torch.float32), teacher_head(torch.float32)
    actual = token_terms(student, teacher, targets(), config)
    expected = dense_terms(student, teacher, targets(), config)
    assert_equal_terms(actual, expected)
    torch.testing.assert_close(
        gradients(actual["total"], student), gradients(expected["total"], student)
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 6])
def test_gradients_are_finite_differences(top_k: int | None, divergence: str) -> None:
    """The one check that trusts no autograd: central differences along random directions."""
    config = objective("both", divergence=divergence, top_k=top_k, temperature=1.5, chunk_tokens=4)
    student, teacher = head(), teacher_head()

    def loss(*model: Tensor) -> Tensor:
        return token_terms((model[0], model[1]), teacher, targets(), config)["total"]

    found = gradients(loss(*student), student)
    for seed in range(5):
        steps = [1e-5 * step.detach() for step in head(seed=20 + seed)]
        with torch.no_grad():
            ahead = loss(*(at + step for at, step in zip(student, steps, strict=True)))
            behind = loss(*(at - step for at, step in zip(student, steps, strict=True)))
        slope = sum((g * step).sum() for g, step in zip(found, steps, strict=True))
        torch.testing.assert_close(2 * slope, ahead - behind, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 6, VOCABULARY])
def test_cached_top_k_is_the_online_teacher_cut_to_k(k: int, divergence: str) -> None:
    """In loss and gradients, with the teacher's hidden states gone."""
    config = objective("both", divergence=divergence, temperature=2.5, top_k=k, chunk_tokens=4)
    student, teacher = head(), teacher_head()
    stored = top_k_of(teacher, k, config.temperature, chunk=4)
    online = token_terms(student, teacher, targets(), config)
    again = token_terms(student, stored, targets(), dataclasses.replace(config, top_k=None))
    assert_equal_terms(again, online)
    torch.testing.assert_close(
        gradients(again["total"], student), gradients(online["total"], student)
    )


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_in_chunks_is_that_of_all_logits(temperature: float, chunk: int) -> None:
    teacher = teacher_head()
    actual = top_k_of(teacher, 6, temperature, chunk)
    expected = top_k_dense(logits(teacher), 6, temperature)
    assert torch.equal(actual.indices, expected.indices)
    torch.testing.assert_close(actual.log_probs, expected.log_probs)
    assert not actual.log_probs.requires_grad


def test_more_tokens_than_the_vocabulary_are_refused() -> None:
    """At start-up, and wherever a teacher is cut."""
    config = objective(top_k=VOCABULARY + 1)
    line = f"objective.top_k={VOCABULARY + 1}: must be at most the parent's vocabulary of 31"
    for refused in (
        lambda: check_objective(config, VOCABULARY),
        lambda: top_k_of(teacher_head(), VOCABULARY + 1, 1.0, 4),
        lambda: token_terms(head(), teacher_head(), targets(), config),
    ):
        with pytest.raises(ConfigError, match=line):
            refused()
    check_objective(config, VOCABULARY + 1)
    check_objective(objective(), 1)


# Who gets gradients


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["hidden", "head"])
def test_either_gradient_comes_alone(wanted: tuple[bool, bool]) -> None:
    config, teacher = objective("both", chunk_tokens=4), teacher_head()
    both = head()
    expected = gradients(token_terms(both, teacher, targets(), config)["total"], both)
    alone = tuple(
        tensor.detach().requires_grad_(want) for tensor, want in zip(both, wanted, strict=True)
    )
    token_terms((alone[0], alone[1]), teacher, targets(), config)["total"].backward()
    for tensor, want, gradient in zip(alone, wanted, expected, strict=True):
        if want:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_a_narrowed_head_passes_its_gradient_to_the_whole_one() -> None:
    """A sliced member reads the first columns of the parent's head, a view with gaps."""
    config, teacher, text = objective("both", chunk_tokens=4), teacher_head(), targets()
    (x, _), whole = head(), head(TEACHER_WIDTH, 3)[1]
    view = whole[:, :WIDTH]
    assert not view.is_contiguous()
    actual = gradients(token_terms((x, view), teacher, text, config)["total"], (x, whole))
    expected = gradients(dense_terms((x, view), teacher, text, config)["total"], (x, whole))
    torch.testing.assert_close(actual, expected)
    assert not actual[1][:, WIDTH:].any()


@pytest.mark.parametrize("top_k", [None, 6])
def test_no_gradient_reaches_the_teacher(top_k: int | None) -> None:
    student, teacher = head(), teacher_head()
    config = objective("both", top_k=top_k, chunk_tokens=4)
    token_terms(student, teacher, targets(), config)["total"].backward()
    assert student[0].grad is not None and student[1].grad is not None
    assert teacher[0].grad is None and teacher[1].grad is None


def test_the_backward_pass_scales_by_what_comes_in() -> None:
    """As when micro-batches share a step."""
    config, student, teacher = objective(chunk_tokens=4), head(), teacher_head()
    once, scaled = (
        gradients(factor * token_terms(student, teacher, targets(), config)["total"], student)
        for factor in (1.0, -0.25)
    )
    torch.testing.assert_close(scaled, tuple(-0.25 * gradient for gradient in once))


def test_gradients_are_handed_out_once() -> None:
    """They are scaled in place: a second backward pass would scale them twice."""
    student = head()
    total = token_terms(student, teacher_head(), targets(), objective())["total"]
    gradients_kept = torch.autograd.grad(total, student, retain_graph=True)
    before = [gradient.clone() for gradient in gradients_kept]
    with pytest.raises(AssertionError, match="once"):
        torch.autograd.grad(total, student)
    torch.testing.assert_close(list(gradients_kept), before)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("top_k", [None, 6])
def test_losses_without_gradients_are_the_same(top_k: int | None, weights: str) -> None:
    """Under no_grad, and for models that want none; neither leaves a graph."""
    config, student, teacher = objective(weights, top_k=top_k), head(), teacher_head()
    expected = token_terms(student, teacher, targets(), config)
    with torch.no_grad():
        without = token_terms(student, teacher, targets(), config)
    frozen = token_terms((student[0].detach(), student[1].detach()), teacher, targets(), config)
    for terms in (without, frozen):
        assert_equal_terms(terms, expected)
        assert not any(term.requires_grad for term in terms.values())
    assert {name for name, term in expected.items() if term.requires_grad} == {"total"}


# Numbers


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_model_is_at_no_distance_from_itself(
    divergence: str, top_k: int | None, chunk: int
) -> None:
    """In float32, with as little in the gradient."""
    student, same = head(dtype=torch.float32), head(dtype=torch.float32)
    config = objective(divergence=divergence, top_k=top_k, chunk_tokens=chunk)
    total = token_terms(student, same, targets(), config)["total"]
    assert abs(total.item()) < 1e-6
    for gradient in gradients(total, student):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("sure", ["student", "teacher", "both"])
@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence: str, top_k: int | None, sure: str) -> None:
    """Logits in the hundreds: all mass but none of a float32 on one token, on either side."""
    config = objective("both", divergence=divergence, top_k=top_k)
    student, teacher = head(dtype=torch.float32), teacher_head(torch.float32)
    with torch.no_grad():
        for name, model in (("student", student), ("teacher", teacher)):
            model[0].mul_(100.0 if sure in (name, "both") else 1.0)
    terms = token_terms(student, teacher, targets(), config)
    assert all(term.isfinite() for term in terms.values())
    for gradient in gradients(terms["total"], student):
        assert gradient.isfinite().all()
    # What a teacher that is sure leaves for the remainder is not known to better than rounding,
    # which only the reverse KL takes the logarithm of.
    if top_k is None or divergence != "reverse_kl" or sure == "student":
        exact = [tuple(t.detach().double() for t in model) for model in (student, teacher)]
        expected = dense_terms(
            (exact[0][0], exact[0][1]), (exact[1][0], exact[1][1]), targets(), config
        )
        assert_equal_terms(terms, expected, rtol=1e-4, atol=1e-4)


def test_a_rest_too_small_to_store_still_pulls_the_student() -> None:
    """The teacher leaves the remainder nothing, the student all: the gradient moves the student's
    mass from where it is, in proportion, and to the token named."""
    x = torch.tensor([[0.0, 300.0, 299.0]]).requires_grad_()
    student = x, torch.eye(3)
    kept = TopK(torch.tensor([[0]]), torch.tensor([[0.0]]))
    terms = token_terms(student, kept, torch.tensor([1]), objective())
    assert terms["distillation"].item() == pytest.approx(300.31, abs=0.01)
    (gradient,) = torch.autograd.grad(terms["total"], x)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.7311, 0.2689]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_temperature_is_squared_back(divergence: str) -> None:
    """T^2 x the divergence of softened logits; however high, the gradient keeps its size."""
    student, teacher = head(), teacher_head()
    soft = token_terms(
        (student[0] / 4, student[1]),
        (teacher[0] / 4, teacher[1]),
        targets(),
        objective(divergence=divergence),
    )
    config = objective(divergence=divergence, temperature=4.0)
    hot = token_terms(student, teacher, targets(), config)
    torch.testing.assert_close(hot["total"], 16 * soft["total"])
    norms = []
    for temperature in (50.0, 100.0):
        config = objective(divergence=divergence, temperature=temperature)
        total = token_terms(student, teacher, targets(), config)["total"]
        norms.append(gradients(total, student)[0].norm().item())
    assert norms[1] / norms[0] == pytest.approx(1.0, abs=0.1)


# bfloat16


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precision_is_that_of_autocast(
    hidden: torch.dtype, top_k: int | None, weights: str
) -> None:
    """bfloat16 matmuls, float32 softmax; weights and their gradients stay float32."""
    config = objective(weights, top_k=top_k, chunk_tokens=4)
    (x, weight), teacher = head(dtype=torch.float32), teacher_head(torch.float32)
    student = x.detach().to(hidden).requires_grad_(), weight
    with torch.autocast("cpu", torch.bfloat16):
        actual = token_terms(student, teacher, targets(), config)
        expected = dense_terms(student, teacher, targets(), config)
        assert logits(student).dtype == torch.bfloat16
    assert all(term.dtype == torch.float32 for term in actual.values())
    assert_equal_terms(actual, expected, rtol=1e-3, atol=1e-3)
    found = gradients(actual["total"], student)
    assert [gradient.dtype for gradient in found] == [hidden, torch.float32]
    plain = gradients(expected["total"], student)
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-3)
    exact = dense_terms((x, weight), teacher, targets(), config)["total"]
    assert (actual["total"] - exact).abs() > 1e-6, "guards the guard: bfloat16 was used"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bfloat16_models_have_float32_losses(weights: str) -> None:
    """bf16-true: no autocast, and gradients in the dtype of what they belong to."""
    config = objective(weights, chunk_tokens=4)
    student, teacher = head(dtype=torch.bfloat16), teacher_head(torch.bfloat16)
    actual = token_terms(student, teacher, targets(), config)
    assert all(term.dtype == torch.float32 for term in actual.values())
    wide = tuple(tensor.detach().float().requires_grad_() for tensor in student)
    exact = dense_terms(
        (wide[0], wide[1]), (teacher[0].float(), teacher[1].float()), targets(), config
    )
    assert_equal_terms(actual, exact, rtol=2e-2, atol=2e-2)
    for gradient, plain in zip(
        gradients(actual["total"], student),
        gradients(exact["total"], (wide[0], wide[1])),
        strict=True,
    ):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), plain, rtol=5e-2, atol=5e-3)


# Counted tokens


def poisoned(model: Head, counted: Tensor) -> Head:
    """The same model, with tokens that do not count turned into NaN."""
    x = torch.full_like(model[0], torch.nan)
    x[counted] = model[0].detach()[counted]
    return x.requires_grad_(), model[1]


@pytest.mark.parametrize("kind", ["online", "cut", "offline"])
def test_only_counted_tokens_are_computed(kind: str) -> None:
    """Means and gradients are those of a batch without the others, which may hold anything."""
    counted = torch.tensor([1, 2, 5, 8, 13, 21])
    top_k = None if kind == "online" else 6
    config = objective("both", temperature=2.5, chunk_tokens=4, top_k=top_k)
    student, teacher = poisoned(head(), counted), poisoned(teacher_head(), counted)
    text = torch.full_like(targets(), -100)
    text[counted] = targets()[counted]
    seen: Head | TopK = top_k_of(teacher, 6, 2.5, 4) if kind == "offline" else teacher
    actual = token_terms(student, seen, text, config, counted)
    few = head()[0].detach()[counted].requires_grad_(), student[1]
    expected = dense_terms(few, (teacher[0][counted], teacher[1]), text[counted], config)
    assert_equal_terms(actual, expected)
    x, weight = gradients(actual["total"], student)
    plain_x, plain_weight = gradients(expected["total"], few)
    torch.testing.assert_close(weight, plain_weight)
    torch.testing.assert_close(x[counted], plain_x)
    others = torch.ones(TOKENS, dtype=torch.bool)
    others[counted] = False
    assert (x[others] == 0).all()


def test_no_counted_token_means_no_loss() -> None:
    """A micro-batch of padding moves nothing, and is no NaN."""
    student, none = head(), torch.empty(0, dtype=torch.int64)
    terms = token_terms(student, teacher_head(), targets(), objective("both"), none)
    assert all(term == 0 for term in terms.values())
    for gradient in gradients(terms["total"], student):
        assert not gradient.any()


def test_losses_are_means_over_tokens() -> None:
    student, teacher, config = head(), teacher_head(), objective("both", chunk_tokens=4)
    each = [
        token_terms(student, teacher, targets(), config, torch.tensor([i]))["total"]
        for i in range(TOKENS)
    ]
    total = token_terms(student, teacher, targets(), config)["total"]
    torch.testing.assert_close(total, torch.stack(each).mean())
