"""Norms of members' own: a slice, a mask and what is written are one function with them too."""

import copy
import dataclasses

import pytest
import torch
from helpers.strategies import (
    architectures,
    assert_near,
    difference,
    random_parent,
    random_tokens,
    shapes,
    tiny_member,
    tiny_shape,
    with_own_norms,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.members.architecture import Architecture
from elastic.members.cut import member_cuts
from elastic.parent import HybridParent
from elastic.parent.layers import narrow
from elastic.parent.norms import ElasticNorm, own_name, width_scale
from elastic.routing.masks import hard_keep

SHAPE = tiny_shape()


@given(st.data())
def test_sliced_is_masked_with_own_norms(data: st.DataObject) -> None:
    """Law 1, for either budget."""
    shape = data.draw(shapes())
    member = data.draw(architectures(shape))
    parent, tokens = with_own_norms(shape), random_tokens(shape)
    keep = hard_keep(shape, member)
    with torch.no_grad():
        for own in (0, 1):
            sliced = parent.logits(tokens, member, own=own)
            assert_near(parent.logits(tokens, keep, own=own), sliced)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 4 + [1] * 5] * 2).int()])
def test_weights_in_bfloat16_have_own_norms_too(documents: Tensor | None) -> None:
    """Their scale is float32 and must not reach the projection after the norm."""
    parent, tokens, member = with_own_norms(SHAPE), random_tokens(SHAPE), tiny_member()
    with torch.no_grad():
        exact = parent.logits(tokens, member, documents, own=1)
        half = parent.bfloat16()
        for run in (member, hard_keep(SHAPE, member)):
            assert half(tokens, run, documents, own=1).dtype == torch.bfloat16
            assert_near(half.logits(tokens, run, documents, own=1), exact, torch.bfloat16)


def test_each_budget_and_the_parent_have_their_own() -> None:
    parent, tokens, member = with_own_norms(SHAPE), random_tokens(SHAPE), tiny_member()
    with torch.no_grad():
        outputs = [parent.logits(tokens, member, own=own) for own in (None, 0, 1)]
    for one in range(3):
        assert difference(outputs[one], outputs[one - 1]) > 1e-2


def test_gradients_go_to_the_budget_at_hand_alone() -> None:
    parent, tokens = with_own_norms(SHAPE), random_tokens(SHAPE)
    parent.logits(tokens, tiny_member(), own=1).square().sum().backward()
    for name, weight in parent.named_parameters():
        if "layers.3" in name:  # a layer that this member drops
            assert weight.grad is None, name
        elif name.endswith(".own"):
            assert weight.grad is not None, name
            assert weight.grad[1].any() and not weight.grad[0].any(), name
        elif name.endswith(("norm.weight", "norm_f.weight")):
            assert weight.grad is None, name


def test_they_start_as_the_parents_scaled_for_the_width() -> None:
    """Energies that are equal leave the parent's prefix as it is, whatever the width."""
    parent, tokens, member = random_parent(SHAPE), random_tokens(SHAPE), tiny_member()
    equal = {
        f"{name}.weight": torch.full(module.weight.shape, module.groups / len(module.weight))
        for name, module in parent.named_modules()
        if isinstance(module, ElasticNorm)
    }
    with torch.no_grad():
        before = parent.logits(tokens, member)
        parent.add_own_norms(1, equal)
        assert_near(parent.logits(tokens, member, own=0), before)
        full = Architecture.full(SHAPE)
        assert_near(parent.logits(tokens, full, own=0), parent.logits(tokens))


def test_the_scale_undoes_what_a_cut_does_to_a_norm() -> None:
    """Inputs of constant energy per channel: what is kept comes out as it did uncut."""
    energy = torch.tensor([0.4, 0.3, 0.2, 0.1])
    x = energy.sqrt() * torch.tensor([1.0, -1.0, 1.0, 1.0])
    normed = x / x.square().mean().sqrt()
    for kept in (1, 2, 3, 4):
        cut = x[:kept] / x[:kept].square().mean().sqrt()
        scaled = cut * width_scale(energy, 1, (((0, kept),),), None)
        torch.testing.assert_close(scaled, normed[:kept])


def test_soft_masks_scale_between_hard_ones_and_have_a_gradient() -> None:
    energy = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.7, 0.1, 0.1, 0.1])
    hard = torch.tensor([[1.0, 1, 0, 0, 1, 1, 0, 0]])
    ranges = ((0, 2), (4, 6))
    kept = width_scale(energy, 2, (ranges,), None)
    masked = width_scale(energy, 2, None, hard)
    torch.testing.assert_close(masked[[0, 1, 4, 5]], kept)
    soft = torch.full((1, 8), 0.5, requires_grad=True)
    width_scale(energy, 2, None, soft).sum().backward()
    assert soft.grad is not None and soft.grad.abs().sum() > 0


def test_the_fused_mixer_and_its_plain_twin_agree() -> None:
    """Law 6, gradients too; `observe` chooses the plain one."""
    shape = tiny_shape(pattern="MM")
    fused, tokens = with_own_norms(shape), random_tokens(shape)
    plain = copy.deepcopy(fused)
    for block in plain.backbone.layers:
        block.mixer.observe = lambda gated: None
    member = dataclasses.replace(Architecture.full(shape), hidden_size=9)
    outputs = [parent.logits(tokens, member, own=1) for parent in (fused, plain)]
    assert_near(outputs[1].detach(), outputs[0].detach())
    for output in outputs:
        output.square().mean().backward()
    for (name, one), (_, other) in zip(
        fused.named_parameters(), plain.named_parameters(), strict=True
    ):
        if one.grad is not None or other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def folded(parent: HybridParent, member: Architecture, own: int) -> dict[str, Tensor]:
    """Norms of a member as they are written, by their stored names in the parent."""
    found = {}
    for cut in member_cuts(parent.shape, member):
        if "norm" in cut.source:
            module = parent.get_submodule(cut.source.removesuffix(".weight"))
            assert isinstance(module, ElasticNorm)
            weight = parent.get_parameter(own_name(cut.source))[own]
            scale = width_scale(module._energy, module.groups, cut.cut, None)
            found[cut.source] = narrow(weight, cut.cut) * scale
    return found


@pytest.mark.parametrize("own", [0, 1])
def test_scale_and_prefix_folded_into_a_norm_are_the_same_function(own: int) -> None:
    parent, tokens, member = with_own_norms(SHAPE), random_tokens(SHAPE), tiny_member()
    with torch.no_grad():
        expected = parent.logits(tokens, member, own=own)
        for name, value in folded(parent, member, own).items():
            cut = next(c.cut for c in member_cuts(SHAPE, member) if c.source == name)
            whole, at = parent.get_parameter(name), 0
            for start, stop in cut[0] or ((0, len(whole)),):
                whole[start:stop] = value[at : at + stop - start]
                at += stop - start
        assert_near(parent.logits(tokens, member), expected)
