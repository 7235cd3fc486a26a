"""Law 2: the sorted parent computes what the parent computed; and its members keep the best parts.

Logits before and after are compared for random parents under random legal orders. The second half
compares cuts of sorted parents with masks over the same components of unsorted ones.
"""

import copy
import dataclasses

import pytest
import torch
from helpers.documents import rows_of
from helpers.orders import identity_orders, one_axis, random_orders
from helpers.strategies import (
    TOLERANCE,
    architectures,
    assert_near,
    difference,
    random_parent,
    random_tokens,
    shapes,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.config import ImportanceConfig, ParentShape
from elastic.importance import Orders, sort_parent
from elastic.importance.collect import collect
from elastic.importance.score import rank_widths
from elastic.importance.sort import check_orders, head_units
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.parent import HybridParent, Keep, LayerKeep

SHAPE = tiny_shape()


# Law 2


@given(shapes(), st.integers(0, 1000))
def test_sorting_changes_no_logit(shape: ParentShape, seed: int) -> None:
    parent, tokens = random_parent(shape, seed), random_tokens(shape)
    with torch.no_grad():
        before = parent.logits(tokens)
        sort_parent(parent, random_orders(shape, seed))
        assert_near(parent.logits(tokens), before)


@pytest.mark.parametrize("tied_head", [False, True])
def test_sorting_is_exact_to_rounding(tied_head: bool) -> None:
    """Far below the table's tolerance; every tensor that can move has moved."""
    shape = tiny_shape(pattern="M-*M-*M", hidden_size=24, tied_head=tied_head)
    for seed in range(5):
        parent, tokens = random_parent(shape, seed), random_tokens(shape)
        weights = {name: weight.clone() for name, weight in parent.state_dict().items()}
        with torch.no_grad():
            before = parent.logits(tokens)
            sort_parent(parent, random_orders(shape, seed))
            assert difference(parent.logits(tokens), before) < 5e-6
        for name, weight in parent.state_dict().items():
            assert not torch.equal(weight, weights[name]), f"{name} was left alone"


AXES = [field.name for field in dataclasses.fields(Orders) if field.name != "rotation"]


@pytest.mark.parametrize("axis", AXES)
def test_each_axis_alone_changes_no_logit(axis: str) -> None:
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE)
    with torch.no_grad():
        before = parent.logits(tokens)
        sort_parent(parent, one_axis(SHAPE, axis, seed=1))
        assert_near(parent.logits(tokens), before)


@given(shapes(), st.integers(0, 1000))
def test_sorting_moves_weights_and_changes_none(shape: ParentShape, seed: int) -> None:
    parent = random_parent(shape, seed)
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    sort_parent(parent, identity_orders(shape))
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight, before[name])
    sort_parent(parent, random_orders(shape, seed))
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)


def test_sorting_is_in_place_and_leaves_no_gradient() -> None:
    parent = random_parent(SHAPE)
    before = dict(parent.named_parameters())
    sort_parent(parent, random_orders(SHAPE, 0))
    for name, weight in parent.named_parameters():
        assert weight is before[name]
        assert weight.requires_grad and weight.is_leaf and weight.grad is None


def test_a_tied_head_stays_tied() -> None:
    shape = tiny_shape(tied_head=True)
    parent, tokens = random_parent(shape), random_tokens(shape)
    with torch.no_grad():
        before = parent.logits(tokens)
        sort_parent(parent, random_orders(shape, 0))
        assert parent.lm_head.weight is parent.backbone.embeddings.weight
        assert_near(parent.logits(tokens), before)


