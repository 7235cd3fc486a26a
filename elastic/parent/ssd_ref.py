"""The Mamba-2 scan in plain torch: the specification, and the path that a CPU runs.

Shapes: b batch, t time, h heads, p head channels, g groups, n state (arXiv 2405.21060, section 6).
Heads are stored group by group, so head i reads the B and C of group i // (h // g).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic.parent.ssd_chunk import (
    chunk_borders,
    scan_chunks,
    scan_chunks_backward,
    without_autocast,
)

CHUNK = 32
"""Steps handled at once by `ssd_chunked`; any value gives the same result, and this one was fastest
or within 4% of it at short and long sequences (docs/performance.md)."""


def ssd_recurrent(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    documents: Tensor | None = None,
) -> Tensor:
    """State-space scan, one step at a time: slow, and what every other path must equal.

        state_t = exp(dt_t a) state_{t-1} + dt_t x_t b_t^T,    y_t = state_t c_t + d x_t

    x (b, t, h, p), dt (b, t, h) positive, a (h,) negative, b and c (b, t, g, n), d (h,) -> (b, t,
    h, p). The state is zero at the first step of every document; `documents` (b, t) are ids that
    never fall, None is one document.
    """
    heads = x.shape[2] // b.shape[2]
    dtype, x, dt, a = x.dtype, x.float(), dt.float(), a.float()
    b, c = (z.float().repeat_interleave(heads, dim=2) for z in (b, c))  # (b, t, h, n)
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[3])  # (b, h, p, n)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * a)[..., None, None]
        if documents is not None and t > 0:
            decay = decay * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        entering = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        state = decay * state + entering
        outputs.append((state * c[:, t, :, None, :]).sum(-1))
    return (torch.stack(outputs, dim=1) + d.float()[:, None] * x).to(dtype)


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    documents: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The same scan by matrix products inside chunks and a recurrence between them.

    Arguments and result as in `ssd_recurrent`; computed in float32 whatever the inputs are.
    """
    time, dtype = x.shape[1], x.dtype
    chunk = min(chunk, time)
    padding = -time % chunk
    x, dt, a, b, c, d = (value.float() for value in (x, dt, a, b, c, d))
    if padding:  # a step with dt = 0 neither decays nor enters
        x, b, c = (F.pad(value, (0, 0, 0, 0, 0, padding)) for value in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, padding))
        if documents is not None:
            documents = torch.cat([documents, documents[:, -1:].expand(-1, padding)], dim=1)
    borders = None if documents is None else chunk_borders(documents, chunk)
    y: Tensor = _ChunkedScan.apply(x, dt, a, b, c, d, borders, chunk)
    return y[:, :time].to(dtype)


class _ChunkedScan(torch.autograd.Function):
    """`ssd_chunk` in the layout of `ssd_recurrent`, with its gradient."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, dt, a, b, c, d, borders, chunk = inputs
        batch, time, heads, channels = x.shape
        x_blocks = x.view(batch, -1, chunk, heads, channels)
        dt_last = dt.view(batch, -1, chunk, heads).transpose(2, 3).contiguous()  # b z h l
        entering = x.new_empty(batch, time // chunk, heads, channels, chunk)  # b z h p l
        torch.mul(x_blocks.permute(0, 1, 3, 4, 2), dt_last[:, :, :, None], out=entering)
        b, c = _by_group(b, chunk), _by_group(c, chunk)
        y, saved = scan_chunks(entering, dt_last * a[:, None], b, c, borders)
        ctx.save_for_backward(x, dt_last, a, d, y, *saved)
        out = torch.empty_like(x_blocks)
        return torch.addcmul(y.permute(0, 1, 4, 2, 3), x_blocks, d[:, None], out=out).view_as(x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, d, y, *saved = ctx.saved_tensors
        batch, chunks, heads, channels, chunk = y.shape
        grad = grad.reshape(batch, chunks, chunk, heads, channels)
        x_blocks = x.view_as(grad)
        y_grad = grad.permute(0, 1, 3, 4, 2).contiguous()  # b z h p l
        entering_grad, decay_grad, b_grad, c_grad = scan_chunks_backward(
            y_grad, (y_grad * y).sum(3), tuple(saved)
        )
        dt_grad = decay_grad * a[:, None]
        dt_grad += (entering_grad * x_blocks.permute(0, 1, 3, 4, 2)).sum(3)
        entering_grad *= dt[:, :, :, None]
        x_grad = torch.empty_like(x_blocks)
        torch.addcmul(entering_grad.permute(0, 1, 4, 2, 3), grad, d[:, None], out=x_grad)
        return (
            x_grad.view_as(x),
            dt_grad.transpose(2, 3).reshape(x.shape[:3]),
            (decay_grad * dt).sum((0, 1, 3)),
            _by_time(b_grad, batch, chunks),
            _by_time(c_grad, batch, chunks),
            (grad * x_blocks).sum((0, 1, 2, 4)),
            None,
            None,
        )


def _by_group(value: Tensor, chunk: int) -> Tensor:
    """(b, t, g, n) -> (b z g, l, n)."""
    batch, time, groups, states = value.shape
    blocks = value.view(batch, time // chunk, chunk, groups, states)
    return blocks.transpose(2, 3).reshape(-1, chunk, states)


def _by_time(value: Tensor, batch: int, chunks: int) -> Tensor:
    """(b z g, l, n) -> (b, t, g, n), the inverse of `_by_group`."""
    chunk, states = value.shape[1:]
    blocks = value.view(batch, chunks, -1, chunk, states).transpose(2, 3)
    return blocks.reshape(batch, chunks * chunk, -1, states)
