"""Norms, projections, MLP and attention of Nemotron-H, each whole, sliced or masked.

Every module runs in one of three ways. Whole: the parent. Sliced: `cuts` narrow the weights to a
member's prefixes, so that a small member costs little. Masked: keep masks silence units and the
whole parent is computed, which is differentiable in the masks. A hard mask and its slice are the
same function. Shapes: b batch, t time, d hidden, f MLP width, q query heads, k KV heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.architecture import AttentionLayer
from elastic.config import ParentShape
from elastic.cut import Cut, Ranges

Cuts = Mapping[str, Cut]


@dataclass(frozen=True)
class LayerKeep:
    """Keep masks of one layer, 1.0 stays; b is the batch, or 1 for one mask for all.

    `gate` (b,) scales what the layer adds to the residual stream. `width` is (b, f) over MLP units,
    (b, h) over Mamba heads or (b, q) over query heads; `channels` is (b, p) over the channels of
    every Mamba head.
    """

    gate: Tensor | None = None
    width: Tensor | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """Keep masks of the whole parent; `hidden` is (b, d), `layers` has one entry per parent
    layer."""

    hidden: Tensor | None
    layers: tuple[LayerKeep, ...]


@lru_cache(maxsize=4096)
def _index(ranges: Ranges, device: torch.device) -> Tensor:
    """Indices of some ranges, kept on the device."""
    return torch.cat([torch.arange(start, stop) for start, stop in ranges]).to(device)


def narrow(weight: Tensor, cut: Cut | None) -> Tensor:
    """The part of a weight that a member keeps: a view where each dimension is one range."""
    if cut is None:
        return weight
    for dim, ranges in enumerate(cut):
        if ranges is not None and len(ranges) == 1:
            weight = weight.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    for dim, ranges in enumerate(cut):
        if ranges is not None and len(ranges) > 1:
            weight = weight.index_select(dim, _index(ranges, weight.device))
    return weight


class Linear(nn.Linear):
    """A projection without bias whose weight can be narrowed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor, cut: Cut | None = None) -> Tensor:
        """(..., inputs) -> (..., outputs), both as narrowed by `cut`."""
        return F.linear(x, narrow(self.weight, cut))


class RMSNorm(nn.Module):
    """RMS norm over the kept channels, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, cut: Cut | None = None, keep: Tensor | None = None) -> Tensor:
        """(b, t, d) -> (b, t, d); under a mask `keep` (b, d), x is masked already.

        The mean of squares runs over the kept width, which is the sum of the mask: exact for a hard
        mask, since the others are zero (arXiv 2511.16664, section 3.2, with the norm corrected).
        """
        weight = narrow(self.weight, cut).float()
        values = x.float()
        if keep is None:
            variance = values.square().mean(-1, keepdim=True)
        else:
            variance = values.square().sum(-1, keepdim=True) / keep.sum(-1)[:, None, None]
        return (weight * (values * torch.rsqrt(variance + self.eps))).to(x.dtype)


class MLP(nn.Module):
    """Two projections around a squared ReLU."""

    def __init__(self, shape: ParentShape) -> None:
        super().__init__()
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor, cuts: Cuts, keep: LayerKeep) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        units = F.relu(self.up_proj(x, cuts.get("mixer.up_proj.weight"))).square()  # (b, t, f)
        if keep.width is not None:
            units = units * keep.width[:, None, :].to(units.dtype)
        return self.down_proj(units, cuts.get("mixer.down_proj.weight"))


class Attention(nn.Module):
    """Causal grouped-query attention without positional embedding."""

    def __init__(self, shape: ParentShape) -> None:
        super().__init__()
        self.heads, self.groups = shape.num_attention_heads, shape.num_key_value_heads
        self.head_dim = shape.head_dim
        self.q_proj = Linear(shape.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(shape.hidden_size, self.groups * self.head_dim)
        self.v_proj = Linear(shape.hidden_size, self.groups * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, shape.hidden_size)

    def forward(
        self, x: Tensor, layer: AttentionLayer | None, cuts: Cuts, keep: LayerKeep
    ) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        heads = self.heads if layer is None else layer.num_heads
        query, key, value = (
            projection(x, cuts.get(f"mixer.{name}.weight"))
            .unflatten(-1, (count, self.head_dim))
            .transpose(1, 2)  # (b, heads, t, head_dim)
            for name, projection, count in (
                ("q_proj", self.q_proj, heads),
                ("k_proj", self.k_proj, self.groups),
                ("v_proj", self.v_proj, self.groups),
            )
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads != self.groups
        )
        if keep.width is not None:
            mixed = mixed * keep.width[:, :, None, None].to(mixed.dtype)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2), cuts.get("mixer.o_proj.weight"))
