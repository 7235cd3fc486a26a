"""Activation statistics -> orders: each rule beside the same rule written out in plain Python."""

import torch
from helpers.strategies import shapes, tiny_shape
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.config import ParentShape
from elastic.importance.score import (
    descending,
    mamba_orders,
    rank_widths,
    within_groups,
)

Scores = list[int]
FEW = st.integers(0, 3)
"""Few different values, so that ties are common."""


def sorted_indices(scores: Scores) -> list[int]:
    """From the highest to the lowest; of equals the first comes first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


# Plain sorting


@given(st.lists(FEW, min_size=1, max_size=40))
def test_descending_is_a_stable_sort_from_the_highest(scores: Scores) -> None:
    assert descending(torch.tensor(scores).float()).tolist() == sorted_indices(scores)


@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_within_groups_sorts_every_group_on_its_own(
    groups: int, size: int, data: st.DataObject
) -> None:
    total = groups * size
    scores = data.draw(st.lists(FEW, min_size=total, max_size=total))
    expected = []
    for start in range(0, total, size):
        expected += [start + index for index in sorted_indices(scores[start : start + size])]
    order = within_groups(torch.tensor(scores).float(), groups)
    assert order.tolist() == expected
    assert (order // size).tolist() == [group for group in range(groups) for _ in range(size)]


def test_within_groups_never_takes_the_best_of_another_group() -> None:
    assert within_groups(torch.tensor([1.0, 2.0, 8.0, 9.0]), 2).tolist() == [1, 0, 3, 2]
    assert within_groups(torch.tensor([1.0, 2.0, 8.0, 9.0]), 1).tolist() == [3, 2, 1, 0]


# Mamba: channels first, then heads


def test_heads_are_ranked_on_the_channels_that_are_kept() -> None:
    """Head 0 is the larger one, but only through channel 1, which the smallest member drops."""
    scores = torch.tensor([[3.0, 4.0], [4.0, 0.0]])  # (h, p); the channels have norms 5 and 4
    both, best = mamba_orders(scores, 1, 2), mamba_orders(scores, 1, 1)
    assert both[1].tolist() == best[1].tolist() == [0, 1]
    assert both[0].tolist() == [0, 1]
    assert best[0].tolist() == [1, 0]


def test_the_kept_channels_are_the_best_ones_not_the_first_ones() -> None:
    scores = torch.tensor([[9.0, 1.0], [0.0, 20.0]])
    heads, channels = mamba_orders(scores, 1, 1)
    assert channels.tolist() == [1, 0]
    assert heads.tolist() == [1, 0]
    assert mamba_orders(scores[:, :1], 1, 1)[0].tolist() == [0, 1], "by the first channel alone"


def test_a_channel_counts_with_its_norm_over_all_heads_of_all_groups() -> None:
    """Sums would say 6 and 5; norms say 4.2 and 5. One order serves both groups."""
    scores = torch.tensor([[3.0, 5.0], [3.0, 0.0]])
    for groups in (1, 2):
        assert mamba_orders(scores, groups, 2)[1].tolist() == [1, 0]


def test_a_head_counts_with_its_norm_over_channels() -> None:
    scores = torch.tensor([[3.0, 3.0], [5.0, 0.0]])
    assert mamba_orders(scores, 1, 2)[0].tolist() == [1, 0]


def test_mamba_heads_stay_in_their_group() -> None:
    scores = torch.tensor([[1.0], [2.0], [8.0], [9.0]])
    assert mamba_orders(scores, 2, 1)[0].tolist() == [1, 0, 3, 2]


# All axes of a parent


def random_scores(shape: ParentShape, seed: int = 0) -> dict[str, Tensor]:
    """Statistics of the form that `collect` returns."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, tuple[int, ...]] = {
        "mamba": (shape.mamba_num_heads, shape.mamba_head_dim),
        "mlp": (shape.intermediate_size,),
        "attention": (shape.num_attention_heads, shape.head_dim),
    }
    scores = {"hidden": torch.rand(shape.hidden_size, generator=generator)}
    for index, kind in enumerate(shape.kinds):
        scores[f"layer.{index}"] = torch.rand(sizes[kind], generator=generator)
    return scores


@given(shapes(), st.integers(0, 1000))
def test_every_layer_gets_the_permutations_of_its_kind(shape: ParentShape, seed: int) -> None:
    orders = rank_widths(shape, random_scores(shape, seed), shape.mamba_head_dim)
    sizes = {
        "mamba": shape.mamba_num_heads,
        "mlp": shape.intermediate_size,
        "attention": shape.num_attention_heads,
    }
    axes = {"mamba": orders.mamba_heads, "mlp": orders.ffn, "attention": orders.attention_heads}
    for kind, per_layer in axes.items():
        assert list(per_layer) == [index for index, k in enumerate(shape.kinds) if k == kind]
        for order in per_layer.values():
            assert sorted(order.tolist()) == list(range(sizes[kind]))
    assert orders.mamba_channels.keys() == orders.mamba_heads.keys()
    for order in orders.mamba_channels.values():
        assert sorted(order.tolist()) == list(range(shape.mamba_head_dim))
    assert sorted(orders.hidden.tolist()) == list(range(shape.hidden_size))


def test_query_heads_are_ranked_by_norm_inside_their_kv_group() -> None:
    shape = tiny_shape(
        pattern="*", num_attention_heads=4, num_key_value_heads=2, head_dim=2, hidden_size=3
    )
    heads = torch.tensor([[3.0, 3.0], [5.0, 0.0], [9.0, 9.0], [9.0, 8.0]])
    scores = {"hidden": torch.tensor([1.0, 3.0, 2.0]), "layer.0": heads}
    orders = rank_widths(shape, scores, 1)
    assert orders.attention_heads[0].tolist() == [1, 0, 2, 3]
    assert orders.hidden.tolist() == [1, 2, 0]


def test_mamba_heads_of_a_parent_are_ranked_for_the_smallest_head_dim() -> None:
    shape = tiny_shape(pattern="M", mamba_num_heads=2, mamba_head_dim=2, n_groups=1)
    scores = {"hidden": torch.ones(13), "layer.0": torch.tensor([[3.0, 4.0], [4.0, 0.0]])}
    assert rank_widths(shape, scores, 1).mamba_heads[0].tolist() == [1, 0]
    assert rank_widths(shape, scores, 2).mamba_heads[0].tolist() == [0, 1]
