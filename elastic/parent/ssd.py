"""The Mamba-2 mixer, and the choice of its scan. The only place that imports mamba_ssm."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.architecture import MambaLayer
from elastic.config import ConfigError, ParentShape
from elastic.parent.layers import Cuts, LayerKeep, Linear, narrow
from elastic.parent.ssd_ref import ssd_chunked

MAMBA_SSM_CHUNK = 256
"""Chunk of the Triton kernels, as Nemotron-H publishes it."""


def resolve_kernels(kernels: str, device: torch.device) -> str:
    """`auto` becomes `mamba_ssm` on a GPU that has the package, else `torch`."""
    installed = importlib.util.find_spec("mamba_ssm") is not None
    if kernels == "auto":
        return "mamba_ssm" if device.type == "cuda" and installed else "torch"
    if kernels == "mamba_ssm" and not installed:
        raise ConfigError(
            "parent.kernels=mamba_ssm: mamba_ssm is not installed; install elastic[cluster], "
            "or set parent.kernels=torch"
        )
    return kernels


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, kernels: str) -> Tensor:
    """The scan of `ssd_ref.ssd_recurrent`, by the chosen kernels; dt is positive already."""
    if kernels == "mamba_ssm":
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        y: Tensor = mamba_chunk_scan_combined(x, dt, a, b, c, MAMBA_SSM_CHUNK, D=d)
        return y
    return ssd_chunked(x, dt, a, b, c, d)


class Conv1d(nn.Module):
    """Causal depthwise convolution over time; the weight is stored as (channels, 1, kernel)."""

    def __init__(self, channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, cuts: Cuts) -> Tensor:
        """(b, t, channels) -> (b, t, channels)."""
        weight = narrow(self.weight, cuts.get("mixer.conv1d.weight"))
        bias = None if self.bias is None else narrow(self.bias, cuts.get("mixer.conv1d.bias"))
        padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
        return F.conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2)


class GatedRMSNorm(nn.Module):
    """RMS norm per SSM group of the gated scan output, over the kept units of the group."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, gate: Tensor, cuts: Cuts, keep: Tensor | None) -> Tensor:
        """(b, t, units), (b, t, units) -> (b, t, units); `keep` is (b, units).

        Zeros still count in a mean of squares, so under a mask it runs over the kept share of the
        group, exactly what the sliced norm does (arXiv 2511.16664, section 3.2).
        """
        weight = narrow(self.weight, cuts.get("mixer.norm.weight"))
        gated = y.float() * F.silu(gate.float())
        size = gated.shape[-1] // self.groups
        kept: Tensor | int = size
        if keep is not None:
            gated = gated * keep[:, None, :]
            kept = keep.unflatten(-1, (self.groups, size)).sum(-1)[:, None, :, None]  # (b, 1, g, 1)
        gated = gated.unflatten(-1, (self.groups, size))  # (b, t, g, units per group)
        variance = gated.square().sum(-1, keepdim=True) / kept
        normed = (gated * torch.rsqrt(variance + self.eps)).flatten(-2)
        return weight * normed.to(y.dtype)


class MambaMixer(nn.Module):
    """Mamba-2 (arXiv 2405.21060) as Nemotron-H has it; heads are stored group by group."""

    def __init__(self, shape: ParentShape, kernels: str) -> None:
        super().__init__()
        self.shape, self.kernels = shape, kernels
        self.heads, self.head_dim = shape.mamba_num_heads, shape.mamba_head_dim
        inner = self.heads * self.head_dim
        self.state = shape.n_groups * shape.ssm_state_size
        self.in_proj = Linear(shape.hidden_size, 2 * inner + 2 * self.state + self.heads)
        self.conv1d = Conv1d(inner + 2 * self.state, shape.conv_kernel, shape.conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm(inner, shape.n_groups, shape.norm_eps)
        self.out_proj = Linear(inner, shape.hidden_size)

    def forward(self, u: Tensor, layer: MambaLayer | None, cuts: Cuts, keep: LayerKeep) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        heads = self.heads if layer is None else layer.num_heads
        channels = self.head_dim if layer is None else layer.head_dim
        inner = heads * channels
        gate, convolved, dt = self.in_proj(u, cuts.get("mixer.in_proj.weight")).split(
            [inner, inner + 2 * self.state, heads], dim=-1
        )
        x, b, c = F.silu(self.conv1d(convolved, cuts)).split(
            [inner, self.state, self.state], dim=-1
        )
        groups = (self.shape.n_groups, self.shape.ssm_state_size)
        a_log, d, dt_bias = (
            narrow(weight, cuts.get(f"mixer.{name}"))
            for name, weight in (("A_log", self.A_log), ("D", self.D), ("dt_bias", self.dt_bias))
        )
        y = scan(
            x.unflatten(-1, (heads, channels)),
            F.softplus(dt + dt_bias).clamp(min=self.shape.time_step_min),
            -torch.exp(a_log.float()),
            b.unflatten(-1, groups),
            c.unflatten(-1, groups),
            d,
            self.kernels,
        ).flatten(-2)  # (b, t, h * p)
        return self.out_proj(
            self.norm(y, gate, cuts, self._units(keep)), cuts.get("mixer.out_proj.weight")
        )

    def _units(self, keep: LayerKeep) -> Tensor | None:
        """Mask over (head, channel) pairs: (b, h * p). The scan is linear in each pair on its own,
        so that masking its output is the same as masking its input."""
        if keep.width is None and keep.channels is None:
            return None
        ones = self.D.new_ones(1, 1)
        width = ones if keep.width is None else keep.width
        channels = ones if keep.channels is None else keep.channels
        units = width[:, :, None] * channels[:, None, :]
        return units.expand(-1, self.heads, self.head_dim).flatten(1)
