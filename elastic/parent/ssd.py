"""The Mamba-2 mixer, and the choice of its scan. The only place that imports mamba_ssm."""

import importlib.util
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.config import ConfigError, ParentShape
from elastic.members.architecture import MambaLayer
from elastic.parent.borders import Borders
from elastic.parent.layers import Cuts, LayerKeep, Linear, narrow
from elastic.parent.norms import GatedRMSNorm
from elastic.parent.ssd_fused import mixer_core
from elastic.parent.ssd_ref import ssd_chunked

log = logging.getLogger(__name__)

MAMBA_SSM_CHUNK = 256
"""Chunk of the Triton kernels, as Nemotron-H publishes it."""


def kernels_installed() -> bool:
    """Whether mamba_ssm can be imported; this does not import it."""
    return importlib.util.find_spec("mamba_ssm") is not None


def resolve_kernels(kernels: str, device: torch.device) -> str:
    """`auto` becomes `mamba_ssm` on a GPU, else `torch`.

    Raises ConfigError for `mamba_ssm` where it cannot run; also on a GPU without the package, where
    `torch` is slow and must be set explicitly.
    """
    if kernels == "mamba_ssm" and device.type != "cuda":
        raise ConfigError(
            "parent.kernels=mamba_ssm: its kernels need a GPU; set trainer.accelerator=gpu, "
            "or parent.kernels=torch"
        )
    if kernels == "torch" or device.type != "cuda":
        return "torch"
    if not kernels_installed():
        raise ConfigError(
            f"parent.kernels={kernels}: mamba_ssm is not installed; pip install "
            "--no-build-isolation mamba-ssm causal-conv1d, or set parent.kernels=torch (slower)"
        )
    if importlib.util.find_spec("causal_conv1d") is None:
        log.warning("causal_conv1d is not installed: Mamba layers run in pieces, which is slower")
    return "mamba_ssm"


def scan(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    kernels: str,
    documents: Tensor | None = None,
) -> Tensor:
    """The scan of `ssd_ref.ssd_recurrent` by the chosen kernels, from raw step sizes: dt (b, t, h)
    becomes softplus(dt + dt_bias), kept within `dt_limit`, in float32 on either path."""
    if kernels == "mamba_ssm":
        from mamba_ssm.ops.triton import ssd_combined

        y: Tensor = ssd_combined.mamba_chunk_scan_combined(
            x,
            dt,
            a,
            b,
            c,
            MAMBA_SSM_CHUNK,
            D=d,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
            seq_idx=documents,
        )
        return y
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    return ssd_chunked(x, dt, a, b, c, d, documents)


def fused_kernel_takes(channels: int, width: int) -> bool:
    """Whether convolution, scan, norm and output projection can be one call: causal_conv1d is
    installed, and takes a convolution of `width` over so many channels."""
    from mamba_ssm.ops.triton import ssd_combined

    installed = ssd_combined.causal_conv1d_fwd_function is not None
    return installed and channels % 8 == 0 and 2 <= width <= 4


