"""Projections, MLP and attention of Nemotron-H, each whole, sliced or masked.

Every module runs in one of three ways. Whole: the parent. Sliced: `cuts` narrow the weights to a
member's prefixes, so that a small member costs little. Masked: keep masks scale units, 0 removes
one, and the whole parent is computed, which is differentiable in the masks. A hard mask and its
slice are the same function. Shapes: b batch, t time, d hidden, f MLP width, q query heads, k KV
heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic.config import ParentShape
from elastic.members.architecture import AttentionLayer
from elastic.members.cut import Cut
from elastic.parent.attend import Seen, attend

Cuts = Mapping[str, Cut]


@dataclass(frozen=True)
class LayerKeep:
    """Keep masks of one layer, 1.0 stays; b is the batch, or 1 for one mask for all.

    `gate` (b,) scales what the layer adds to the residual stream. `width` is (b, f) over MLP units,
    (b, h) over Mamba heads or (b, q) over query heads; `channels` is (b, p) over the channels of
    every Mamba head. `share` is known where these two are hard, zeros and ones: the kept part of
    every SSM group, so that no kernel has to read it from the device.
    """

    gate: Tensor | None = None
    width: Tensor | None = None
    channels: Tensor | None = None
    share: float | None = None


@dataclass(frozen=True)
class Keep:
    """Keep masks of the whole parent; `hidden` is (b, d), `layers` has one entry per parent
    layer."""

    hidden: Tensor | None
    layers: tuple[LayerKeep, ...]


def narrow(weight: Tensor, cut: Cut | None) -> Tensor:
    """The part of a weight that a member keeps: a view where each dimension is one range, a copy of
    that part where it is several.

    The gradient of the whole weight is zero where nothing was used.
    """
    if cut is None or all(ranges is None for ranges in cut):
        return weight
    part: Tensor = _Narrow.apply(weight, cut)
    return part


class _Narrow(torch.autograd.Function):
    """All dimensions cut at once: one full-size gradient is filled, however many they are."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cut: Cut) -> Tensor:
        ctx.cut, ctx.size = cut, weight.shape
        part = weight[_bounds(cut)]
        for dim, ranges in enumerate(cut):
            if ranges is not None and len(ranges) > 1:
                first = ranges[0][0]
                kept = [part.narrow(dim, start - first, stop - start) for start, stop in ranges]
                part = torch.cat(kept, dim)
        return part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.new_zeros(ctx.size)
        _scatter(whole[_bounds(ctx.cut)], grad, ctx.cut, 0)
        return whole, None


def _bounds(cut: Cut) -> tuple[slice, ...]:
    """The smallest block that holds everything kept."""
    return tuple(
        slice(None) if ranges is None else slice(ranges[0][0], ranges[-1][1]) for ranges in cut
    )


def _scatter(block: Tensor, part: Tensor, cut: Cut, dim: int) -> None:
    """Put `part` back to where it was cut out of `block`, from dimension `dim` on."""
    while dim < len(cut) and (cut[dim] is None or len(cut[dim] or ()) == 1):
        dim += 1
    if dim == len(cut):
        block.copy_(part)
        return
    ranges = cut[dim]
    assert ranges is not None
    offset = 0
    for start, stop in ranges:
        _scatter(
            block.narrow(dim, start - ranges[0][0], stop - start),
            part.narrow(dim, offset, stop - start),
            cut,
            dim + 1,
        )
        offset += stop - start


class Linear(nn.Linear):
    """A projection without bias whose weight can be narrowed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: weights are read, or drawn by `HybridParent.initialise`; 12 billion random
        numbers that are overwritten next take minutes."""

    def forward(self, x: Tensor, cut: Cut | None = None) -> Tensor:
        """(..., inputs) -> (..., outputs), both as narrowed by `cut`."""
        return F.linear(x, narrow(self.weight, cut))


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, keeping relu(x) alone for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)


class MLP(nn.Module):
    """Two projections around a squared ReLU."""

    def __init__(self, shape: ParentShape) -> None:
        super().__init__()
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor, cuts: Cuts, keep: LayerKeep) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        units: Tensor = _SquaredReLU.apply(
            self.up_proj(x, cuts.get("mixer.up_proj.weight"))
        )  # (b, t, f)
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
        self,
        x: Tensor,
        layer: AttentionLayer | None,
        cuts: Cuts,
        keep: LayerKeep,
        seen: Seen = None,
    ) -> Tensor:
        """(b, t, d) -> (b, t, d); `seen` as in `attend`."""
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
        mixed = attend(query, key, value, seen)  # (b, heads, t, head_dim)
        if keep.width is not None:
            mixed = mixed * keep.width[:, :, None, None].to(mixed.dtype)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2), cuts.get("mixer.o_proj.weight"))