def test_order_entry_0_is_what_comes_first() -> None:
    """Not the inverse permutation."""
    parent = random_parent(SHAPE)
    orders = random_orders(SHAPE, 3)
    before = copy.deepcopy(parent)
    sort_parent(parent, orders)
    embedding, old = parent.backbone.embeddings.weight, before.backbone.embeddings.weight
    assert torch.equal(embedding[:, 0], old[:, orders.hidden[0]])
    layer, old_layer = parent.backbone.layers[0].mixer, before.backbone.layers[0].mixer
    assert torch.equal(layer.A_log, old_layer.A_log[orders.mamba_heads[0]])
    down, old_down = (p.backbone.layers[1].mixer.down_proj.weight for p in (parent, before))
    assert torch.equal(down[0, 0], old_down[orders.hidden[0], orders.ffn[1][0]])


# The group constraint


def across_groups(shape: ParentShape, axis: str, layer: int) -> Orders:
    """The first head of the first group and the first of the last one change places."""
    orders = identity_orders(shape)
    order = getattr(orders, axis)[layer]
    groups = shape.n_groups if axis == "mamba_heads" else shape.num_key_value_heads
    other = (groups - 1) * (order.numel() // groups)
    order[[0, other]] = order[[other, 0]]
    return orders


@pytest.mark.parametrize(("axis", "layer"), [("mamba_heads", 0), ("attention_heads", 2)])
@pytest.mark.parametrize("groups", [2, 3])
def test_a_permutation_across_groups_breaks_the_function(
    axis: str, layer: int, groups: int
) -> None:
    """Guards the guard: law 2 would see it."""
    shape = tiny_shape(n_groups=groups, num_key_value_heads=groups)
    for seed in range(3):
        parent, tokens = random_parent(shape, seed), random_tokens(shape)
        with torch.no_grad():
            before = parent.logits(tokens)
            sort_parent(parent, across_groups(shape, axis, layer), check=False)
            assert difference(parent.logits(tokens), before) > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(("axis", "layer"), [("mamba_heads", 3), ("attention_heads", 2)])
def test_a_permutation_across_groups_is_refused_before_anything_moves(
    axis: str, layer: int
) -> None:
    parent = random_parent(SHAPE)
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    with pytest.raises(AssertionError, match="a head left its group"):
        sort_parent(parent, across_groups(SHAPE, axis, layer))
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight, before[name])


@given(shapes(), st.integers(0, 1000))
def test_legal_orders_pass_the_check(shape: ParentShape, seed: int) -> None:
    check_orders(shape, random_orders(shape, seed))


def test_head_units_move_whole_heads() -> None:
    assert head_units(torch.tensor([2, 0, 1]), 2).tolist() == [4, 5, 0, 1, 2, 3]


# Prefixes of the sorted parent are the best components of the unsorted one


