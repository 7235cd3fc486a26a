"""Statistics of forward passes against a second, explicit forward; depth against a greedy twin.

The explicit forward computes norms, projections and attention from the weights, and takes only the
Mamba mixer's output from the library.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.strategies import assert_near, random_parent, random_tokens, tiny_shape
from torch import Tensor

from elastic.config import ConfigError, ImportanceConfig, ParentShape
from elastic.importance.basis import GatedStatistic, StreamStatistic
from elastic.importance.collect import collect, rank_layers
from elastic.members.architecture import Architecture
from elastic.parent import HybridParent
from elastic.parent.layers import LayerKeep

SHAPE = tiny_shape()
DEEP = tiny_shape(pattern="M-M-*M-M-", hidden_size=16)


def settings(**fields: object) -> ImportanceConfig:
    """Small, and all of the calibration text."""
    defaults: dict[str, object] = {"samples": 100, "batch_size": 2, "depth_samples": 100}
    return ImportanceConfig(**(defaults | fields))  # type: ignore[arg-type]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def attention_mix(shape: ParentShape, mixer: torch.nn.Module, x: Tensor) -> Tensor:
    """Input of the output matrix, (b, t, q, head_dim): softmax attention written out."""
    time, width = x.shape[1], shape.head_dim
    repeats = shape.num_attention_heads // shape.num_key_value_heads
    query = (x @ mixer.q_proj.weight.T).unflatten(-1, (-1, width))
    key, value = (
        (x @ projection.weight.T).unflatten(-1, (-1, width)).repeat_interleave(repeats, dim=2)
        for projection in (mixer.k_proj, mixer.v_proj)
    )
    scores = torch.einsum("bthe,bshe->bhts", query, key) / width**0.5
    future = torch.ones(time, time).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, value)


@torch.no_grad()
def observed(parent: HybridParent, tokens: Tensor, ffn_score: str) -> dict[str, list[Tensor]]:
    """What each statistic is about: (b, t, ...) activations, several for `hidden`."""
    shape, eps = parent.shape, parent.shape.norm_eps
    inner = shape.mamba_num_heads * shape.mamba_head_dim
    x = F.embedding(tokens, parent.backbone.embeddings.weight)
    found: dict[str, list[Tensor]] = {"hidden": []}
    for index, block in enumerate(parent.backbone.layers):
        normed = rms_norm(x, block.norm.weight, eps)
        found["hidden"].append(normed)
        mixer = block.mixer
        if block.kind == "mlp":
            before = normed @ mixer.up_proj.weight.T
            after = before.clamp(min=0) ** 2
            found[f"layer.{index}"] = [after if ffn_score == "post_activation" else before]
            x = x + after @ mixer.down_proj.weight.T
        elif block.kind == "attention":
            mixed = attention_mix(shape, mixer, normed)
            found[f"layer.{index}"] = [mixed]
            x = x + mixed.flatten(-2) @ mixer.o_proj.weight.T
        else:
            rows = mixer.in_proj.weight[inner : 2 * inner]
            heads = (normed @ rows.T).unflatten(-1, (shape.mamba_num_heads, -1))
            found[f"layer.{index}"] = [heads]
            x = x + mixer(normed, None, {}, LayerKeep())
    found["hidden"].append(rms_norm(x, parent.backbone.norm_f.weight, eps))
    return found


# Widths


@pytest.mark.parametrize("ffn_score", ["post_activation", "pre_activation"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sums_are_those_of_absolute_activations(ffn_score: str, seed: int) -> None:
    """`hidden` runs over every norm, the final one included."""
    parent, tokens = random_parent(SHAPE, seed), random_tokens(SHAPE, batch=5, seed=seed)
    scores = collect(parent, tokens, settings(ffn_score=ffn_score)).scores
    found = observed(parent, tokens, ffn_score)
    assert scores.keys() == found.keys()
    assert len(found["hidden"]) == len(SHAPE.pattern) + 1
    for name, activations in found.items():
        expected = sum(values.double().abs().sum(dim=(0, 1)) for values in activations)
        assert_near(scores[name], expected)


@pytest.mark.parametrize("ffn_score", ["post_activation", "pre_activation"])
def test_mean_l2_is_the_norm_over_sequences_of_the_mean_over_time(ffn_score: str) -> None:
    """For `hidden` the norm runs over the outputs of all norms as well."""
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE, batch=5)
    scores = collect(parent, tokens, settings(ffn_score=ffn_score, aggregation="mean_l2")).scores
    for name, activations in observed(parent, tokens, ffn_score).items():
        squares = sum(values.double().abs().mean(1).square().sum(0) for values in activations)
        assert_near(scores[name], squares.sqrt())


def test_the_two_ffn_scores_rank_differently() -> None:
    """A unit that is strongly negative scores high before the squared ReLU and zero after it."""
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE)
    mixer = parent.backbone.layers[1].mixer
    with torch.no_grad():
        mixer.up_proj.weight.abs_()
        mixer.up_proj.weight[3] = -10 * mixer.up_proj.weight[3]
        parent.backbone.layers[1].norm.weight.abs_()
        parent.backbone.embeddings.weight.abs_()
        parent.backbone.layers[0].mixer.out_proj.weight.zero_()
    before = collect(parent, tokens, settings(ffn_score="pre_activation")).scores["layer.1"]
    after = collect(parent, tokens, settings(ffn_score="post_activation")).scores["layer.1"]
    assert before.argmax() == 3 and before.min() > 0
    assert after[3] == 0 and (after > 0).sum() == after.numel() - 1


@pytest.mark.parametrize("aggregation", ["sum", "mean_l2"])
def test_batch_size_does_not_matter(aggregation: str) -> None:
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE, batch=5)
    whole = collect(parent, tokens, settings(batch_size=5, aggregation=aggregation)).scores
    for batch_size in (1, 2, 3):
        split = settings(batch_size=batch_size, aggregation=aggregation)
        for name, score in collect(parent, tokens, split).scores.items():
            assert_near(score, whole[name])


def test_only_the_asked_number_of_samples_is_read() -> None:
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE, batch=5)
    three = collect(parent, tokens, settings(samples=3)).scores
    for name, score in collect(parent, tokens[:3], settings()).scores.items():
        assert torch.equal(three[name], score)
    assert not torch.equal(three["hidden"], collect(parent, tokens, settings()).scores["hidden"])


def hooks(parent: HybridParent) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parent.modules())


def test_hooks_and_gradients_are_gone_afterwards() -> None:
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE)
    scores = collect(parent, tokens, settings()).scores
    assert hooks(parent) == 0
    assert not any(score.requires_grad for score in scores.values())
    assert all(weight.grad is None for weight in parent.parameters())


def test_hooks_are_gone_after_a_failure_too() -> None:
    parent = random_parent(SHAPE)
    with pytest.raises(IndexError):
        collect(parent, torch.full((2, 9), SHAPE.vocab_size), settings())
    assert hooks(parent) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_scores_that_are_not_finite_are_no_ranking(value: float) -> None:
    """NaN would be sorted somewhere, and the parent with it. The first layer is named."""
    parent = random_parent(SHAPE)
    with torch.no_grad():
        parent.backbone.layers[1].mixer.up_proj.weight[2, 3] = value
    with pytest.raises(ValueError, match="importance: scores of layer 1 are not finite on the cal"):
        collect(parent, random_tokens(SHAPE), settings())


@pytest.mark.parametrize(
    ("kind", "norm"),
    [(StreamStatistic, "norm"), (GatedStatistic, "mixer.norm")],
    ids=["d", "units"],
)
def test_energies_that_are_not_finite_are_no_basis(
    kind: type, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are squares, and overflow where activations do not yet."""
    monkeypatch.setattr(kind, "value", property(lambda self: torch.full((2,), torch.inf)))
    line = rf"importance: energies before backbone\.layers\.0\.{norm}\.weight are not finite"
    with pytest.raises(ValueError, match=line):
        collect(random_parent(SHAPE), random_tokens(SHAPE), settings())