class Conv1d(nn.Module):
    """Causal depthwise convolution over time; the weight is stored as (channels, 1, kernel)."""

    def __init__(self, channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def narrowed(self, cuts: Cuts) -> tuple[Tensor, Tensor | None]:
        """Weight (channels, 1, kernel) and bias (channels,) of a member."""
        bias = None if self.bias is None else narrow(self.bias, cuts.get("mixer.conv1d.bias"))
        return narrow(self.weight, cuts.get("mixer.conv1d.weight")), bias

    def forward(self, x: Tensor, cuts: Cuts, documents: Tensor | None = None) -> Tensor:
        """(b, t, channels) -> (b, t, channels); reads no step of an earlier document."""
        weight, bias = self.narrowed(cuts)
        kernel = weight.shape[-1]
        if documents is None:
            padded = F.pad(x.transpose(1, 2), (kernel - 1, 0))
            return F.conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2)
        taps, values = weight[:, 0].float(), x.float()  # (channels, kernel), (b, t, channels)
        out = values * taps[:, -1]
        for back in range(1, min(kernel, x.shape[1])):
            same = documents[:, back:] == documents[:, :-back]  # (b, t - back)
            earlier = values[:, :-back] * same[..., None]
            out = out + F.pad(earlier, (0, 0, back, 0)) * taps[:, -1 - back]
        return (out if bias is None else out + bias).to(x.dtype)


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
        self.observe: Callable[[Tensor], None] | None = None
        """Is given the inputs of the gated norm, (b, t, h * p), where somebody measures them."""

    def forward(
        self,
        u: Tensor,
        layer: MambaLayer | None,
        cuts: Cuts,
        keep: LayerKeep,
        borders: Borders | None = None,
        own: int | None = None,
    ) -> Tensor:
        """(b, t, d) -> (b, t, d); borders None is one document, `own` as in
        `ElasticNorm.weights`."""
        documents = None if borders is None else borders.ids
        heads = self.heads if layer is None else layer.num_heads
        channels = self.head_dim if layer is None else layer.head_dim
        inner = heads * channels
        projected = self.in_proj(u, cuts.get("mixer.in_proj.weight"))
        units = self._units(keep)
        share = 1.0 if units is None else keep.share
        norm = self.norm.weights(cuts.get("mixer.norm.weight"), units, own)
        if self.kernels == "mamba_ssm" and share is not None and self.observe is None:
            if fused_kernel_takes(inner + 2 * self.state, self.shape.conv_kernel):
                return self._fused_kernel(projected, channels, cuts, norm, units, share, documents)
        if self.kernels == "torch" and self.observe is None:
            core = self._core(projected, cuts, norm, units, borders)
            return self.out_proj(core, cuts.get("mixer.out_proj.weight"))
        gate, convolved, dt = projected.split([inner, inner + 2 * self.state, heads], dim=-1)
        x, b, c = F.silu(self.conv1d(convolved, cuts, documents)).split(
            [inner, self.state, self.state], dim=-1
        )
        groups = (self.shape.n_groups, self.shape.ssm_state_size)
        a, d, dt_bias = self._per_head(cuts)
        y = scan(
            x.unflatten(-1, (heads, channels)),
            dt,
            dt_bias,
            self.shape.dt_limit,
            a,
            b.unflatten(-1, groups),
            c.unflatten(-1, groups),
            d,
            self.kernels,
            documents,
        ).flatten(-2)  # (b, t, h * p)
        if self.observe is not None:
            self.observe(y.float() * F.silu(gate.float()))
        return self.out_proj(self.norm(y, gate, norm, units), cuts.get("mixer.out_proj.weight"))

    def _core(
        self,
        projected: Tensor,
        cuts: Cuts,
        norm: Tensor,
        units: Tensor | None,
        borders: Borders | None,
    ) -> Tensor:
        """All between the projections, in plain torch: (b, t, ...) -> (b, t, h * p)."""
        a, d, dt_bias = self._per_head(cuts)
        return mixer_core(
            projected,
            *self.conv1d.narrowed(cuts),
            dt_bias,
            a,
            d,
            norm,
            self.shape.n_groups,
            self.norm.eps,
            self.shape.dt_limit,
            units,
            borders,
        )

    def _per_head(self, cuts: Cuts) -> tuple[Tensor, Tensor, Tensor]:
        """a, negative and float32, d and dt_bias of a member: (h,) each."""
        a_log, d, dt_bias = (
            narrow(weight, cuts.get(f"mixer.{name}"))
            for name, weight in (("A_log", self.A_log), ("D", self.D), ("dt_bias", self.dt_bias))
        )
        return -torch.exp(a_log.float()), d, dt_bias

    def _fused_kernel(
        self,
        projected: Tensor,
        channels: int,
        cuts: Cuts,
        norm: Tensor,
        units: Tensor | None,
        share: float,
        documents: Tensor | None,
    ) -> Tensor:
        """All after the input projection in one call of mamba_ssm: (b, t, ...) -> (b, t, d).

        Under a hard mask it is enough to zero the gate, since silu(0) = 0: the norm's inputs are
        zero there, and neither weights nor gradients of such a unit matter. The kernel's norm
        divides by the whole group of which `share` is kept; eps * share and weight * sqrt(share)
        make up for it:

            x / sqrt(sum / n + eps * share) * sqrt(share) = x / sqrt(sum / (n * share) + eps)
        """
        from mamba_ssm.ops.triton import ssd_combined

        if units is not None:
            rest = projected.shape[-1] - units.shape[-1]
            projected = projected * F.pad(units, (0, rest), value=1.0)[:, None].to(projected.dtype)
        a, d, dt_bias = self._per_head(cuts)
        conv, bias = self.conv1d.narrowed(cuts)
        if bias is None:  # the backward pass of causal_conv1d wants one
            bias = conv.new_zeros(conv.shape[0])
        out: Tensor = ssd_combined.mamba_split_conv1d_scan_combined(
            projected,
            conv[:, 0],
            bias,
            dt_bias,
            a,
            d,
            MAMBA_SSM_CHUNK,
            seq_idx=documents,
            dt_limit=self.shape.dt_limit,
            rmsnorm_weight=norm if share == 1 else norm * math.sqrt(share),
            rmsnorm_eps=self.norm.eps * share,
            outproj_weight=narrow(self.out_proj.weight, cuts.get("mixer.out_proj.weight")),
            headdim=channels,
            ngroups=self.shape.n_groups,
            norm_before_gate=False,
        )
        return out

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
