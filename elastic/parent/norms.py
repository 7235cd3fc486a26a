"""RMS norms of Nemotron-H, each whole, sliced or masked, with weights of their own for members.

A member's norm divides by the root mean square of the channels that it keeps. These hold a share
rho of the energy that is not k / d for k of d channels, so that everything the norm hands on is off
by sqrt(k / (rho d)): one shared weight cannot be right for the parent and for a member. So each
smaller budget has norm weights of its own. They are held at full width, so that members of several
widths can share them, and are scaled by sqrt(rho(k) d / k) for the width at hand; scale and prefix
are folded when a member is written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic.members.cut import Cut
from elastic.parent.layers import narrow


def width_scale(energy: Tensor, groups: int, cut: Cut | None, keep: Tensor | None) -> Tensor:
    """sqrt(rho(k) d / k) of every kept channel, for what is kept of each of `groups` groups.

    Args:
        energy: (d,), shares of the channels in their group's energy.
        cut: what a slice keeps; the result is (k,).
        keep: (1, d) a mask, soft or hard; the result is (d,).
    """
    whole = energy.view(groups, -1)  # (g, d / g)
    if keep is None:
        kept = narrow(energy, cut).view(groups, -1)
        size: Tensor | int = kept.shape[1]
    else:
        assert len(keep) == 1, "own norms take one mask for the whole batch"
        mask = keep.view(groups, -1).float()
        kept, size = whole * mask, mask.sum(1)
    rho = kept.sum(1) / whole.sum(1)
    scale = (rho * whole.shape[1] / size).sqrt()
    return scale[:, None].expand_as(kept).flatten()


def own_name(norm: str) -> str:
    """Name of the weights of several budgets, beside a norm's stored name."""
    return f"{norm.removesuffix('weight')}own"


class ElasticNorm(nn.Module):
    """The weights of a norm: the parent's, and own ones for each smaller budget.

    Args:
        size: channels.
        groups: runs of channels of which each is normalised on its own.
    """

    own: nn.Parameter | None
    """(budgets, size), or None where members use the parent's."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_parameter("own", None)
        self.groups, self.eps = groups, eps
        # Not a buffer: strategies round those with the weights.
        self._energy = torch.ones(size)
        self._scales: dict[tuple[Cut | None, torch.device], Tensor] = {}

    def add_own(self, budgets: int, energy: Tensor) -> None:
        """Give each of some budgets weights of its own, which start as the parent's.

        energy: (size,) float32, shares of the channels in their group's energy.
        """
        self.own = nn.Parameter(self.weight.detach().repeat(budgets, 1))
        self._energy = energy
        self._scales = {}

    def weights(self, cut: Cut | None, keep: Tensor | None, own: int | None) -> Tensor:
        """What the normed channels are multiplied with: (k,) of a slice, else (size,).

        own: position of a budget that has its own; None for the parent's.
        """
        if own is None or self.own is None:
            return narrow(self.weight, cut)
        weight = narrow(self.own[own], cut)
        if keep is None:
            return weight * self._scale(cut, weight)
        return weight * width_scale(self._energy_on(weight), self.groups, None, keep)

    def _scale(self, cut: Cut | None, like: Tensor) -> Tensor:
        key = cut, like.device
        if key not in self._scales:
            self._scales[key] = width_scale(self._energy, self.groups, cut, None).to(like.device)
        return self._scales[key]

    def _energy_on(self, like: Tensor) -> Tensor:
        if self._energy.device != like.device:
            self._energy = self._energy.to(like.device)
            self._scales = {}
        return self._energy


class RMSNorm(ElasticNorm):
    """RMS norm over the kept channels, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, 1, eps)

    def forward(
        self,
        x: Tensor,
        cut: Cut | None = None,
        keep: Tensor | None = None,
        own: int | None = None,
    ) -> Tensor:
        """(b, t, d) -> (b, t, d); under a mask `keep` (b, d), x is masked already.

        The mean of squares runs over the kept width, which is the sum of the mask: exact for a hard
        mask, since the others are zero (arXiv 2511.16664, section 3.2, with the norm corrected).
        """
        kept = None if keep is None else keep.float().sum(-1)[:, None, None]  # (b, 1, 1)
        weight = self.weights(cut, keep, own).float()
        normed: Tensor = _RMSNorm.apply(x.float(), weight, kept, self.eps)
        return normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(sum(x^2) / kept + eps) * weight with its gradient written out: half the passes over
    x. kept None is the whole width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor | None, eps: float) -> Tensor:
        power = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = (power / (x.shape[-1] if kept is None else kept)).add_(eps).rsqrt_()  # (b, t, 1)
        ctx.save_for_backward(x, weight, kept, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, kept, scale = ctx.saved_tensors
        normed, x_grad = x * scale, grad * weight
        along = torch.linalg.vecdot(x_grad, normed).unsqueeze(-1)
        along /= x.shape[-1] if kept is None else kept
        x_grad.addcmul_(normed, along, value=-1).mul_(scale)
        kept_grad = None if kept is None else kept_gradient(along, scale, ctx.eps, kept)
        return x_grad, normed.mul_(grad).flatten(0, -2).sum(0), kept_grad, None


def kept_gradient(along: Tensor, scale: Tensor, eps: float, kept: Tensor) -> Tensor:
    """Gradient of a norm's kept width, shaped as it.

    scale = (power / kept + eps)^-1/2 rises with it; `along` is the gradient in the direction of the
    normed values, over kept.
    """
    return (0.5 * along * (1 - eps * scale.square())).sum_to_size(kept.shape)


class GatedRMSNorm(ElasticNorm):
    """RMS norm per SSM group of the gated scan output, over the kept units of the group."""

    def forward(self, y: Tensor, gate: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
        """(b, t, units), (b, t, units) -> (b, t, units); `weight` (units,) is of `weights`, `keep`
        is (b, units).

        Zeros still count in a mean of squares, so under a mask it runs over the kept share of the
        group, exactly what the sliced norm does (arXiv 2511.16664, section 3.2).
        """
        gated = y.float() * F.silu(gate.float())
        size = gated.shape[-1] // self.groups
        kept: Tensor | int = size
        if keep is not None:
            gated = gated * keep[:, None, :]
            kept = keep.unflatten(-1, (self.groups, size)).sum(-1)[:, None, :, None]  # (b, 1, g, 1)
        gated = gated.unflatten(-1, (self.groups, size))  # (b, t, g, units per group)
        variance = gated.square().sum(-1, keepdim=True) / kept
        normed = (gated * torch.rsqrt(variance + self.eps)).flatten(-2)
        # A member's own weights are float32, by their scale, beside activations in bfloat16.
        return (weight * normed.to(y.dtype)).to(y.dtype)
