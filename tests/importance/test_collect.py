"""Statistics of forward passes against a second, explicit forward.

The explicit forward computes norms, projections and attention from the weights, and takes only the
Mamba mixer's output from the library.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.documents import rows_of
from helpers.strategies import assert_near, random_parent, random_tokens, tiny_shape
from torch import Tensor

from elastic.config import ImportanceConfig, ParentShape
from elastic.importance.basis import GatedStatistic, StreamStatistic
from elastic.importance.collect import collect
from elastic.parent import HybridParent
from elastic.parent.layers import LayerKeep

SHAPE = tiny_shape()


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
    scores = collect(parent, rows_of(tokens), settings(ffn_score=ffn_score)).scores
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
    scores = collect(
        parent, rows_of(tokens), settings(ffn_score=ffn_score, aggregation="mean_l2")
    ).scores
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
    before = collect(parent, rows_of(tokens), settings(ffn_score="pre_activation")).scores[
        "layer.1"
    ]
    after = collect(parent, rows_of(tokens), settings(ffn_score="post_activation")).scores[
        "layer.1"
    ]
    assert before.argmax() == 3 and before.min() > 0
    assert after[3] == 0 and (after > 0).sum() == after.numel() - 1


@pytest.mark.parametrize("aggregation", ["sum", "mean_l2"])
def test_batch_size_does_not_matter(aggregation: str) -> None:
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE, batch=5)
    whole = collect(parent, rows_of(tokens), settings(batch_size=5, aggregation=aggregation)).scores
    for batch_size in (1, 2, 3):
        split = settings(batch_size=batch_size, aggregation=aggregation)
        for name, score in collect(parent, rows_of(tokens), split).scores.items():
            assert_near(score, whole[name])


def test_only_the_asked_number_of_samples_is_read() -> None:
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE, batch=5)
    three = collect(parent, rows_of(tokens), settings(samples=3)).scores
    for name, score in collect(parent, rows_of(tokens[:3]), settings()).scores.items():
        assert torch.equal(three[name], score)
    assert not torch.equal(
        three["hidden"], collect(parent, rows_of(tokens), settings()).scores["hidden"]
    )


def hooks(parent: HybridParent) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parent.modules())


def test_hooks_and_gradients_are_gone_afterwards() -> None:
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE)
    scores = collect(parent, rows_of(tokens), settings()).scores
    assert hooks(parent) == 0
    assert not any(score.requires_grad for score in scores.values())
    assert all(weight.grad is None for weight in parent.parameters())


def test_hooks_are_gone_after_a_failure_too() -> None:
    parent = random_parent(SHAPE)
    with pytest.raises(IndexError):
        collect(parent, rows_of(torch.full((2, 9), SHAPE.vocab_size)), settings())
    assert hooks(parent) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_scores_that_are_not_finite_are_no_ranking(value: float) -> None:
    """NaN would be sorted somewhere, and the parent with it. The first layer is named."""
    parent = random_parent(SHAPE)
    with torch.no_grad():
        parent.backbone.layers[1].mixer.up_proj.weight[2, 3] = value
    with pytest.raises(ValueError, match="importance: scores of layer 1 are not finite on the cal"):
        collect(parent, rows_of(random_tokens(SHAPE)), settings())


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
        collect(random_parent(SHAPE), rows_of(random_tokens(SHAPE)), settings())


def test_collecting_changes_no_weight() -> None:
    parent = random_parent(SHAPE)
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    collect(parent, rows_of(random_tokens(SHAPE)), settings())
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight, before[name])
