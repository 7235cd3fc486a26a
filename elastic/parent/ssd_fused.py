"""The Mamba-2 mixer between its projections as one function, as it runs on a CPU.

Convolution, scan, gate and norm each need another layout of (time, channel) in memory. Composed by
autograd, every change of layout is a copy forwards and two backwards, and the three parts of the
input projection are concatenated again. Here each change is made once, and the gradient of the
projection is written in place. The composition in `ssd.MambaMixer.forward` is the plain twin.
Shapes: b batch, t time, i = h * p inner units, j = i + 2 * g * n convolved channels; z chunks of l
steps, and the letters of `ssd_chunk`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic.parent.borders import Borders
from elastic.parent.norms import kept_gradient
from elastic.parent.ssd_chunk import scan_chunks, scan_chunks_backward, without_autocast
from elastic.parent.ssd_ref import CHUNK

silu_backward = torch.ops.aten.silu_backward


def mixer_core(
    projected: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    a: Tensor,
    d: Tensor,
    norm: Tensor,
    groups: int,
    eps: float,
    dt_limit: tuple[float, float],
    units: Tensor | None = None,
    borders: Borders | None = None,
) -> Tensor:
    """All between the input and the output projection: (b, t, i + j + h) -> (b, t, i).

    conv (j, 1, k), conv_bias (j,), dt_bias, a (negative) and d (h,), norm (i,); `units` is a keep
    mask (b or 1, i); `dt_limit` are the lowest and the highest step; borders None is one
    document. Computed in float32.
    """
    weights = (conv, conv_bias, dt_bias, a, d, norm, units)
    floats = [None if weight is None else weight.float() for weight in weights]
    out: Tensor = _MixerCore.apply(projected.float(), *floats, groups, eps, dt_limit, borders)
    return out.to(projected.dtype)


class _MixerCore(torch.autograd.Function):
    """`mixer_core` in float32, with its gradient."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        projected, conv, conv_bias, dt_bias, a, d, norm, units, *settings = inputs
        groups, eps, dt_limit, borders = settings
        batch, time, _ = projected.shape
        heads, inner = len(a), len(norm)
        chunk = min(CHUNK, time)
        padding = -time % chunk
        gate, convolved, dt = projected.split([inner, len(conv), heads], dim=-1)
        mixed = F.pad(convolved.mT, (0, padding)).contiguous()  # b j t
        conv_out = _convolve(mixed, conv, conv_bias, borders)
        signal = F.silu(conv_out)
        x, b, c = _parts(signal, inner, groups, heads, chunk)

        step_in = dt + dt_bias  # b t h
        # A step of zero, in the padding, neither decays nor enters.
        step = _per_head(F.softplus(step_in).clamp_(*dt_limit), padding, chunk)  # b z h l
        entering = torch.mul(x, step[:, :, :, None])  # b z h p l
        within = None if borders is None else borders.chunks
        y, saved = scan_chunks(entering.contiguous(), step * a[:, None], b, c, within)
        y = _by_time(y.addcmul_(x, d[:, None, None]))[:, :time]  # b t i

        opening = F.silu(gate)
        if units is not None:
            opening *= units[:, None]
        gated = opening.mul_(y).unflatten(-1, (groups, -1))
        power = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).square_()
        scale = power.div_(_kept(units, inner, groups)).add_(eps).rsqrt_()  # b t g 1
        ctx.save_for_backward(
            *(projected, conv, a, d, norm, units, mixed, conv_out, step_in, step, y, scale), *saved
        )
        ctx.settings, ctx.has_bias = (*settings, padding), conv_bias is not None
        return gated.mul_(scale).flatten(-2).mul_(norm)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, conv, a, d, norm, units, mixed, conv_out, step_in, step, y, scale, *saved = (
            ctx.saved_tensors
        )
        groups, eps, dt_limit, borders, padding = ctx.settings
        batch, chunks, heads, chunk = step.shape
        time, inner = projected.shape[1], len(norm)
        projected_grad = torch.empty_like(projected)
        sizes = [inner, len(conv), heads]
        gate = projected[..., :inner]
        gate_grad, convolved_grad, dt_grad = projected_grad.split(sizes, dim=-1)

        # Norm and gate.
        opening = F.silu(gate)
        read = opening * y  # b t i
        masked = read if units is None else read * units[:, None]
        normed = masked.unflatten(-1, (groups, -1)) * scale  # b t g m
        gated_grad = (grad * norm).reshape(normed.shape)
        along = torch.linalg.vecdot(gated_grad, normed).unsqueeze(-1)
        kept = _kept(units, inner, groups)
        along /= kept
        gated_grad = gated_grad.addcmul_(normed, along, value=-1).mul_(scale).flatten(-2)
        norm_grad = normed.flatten(-2).mul_(grad).sum((0, 1))
        units_grad = None
        if units is not None:
            assert isinstance(kept, Tensor)
            units_grad = (gated_grad * read).sum(1).sum_to_size(units.shape)
            kept_grad = kept_gradient(along, scale, eps, kept)[:, 0]  # (b, g, 1)
            units_grad += kept_grad.expand(-1, -1, inner // groups).flatten(1)
            gated_grad *= units[:, None]
        silu_backward.grad_input(gated_grad * y, gate, grad_input=gate_grad)
        y_grad = gated_grad.mul_(opening)  # b t i
        reads = _per_head(
            torch.linalg.vecdot(_heads(y_grad, heads), _heads(y, heads)), padding, chunk
        )
        y_grad = F.pad(y_grad, (0, 0, 0, padding)).view(batch, chunks, chunk, heads, -1)
        y_grad = y_grad.permute(0, 1, 3, 4, 2).contiguous()  # b z h p l

        # Scan.
        signal = F.silu(conv_out)
        x, _, _ = _views(signal, inner, groups, heads, chunk)
        skipped = (y_grad * x).sum(3)  # b z h l
        reads = reads - skipped * d[:, None]
        entering_grad, decay_grad, b_grad, c_grad = scan_chunks_backward(
            y_grad, reads, tuple(saved)
        )
        step_grad = (entering_grad * x).sum(3).addcmul_(decay_grad, a[:, None])
        step_grad = step_grad.transpose(2, 3).reshape(batch, -1, heads)[:, :time]
        unlimited = F.softplus(step_in)
        within = (unlimited >= dt_limit[0]) & (unlimited <= dt_limit[1])
        step_grad = torch.where(within, step_grad, 0)
        torch.mul(step_grad, torch.sigmoid(step_in), out=dt_grad)

        # Convolution.
        signal_grad = torch.empty_like(signal)
        x_out, b_out, c_out = _views(signal_grad, inner, groups, heads, chunk)
        entering_grad *= step[:, :, :, None]
        torch.addcmul(entering_grad, y_grad, d[:, None, None], out=x_out)
        b_out.copy_(b_grad.view_as(b_out))
        c_out.copy_(c_grad.view_as(c_out))
        silu_backward.grad_input(signal_grad, conv_out, grad_input=signal_grad)
        mixed_grad, conv_grad = _convolve_backward(signal_grad, mixed, conv, borders)
        convolved_grad.copy_(mixed_grad[:, :, :time].mT)
        return (
            projected_grad,
            conv_grad,
            signal_grad.sum((0, 2)) if ctx.has_bias else None,
            dt_grad.sum((0, 1)),
            (decay_grad * step).sum((0, 1, 3)),
            skipped.sum((0, 1, 3)),
            norm_grad,
            units_grad,
            *[None] * 4,
        )


def _convolve(
    mixed: Tensor, weight: Tensor, bias: Tensor | None, borders: Borders | None
) -> Tensor:
    """Causal depthwise convolution (b, j, t) -> (b, j, t), tap by tap: on a CPU several times
    faster than the library's, most of all backwards (docs/performance.md). The few steps that
    would read another document are computed again."""
    time, last = mixed.shape[-1], weight.shape[-1] - 1
    out = mixed * weight[:, :, last]
    if bias is not None:
        out += bias[:, None]
    for back in range(1, min(last + 1, time)):
        out[:, :, back:].addcmul_(mixed[:, :, :-back], weight[:, :, last - back])
    if borders is not None:
        near = borders.earlier
        again = (near.around(mixed) * near.same * _by_distance(weight)).sum(1)  # n j
        out[near.rows, :, near.steps] = again if bias is None else again + bias
    return out


def _convolve_backward(
    grad: Tensor, mixed: Tensor, weight: Tensor, borders: Borders | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `_convolve`'s input and weight."""
    time, last = mixed.shape[-1], weight.shape[-1] - 1
    mixed_grad, weight_grad = grad * weight[:, :, last], torch.zeros_like(weight)
    for back in range(min(last + 1, time)):
        later = grad[:, :, back:]
        if back:
            mixed_grad[:, :, :-back].addcmul_(later, weight[:, :, last - back])
        taps = torch.linalg.vecdot(later, mixed[:, :, : time - back])  # (b, j)
        weight_grad[:, 0, last - back] = taps.sum(0)
    if borders is not None:
        near = borders.later
        reading = near.around(grad)  # n k j
        mixed_grad[near.rows, :, near.steps] = (reading * near.same * _by_distance(weight)).sum(1)
        leaked = (reading * near.across * near.at(mixed)[:, None]).sum(0)  # k j
        weight_grad[:, 0] -= leaked.T.flip(1)
    return mixed_grad, weight_grad


def _by_distance(weight: Tensor) -> Tensor:
    """(j, 1, k) -> (k, j), the tap that reads a step itself first."""
    return weight[:, 0].flip(1).T


def _kept(units: Tensor | None, inner: int, groups: int) -> Tensor | float:
    """Kept units of every group: (b, 1, g, 1) under a mask."""
    if units is None:
        return inner / groups
    return units.unflatten(-1, (groups, -1)).sum(-1)[:, None, :, None]


def _views(
    signal: Tensor, inner: int, groups: int, heads: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x (b, z, h, p, l), B and C (b, z, g, l, n) as views of (b, j, t)."""
    batch, width, time = signal.shape
    states = (width - inner) // (2 * groups)
    x = signal[:, :inner].view(batch, heads, inner // heads, time // chunk, chunk)
    b_c = signal[:, inner:].view(batch, 2, groups, states, time // chunk, chunk)
    b, c = b_c.permute(1, 0, 4, 2, 5, 3)
    return x.permute(0, 3, 1, 2, 4), b, c


def _parts(
    signal: Tensor, inner: int, groups: int, heads: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x as a view (b, z, h, p, l), B and C as (b z g, l, n)."""
    x, b, c = _views(signal, inner, groups, heads, chunk)
    return x, b.flatten(0, 2).contiguous(), c.flatten(0, 2).contiguous()


def _by_time(y: Tensor) -> Tensor:
    """(b, z, h, p, l) -> (b, z * l, h * p), a copy."""
    return y.permute(0, 1, 4, 2, 3).flatten(1, 2).flatten(2)


def _heads(value: Tensor, heads: int) -> Tensor:
    """(b, t, h * p) -> (b, t, h, p)."""
    return value.unflatten(-1, (heads, -1))


def _per_head(value: Tensor, padding: int, chunk: int) -> Tensor:
    """(b, t, h) -> (b, z, h, l), with zeros in the padding."""
    padded = F.pad(value, (0, 0, 0, padding))
    return padded.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()