@pytest.mark.parametrize("lost", [None, 3], ids=["parent", "a trial"])
def test_errors_that_are_not_finite_are_no_ranking(
    lost: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer may be what keeps activations within range."""
    parent, forward = random_parent(DEEP), HybridParent.forward

    def overflowing(self: HybridParent, tokens: Tensor, member: Architecture | None) -> Tensor:
        hidden = forward(self, tokens, member)
        kept = {layer.index for layer in member.layers} if member else set()
        bad = member is None if lost is None else member is not None and lost not in kept
        return hidden * torch.inf if bad else hidden

    monkeypatch.setattr(HybridParent, "forward", overflowing)
    what = "logits" if lost is None else "logits without mlp layer 3"
    with pytest.raises(ValueError, match=f"importance: {what} are not finite"):
        rank_layers(parent, random_tokens(DEEP), settings(), 2, generator())


def test_collecting_changes_no_weight() -> None:
    parent = random_parent(SHAPE)
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    collect(parent, random_tokens(SHAPE), settings())
    rank_layers(parent, random_tokens(SHAPE), settings(), 2, torch.Generator())
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight, before[name])


# Depth


@torch.no_grad()
def greedy(
    parent: HybridParent, tokens: Tensor, count: int, candidates: list[int], positions: Tensor
) -> tuple[list[int], list[dict[int, float]]]:
    """The plain twin: whole logits first, then the positions; one sequence at a time."""
    full = Architecture.full(parent.shape)

    def logits(dropped: set[int]) -> Tensor:
        rows = [
            parent.logits(row[None], full.without(dropped))[0, places]
            for row, places in zip(tokens, positions, strict=True)
        ]
        return torch.stack(rows).double()

    reference, order, rounds = logits(set()), list[int](), []
    for _ in range(count):
        errors = {}
        for layer in sorted(set(candidates) - set(order)):
            change = (logits({*order, layer}) - reference).square().sum()
            errors[layer] = float(change / reference.square().sum())
        order.append(min(errors, key=lambda layer: errors[layer]))
        rounds.append(errors)
    return order, rounds


def everywhere(tokens: Tensor) -> Tensor:
    """All positions of all sequences."""
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_rounds_near(rounds: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert [trial.keys() for trial in rounds] == [trial.keys() for trial in expected]
    for trial, plain in zip(rounds, expected, strict=True):
        assert trial == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_iterative_ranking_is_the_greedy_one(seed: int, batch_size: int) -> None:
    parent, tokens = random_parent(DEEP, seed), random_tokens(DEEP, batch=3, seed=seed)
    config = settings(batch_size=batch_size)
    order, rounds = rank_layers(parent, tokens, config, 5, generator())
    expected = greedy(parent, tokens, 5, [1, 2, 3, 5, 6, 7], everywhere(tokens))
    assert order == expected[0]
    assert_rounds_near(rounds, expected[1])


def test_logits_are_compared_at_the_same_random_positions_in_every_trial() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP, batch=3)
    order, rounds = rank_layers(parent, tokens, settings(depth_positions=4), 3, generator(7))
    again = generator(7)
    positions = torch.stack([torch.randperm(9, generator=again)[:4] for _ in tokens])
    expected = greedy(parent, tokens, 3, [1, 2, 3, 5, 6, 7], positions)
    assert order == expected[0]
    assert_rounds_near(rounds, expected[1])


def test_one_pass_sorts_the_errors_of_the_first_round() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    order, rounds = rank_layers(parent, tokens, settings(depth_method="one_pass"), 4, generator())
    iterative = rank_layers(parent, tokens, settings(), 4, generator())
    assert rounds == iterative[1][:1]
    assert order == sorted(rounds[0], key=lambda layer: rounds[0][layer])[:4]


def test_ranking_again_after_every_drop_changes_the_order() -> None:
    """Guards the guard: with `one_pass` in place of `iterative` some parent gets another order."""
    tokens = random_tokens(DEEP)
    differ = 0
    for seed in range(6):
        parent = random_parent(DEEP, seed)
        one_pass, iterative = (
            rank_layers(parent, tokens, settings(depth_method=method), 5, generator())[0]
            for method in ("one_pass", "iterative")
        )
        assert one_pass[0] == iterative[0]
        differ += one_pass != iterative
    assert differ > 0


def test_the_error_of_a_round_counts_all_layers_dropped_before() -> None:
    """Errors are against the original logits, so that they hardly ever shrink."""
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    order, rounds = rank_layers(parent, tokens, settings(), 5, generator())
    last = {order[4]} | set(order[:4])
    full = Architecture.full(DEEP)
    with torch.no_grad():
        original = parent.logits(tokens).double()
        reduced = parent.logits(tokens, full.without(last)).double()
    expected = (original - reduced).square().sum() / original.square().sum()
    assert rounds[4][order[4]] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("allowed", "candidates"),
    [
        ({}, {1, 2, 3, 5, 6, 7}),
        ({"drop_attention": True}, {1, 2, 3, 4, 5, 6, 7}),
        ({"drop_ends": True}, {0, 1, 2, 3, 5, 6, 7, 8}),
        ({"drop_attention": True, "drop_ends": True}, set(range(9))),
    ],
)
def test_attention_and_both_ends_are_protected_unless_asked(
    allowed: dict[str, bool], candidates: set[int]
) -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    _, rounds = rank_layers(parent, tokens, settings(**allowed), 1, generator())
    assert set(rounds[0]) == candidates


def test_too_few_droppable_layers_are_an_error_that_says_what_to_set() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    rank_layers(parent, tokens, settings(depth_method="one_pass"), 6, generator())
    with pytest.raises(ConfigError, match="drops up to 7 layers, but only 6 of M-M-") as error:
        rank_layers(parent, tokens, settings(), 7, generator())
    assert "importance.drop_attention" in str(error.value)
    rank_layers(parent, tokens, settings(drop_ends=True, depth_method="one_pass"), 7, generator())


def test_nothing_to_drop_runs_no_trial() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    for method in ("iterative", "one_pass"):
        result = rank_layers(parent, tokens, settings(depth_method=method), 0, generator())
        assert result == ([], [])


def test_the_ranking_is_a_function_of_the_generator_seed() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    config = settings(depth_positions=2)
    first = rank_layers(parent, tokens, config, 3, generator(1))
    torch.manual_seed(123)
    assert rank_layers(parent, tokens, config, 3, generator(1)) == first
    assert rank_layers(parent, tokens, config, 3, generator(2))[1] != first[1]


def test_depth_reads_only_its_own_number_of_samples() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP, batch=4)
    few = rank_layers(parent, tokens, settings(depth_samples=2), 2, generator())
    assert few == rank_layers(parent, tokens[:2], settings(), 2, generator())
    assert few != rank_layers(parent, tokens, settings(), 2, generator())


def test_a_tied_parent_is_ranked_through_its_embedding() -> None:
    shape = dataclasses.replace(DEEP, tied_head=True)
    parent, tokens = random_parent(shape), random_tokens(shape)
    order, rounds = rank_layers(parent, tokens, settings(), 3, generator())
    expected = greedy(parent, tokens, 3, [1, 2, 3, 5, 6, 7], everywhere(tokens))
    assert order == expected[0]
    assert_rounds_near(rounds, expected[1])
