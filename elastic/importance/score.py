"""Activation statistics -> orders, most important first. Pure functions (arXiv 2511.16664, 3.1)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.config import ParentShape


@dataclass(frozen=True)
class Orders:
    """Permutations that sort the parent: entry 0 is the index of the most important component.

    `hidden` is (d,) for the whole network; the others have one entry per layer of their kind, by
    parent layer index: `ffn` (f,), `mamba_heads` (h,) and `attention_heads` (q,) permute only
    inside their SSM or KV group, `mamba_channels` (p,) is shared by all heads of the layer.
    """

    hidden: Tensor
    ffn: dict[int, Tensor]
    mamba_heads: dict[int, Tensor]
    mamba_channels: dict[int, Tensor]
    attention_heads: dict[int, Tensor]
    rotation: Tensor | None = None
    """(d, d) float64, orthogonal: the residual stream is rotated instead of permuted, and column j
    is the j-th direction; `hidden` is not read then."""


def descending(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest; ties keep their order, so that it is
    repeatable."""
    return torch.sort(scores, descending=True, stable=True).indices


def within_groups(scores: Tensor, groups: int) -> Tensor:
    """Sort inside each of `groups` equal runs of consecutive components; none leaves its group."""
    size = scores.numel() // groups
    order = torch.sort(scores.view(groups, size), dim=1, descending=True, stable=True).indices
    return (order + torch.arange(groups)[:, None] * size).flatten()


def mamba_orders(scores: Tensor, groups: int, kept_channels: int) -> tuple[Tensor, Tensor]:
    """Channels first, then heads on the channels that the smallest member keeps.

    scores (h, p): activations of the x projection. A channel counts with its L2 norm over all
    heads, a head with the L2 norm over the best `kept_channels` channels, ranked inside its SSM
    group. Returns the order of heads (h,) and of channels (p,).
    """
    channels = descending(scores.norm(dim=0))
    heads = within_groups(scores[:, channels[:kept_channels]].norm(dim=1), groups)
    return heads, channels


def rank_widths(shape: ParentShape, scores: Mapping[str, Tensor], smallest_head_dim: int) -> Orders:
    """Orders on every width axis from the scores of `collect.Statistics`."""
    ffn, heads, channels, attention = {}, {}, {}, {}
    for index, kind in enumerate(shape.kinds):
        score = scores[f"layer.{index}"]
        if kind == "mlp":
            ffn[index] = descending(score)
        elif kind == "attention":
            attention[index] = within_groups(score.norm(dim=1), shape.num_key_value_heads)
        else:
            heads[index], channels[index] = mamba_orders(score, shape.n_groups, smallest_head_dim)
    return Orders(descending(scores["hidden"]), ffn, heads, channels, attention)