def scattered_keep(shape: ParentShape, member: Architecture, orders: Orders) -> Keep:
    """Masks over the unsorted parent that keep what comes first in the orders."""

    def mask(order: Tensor, kept: int, groups: int = 1) -> Tensor:
        best = order.view(groups, -1)[:, : kept // groups].flatten()
        return torch.zeros(1, order.numel()).index_fill_(1, best, 1.0)

    layers = [LayerKeep(gate=torch.zeros(1)) for _ in shape.pattern]
    for layer in member.layers:
        index = layer.index
        if isinstance(layer, MLPLayer):
            keep = LayerKeep(width=mask(orders.ffn[index], layer.intermediate_size))
        elif isinstance(layer, MambaLayer):
            heads = mask(orders.mamba_heads[index], layer.num_heads, shape.n_groups)
            keep = LayerKeep(
                width=heads, channels=mask(orders.mamba_channels[index], layer.head_dim)
            )
        else:
            assert isinstance(layer, AttentionLayer)
            groups = shape.num_key_value_heads
            keep = LayerKeep(width=mask(orders.attention_heads[index], layer.num_heads, groups))
        layers[index] = keep
    return Keep(mask(orders.hidden, member.hidden_size), tuple(layers))


@given(st.data())
def test_a_cut_of_the_sorted_parent_is_a_mask_over_the_best_of_the_unsorted_one(
    data: st.DataObject,
) -> None:
    shape = data.draw(shapes())
    member, seed = data.draw(architectures(shape)), data.draw(st.integers(0, 1000))
    orders = random_orders(shape, seed)
    parent, tokens = random_parent(shape, seed), random_tokens(shape)
    with torch.no_grad():
        masked = parent.logits(tokens, scattered_keep(shape, member, orders))
        sort_parent(parent, orders)
        assert_near(parent.logits(tokens, member), masked)


def plant(parent: HybridParent, axis: str, important: list[int]) -> None:
    """Make every other component of an axis nearly silent."""
    shape = parent.shape
    inner = shape.mamba_num_heads * shape.mamba_head_dim

    def silence(weight: Tensor) -> None:
        quiet = [index for index in range(weight.shape[0]) if index not in important]
        weight[quiet] *= 0.02

    with torch.no_grad():
        if axis == "hidden":
            silence(parent.backbone.embeddings.weight.T)
            silence(parent.backbone.norm_f.weight)
        for block in parent.backbone.layers:
            mixer = block.mixer
            if axis == "hidden":
                silence(block.norm.weight)
                out = {"mamba": "out_proj", "mlp": "down_proj", "attention": "o_proj"}[block.kind]
                silence(getattr(mixer, out).weight)
            elif axis == "ffn" and block.kind == "mlp":
                silence(mixer.up_proj.weight)
            elif axis.startswith("mamba") and block.kind == "mamba":
                size = (shape.mamba_num_heads, shape.mamba_head_dim, shape.hidden_size)
                rows = mixer.in_proj.weight[inner : 2 * inner].view(size)  # of x
                bias = mixer.conv1d.bias[:inner].view(size[:2])  # of x as well
                for values in (rows, bias):
                    silence(values if axis == "mamba_heads" else values.transpose(0, 1))


PLANTED = {
    "hidden": [1, 2, 5, 8, 9, 11, 12],
    "ffn": [0, 3, 4, 7, 11, 12, 15],
    "mamba_heads": [1, 2, 4, 5],
    "mamba_channels": [2, 4, 6],
}
"""Components that matter; of Mamba heads, two in each group of three."""


@pytest.mark.parametrize("axis", PLANTED)
def test_a_cut_of_the_ranked_and_sorted_parent_keeps_what_matters(axis: str) -> None:
    """Scores, orders and sorting together: the planted components come first, and the cut is far
    better than one of the unsorted parent."""
    important = PLANTED[axis]
    parent, tokens = random_parent(SHAPE), random_tokens(SHAPE, batch=4)
    plant(parent, axis, important)
    sizes = {"hidden": 13, "ffn": 17, "mamba_heads": 6, "mamba_channels": 7}
    sizes[axis] = len(important)
    layers = (
        MambaLayer(0, sizes["mamba_heads"], sizes["mamba_channels"]),
        MLPLayer(1, sizes["ffn"]),
        AttentionLayer(2, 6),
        MambaLayer(3, sizes["mamba_heads"], sizes["mamba_channels"]),
        MLPLayer(4, sizes["ffn"]),
    )
    member = Architecture(sizes["hidden"], layers)
    scores = collect(parent, rows_of(tokens), ImportanceConfig(samples=4)).scores
    orders = rank_widths(SHAPE, scores, sizes["mamba_channels"])
    found = getattr(orders, axis)
    for order in [found] if axis == "hidden" else found.values():
        if axis == "mamba_heads":
            best = order.view(2, 3)[:, :2].flatten()
        else:
            best = order[: len(important)]
        assert sorted(best.tolist()) == important
    with torch.no_grad():
        whole = parent.logits(tokens)
        unsorted_error = (parent.logits(tokens, member) - whole).square().sum()
        sort_parent(parent, orders)
        sorted_error = (parent.logits(tokens, member) - whole).square().sum()
    assert sorted_error < 0.3 * unsorted_error
