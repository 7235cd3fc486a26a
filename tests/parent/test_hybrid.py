"""The hybrid stack: whole, sliced and masked are one function, and that function is Nemotron-H.

Compared: sliced execution with hard masks (law 1), either with perturbed dropped weights (law 3),
and the parent with transformers' `NemotronHForCausalLM` on the same weights (law 5), in logits and
in the gradients of the full tensors.
"""

from collections.abc import Callable

import pytest
import torch
from helpers.strategies import (
    TOLERANCE,
    assert_gradients_near,
    assert_near,
    difference,
    gradients,
    kept_regions,
    members,
    probe,
    random_parent,
    random_tokens,
    shapes,
    stock_member,
    stock_model,
    stock_names,
    tiny_member,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import elastic.routing.masks
from elastic.config import ParentShape
from elastic.members.architecture import Architecture
from elastic.parent import HybridParent, Keep, LayerKeep
from elastic.parent.hybrid import Block
from elastic.parent.norms import RMSNorm
from elastic.routing.masks import hard_keep

Drawn = tuple[ParentShape, Architecture]


def law_1(parent: HybridParent, member: Architecture, tokens: Tensor) -> float:
    """How far hard masks are from sliced weights, as a share of the largest logit."""
    masked = parent.logits(tokens, hard_keep(parent.shape, member))
    return difference(masked, parent.logits(tokens, member))


# Law 1: one function.


@given(members(), st.integers(1, 9))
def test_sliced_equals_hard_masks(drawn: Drawn, time: int) -> None:
    shape, member = drawn
    parent, tokens = random_parent(shape), random_tokens(shape, time=time)
    assert law_1(parent, member, tokens) <= TOLERANCE[torch.float32]


@given(members())
def test_sliced_and_masked_gradients_agree_and_are_zero_where_dropped(drawn: Drawn) -> None:
    shape, member = drawn
    parent, tokens = random_parent(shape), random_tokens(shape)
    sliced = gradients(parent, probe(parent.logits(tokens, member)))
    masked = gradients(parent, probe(parent.logits(tokens, hard_keep(shape, member))))
    assert_gradients_near(masked, sliced)
    regions = kept_regions(shape, member)
    for name in sliced:
        assert not sliced[name][~regions[name]].any(), f"sliced: {name} beyond the cut"
        assert not masked[name][~regions[name]].any(), f"masked: {name} beyond the cut"


def test_every_kept_tensor_has_a_gradient_and_no_dropped_weight_has() -> None:
    """The same non-zeros both ways: gradients that are zero everywhere would agree for nothing."""
    shape, member = tiny_shape(), tiny_member()
    parent, tokens = random_parent(shape), random_tokens(shape, batch=4, time=21)
    regions = kept_regions(shape, member)
    for run in (member, hard_keep(shape, member)):
        for name, gradient in gradients(parent, probe(parent.logits(tokens, run))).items():
            assert torch.equal(gradient != 0, regions[name]), name


@given(members(homogeneous=True))
def test_homogeneous_member_is_a_stock_model_with_the_cut_weights(drawn: Drawn) -> None:
    shape, member = drawn
    parent, tokens = random_parent(shape), random_tokens(shape)
    assert_near(parent.logits(tokens, member), stock_member(parent, member)(tokens).logits)


@given(shapes())
def test_none_equals_masks_of_ones_and_the_full_architecture(shape: ParentShape) -> None:
    parent, tokens = random_parent(shape), random_tokens(shape)
    whole = parent.logits(tokens)
    full = Architecture.full(shape)
    no_masks = Keep(None, tuple(LayerKeep() for _ in shape.pattern))
    assert torch.equal(parent.logits(tokens, no_masks), whole)
    assert torch.equal(parent.logits(tokens, full), whole)
    assert difference(parent.logits(tokens, hard_keep(shape, full)), whole) < 1e-5


def _global_heads(kept: list[int], size: int, groups: int = 1) -> Tensor:
    """The trap of method.md, section 3.6: a prefix over all heads instead of one per group."""
    return (torch.arange(size) < torch.tensor(kept)[:, None]).float()


def _norm_over_the_full_width(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, x, cut=None, keep=None, own=None: forward(self, x, cut, None, own)


def _gated_norm_over_the_full_group(_: Callable[..., object]) -> Callable[..., object]:
    return lambda units, inner, groups: inner / groups


def _gate_left_out(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(
        self: Block,
        x: Tensor,
        layer: object,
        cuts: object,
        hidden: Tensor,
        keep: LayerKeep,
        *rest: object,
    ) -> Tensor:
        open_gate = LayerKeep(None, keep.width, keep.channels)
        return forward(self, x, layer, cuts, hidden, open_gate, *rest)

    return broken


def _update_not_masked(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(
        self: Block, x: Tensor, layer: object, cuts: object, hidden: Tensor, *rest: object
    ) -> Tensor:
        open_stream = None if hidden is None else torch.ones_like(hidden)
        return forward(self, x, layer, cuts, open_stream, *rest)

    return broken


@pytest.mark.parametrize(
    ("owner", "name", "breakage"),
    [
        (RMSNorm, "forward", _norm_over_the_full_width),
        (elastic.parent.ssd_fused, "_kept", _gated_norm_over_the_full_group),
        (Block, "forward", _gate_left_out),
        (Block, "forward", _update_not_masked),
        (elastic.routing.masks, "prefix_masks", lambda _: _global_heads),
    ],
    ids=["norm_width", "gated_norm_share", "depth_gate", "hidden_mask", "heads_across_groups"],
)
def test_law_1_notices_what_was_left_out(
    owner: object, name: str, breakage: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the guard: each known mistake moves logits by far more than the tolerance."""
    shape, member = tiny_shape(), tiny_member()
    parent, tokens = random_parent(shape), random_tokens(shape)
    assert law_1(parent, member, tokens) <= TOLERANCE[torch.float32]
    monkeypatch.setattr(owner, name, breakage(getattr(owner, name)))
    assert law_1(parent, member, tokens) > 100 * TOLERANCE[torch.float32]


def test_an_illegal_member_is_refused_before_it_runs() -> None:
    shape = tiny_shape()
    too_wide = Architecture(shape.hidden_size + 1, tiny_member().layers)
    with pytest.raises(ValueError, match="hidden_size=14 must be in 1..13"):
        random_parent(shape).logits(random_tokens(shape), too_wide)


# Law 3: what is dropped is dead.


@torch.no_grad()
def perturb(parent: HybridParent, regions: dict[str, Tensor], inside: bool = False) -> None:
    """Move every weight outside (or inside) the regions by a lot."""
    for name, weight in parent.named_parameters():
        where = regions[name] if inside else ~regions[name]
        weight[where] += 2 * torch.randn(weight.shape)[where] + 1


@given(members())
def test_perturbing_dropped_weights_changes_no_bit(drawn: Drawn) -> None:
    shape, member = drawn
    parent, tokens = random_parent(shape), random_tokens(shape)
    keep = hard_keep(shape, member)
    sliced, masked = parent.logits(tokens, member), parent.logits(tokens, keep)
    perturb(parent, kept_regions(shape, member))
    assert torch.equal(parent.logits(tokens, member), sliced)
    assert torch.equal(parent.logits(tokens, keep), masked)


def test_perturbing_any_kept_tensor_changes_the_output() -> None:
    """Guards the guard: the same perturbation is loud one tensor further in."""
    shape, member = tiny_shape(), tiny_member()
    tokens, regions = random_tokens(shape), kept_regions(shape, member)
    keep = hard_keep(shape, member)
    before = random_parent(shape).logits(tokens, member)
    for name, region in regions.items():
        if region.any():
            parent = random_parent(shape)
            nothing = {other: torch.zeros_like(mask) for other, mask in regions.items()}
            perturb(parent, nothing | {name: region}, inside=True)
            assert difference(parent.logits(tokens, member), before) > 1e-3, name
            assert difference(parent.logits(tokens, keep), before) > 1e-3, name


# Law 5: the parent is Nemotron-H.


@given(shapes(), st.integers(1, 20))
def test_parent_equals_stock_nemotron_h_in_logits_and_gradients(
    shape: ParentShape, time: int
) -> None:
    shape.tied_head = False  # stock transformers has no shared gradient; see test_weights
    parent, tokens = random_parent(shape), random_tokens(shape, time=time)
    stock = stock_model(shape)
    stock.load_state_dict(stock_names(parent.state_dict()))
    ours, theirs = parent.logits(tokens), stock(tokens).logits
    assert_near(ours, theirs)
    probe(theirs).backward()
    expected = {name: weight.grad for name, weight in stock.named_parameters()}
    assert_gradients_near(stock_names(gradients(parent, probe(ours))), expected)


def test_parent_equals_stock_nemotron_h_over_several_chunks() -> None:
    """Both scans work in chunks, of different sizes; the sequence is a multiple of neither."""
    shape = tiny_shape()
    parent, tokens = random_parent(shape), random_tokens(shape, time=150)
    stock = stock_model(shape)
    stock.load_state_dict(stock_names(parent.state_dict()))
    assert_near(parent.logits(tokens), stock(tokens).logits)


def test_no_token_sees_the_future() -> None:
    shape = tiny_shape()
    parent, tokens = random_parent(shape), random_tokens(shape, time=80)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % shape.vocab_size
    before, after = parent.logits(tokens), parent.logits(changed)
    assert difference(after[:, :40], before[:, :40]) < 1e-5
    assert difference(after[:, 40:], before[:, 40:]) > 0.1


# How it runs.
