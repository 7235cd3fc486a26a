"""The scan over chunks of time, forwards and backwards: matrix products and one short recurrence.

Autograd would pass over the (l, l) decays of every head three times as often, and keep all of them.
Shapes: b batch, z chunks, l and s steps of a chunk, h heads, r heads per group, p head channels, g
groups, n state. Time is the last dimension, so that the heads of a group and their channels are one
matrix dimension: B and C are used per group and never repeated per head (arXiv 2405.21060,
section 6).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Saved = tuple[Tensor, ...]
"""What the backward pass needs of the forward one."""

Pass = TypeVar("Pass", bound=Callable[..., Any])


def without_autocast(function: Pass) -> Pass:
    """Keep a forward or backward pass in the type of its tensors; `function` takes the context and
    a tensor first."""

    @functools.wraps(function)
    def wrapped(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *rest)

    return wrapped  # type: ignore[return-value]


@dataclass(frozen=True)
class ChunkBorders:
    """Which ways of the scan stay inside a document.

    `apart` (b, z, 1, l, s) is True where position l must not read s: it is of another document, or
    later. `carried` and `kept` (b, z, 1, l) are 1.0 where a position is of the document that ended
    the chunk before, and of the one that ends its own.
    """

    apart: Tensor
    carried: Tensor
    kept: Tensor


def chunk_borders(documents: Tensor, chunk: int) -> ChunkBorders:
    """Of ids (b, z * l)."""
    ids = documents.view(len(documents), -1, 1, chunk)
    last = ids[..., -1:]
    before = torch.cat([last[:, :1], last[:, :-1]], dim=1)  # the first chunk reads nothing
    apart = (ids[..., :, None] != ids[..., None, :]) | _later(chunk, ids.device)
    return ChunkBorders(apart, (ids == before).float(), (ids == last).float())


def _later(chunk: int, device: torch.device) -> Tensor:
    """(l, s), True where s is after l."""
    return torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu(1)


def scan_chunks(
    entering: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, borders: ChunkBorders | None
) -> tuple[Tensor, Saved]:
    """Output of the state at every step: (b, z, h, p, l), and what `scan_chunks_backward` needs.

    entering (b, z, h, p, l) is dt * x, log_decay (b, z, h, l) is dt * a, b and c (b z g, l, n);
    borders None is one document.
    """
    batch, chunks, heads, channels, chunk = entering.shape
    inside, from_start, to_end, over_chunk = _decays(log_decay, borders)
    scores = torch.bmm(c, b.mT)  # (b z g) l s: position l reads position s
    mixing = _per_group(inside, len(b)) * scores[:, None]  # (b z g) r l s
    y = torch.bmm(entering.view(-1, channels, chunk), mixing.view(-1, chunk, chunk).mT)
    y = y.view_as(entering)

    # What each chunk leaves behind, carried from chunk to chunk.
    left = torch.bmm((entering * to_end[:, :, :, None]).view(len(b), -1, chunk), b)
    left = left.view(batch, chunks, heads, -1)
    before = torch.zeros_like(left)  # the state at each chunk's start
    for z in range(chunks - 1):
        over = over_chunk[:, z, :, None]
        torch.addcmul(left[:, z], over, before[:, z], out=before[:, z + 1])
    before = before.view(len(b), -1, b.shape[2])  # (b z g) (r p) n
    y.addcmul_(torch.bmm(before, c.mT).view_as(y), from_start[:, :, :, None])
    return y, (entering, b, c, inside, from_start, to_end, over_chunk, scores, before)


def scan_chunks_backward(
    y_grad: Tensor, reads: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of entering, log_decay, b and c from y's, (b, z, h, p, l).

    `reads` (b, z, h, l) is (y_grad * y) summed over channels.
    """
    entering, b, c, inside, from_start, to_end, over_chunk, scores, before = saved
    batch, chunks, heads, channels, chunk = entering.shape

    # Inside a chunk.
    mixing = _per_group(inside, len(b)) * scores[:, None]
    flat = (-1, channels, chunk)
    entering_grad = torch.bmm(y_grad.view(flat), mixing.view(-1, chunk, chunk)).view_as(entering)
    mixing_grad = torch.bmm(
        y_grad.view(flat).mT, entering.view(flat), out=mixing.view(-1, chunk, chunk)
    )
    scores_grad = mixing_grad.view_as(mixing).mul_(_per_group(inside, len(b))).sum(1)
    c_grad, b_grad = torch.bmm(scores_grad, b), torch.bmm(scores_grad.mT, c)

    # Through the states, backwards.
    reading = (y_grad * from_start[:, :, :, None]).view(len(b), -1, chunk)  # (b z g) (r p) l
    c_grad.baddbmm_(reading.mT, before)
    before_grad = torch.bmm(reading, c).view(batch, chunks, heads, -1)
    left_grad = torch.zeros_like(before_grad)  # of what each chunk leaves behind
    for z in range(chunks - 1, 0, -1):
        over = over_chunk[:, z, :, None]
        torch.addcmul(before_grad[:, z], over, left_grad[:, z], out=left_grad[:, z - 1])
    end = (left_grad * before.view_as(left_grad)).sum(3) * over_chunk  # b z h
    left_grad = left_grad.view_as(before)
    sending = (entering * to_end[:, :, :, None]).view(len(b), -1, chunk)
    b_grad.baddbmm_(sending.mT, left_grad)
    sent = torch.bmm(left_grad, b.mT).view_as(entering).mul_(to_end[:, :, :, None])
    end += (sent * entering).sum((3, 4))
    entering_grad += sent

    # The decay from s to l is exp(cumulative_l - cumulative_s): all that l reads pulls its sum one
    # way, all that it sends the other way, and both are sums over its channels.
    cumulative = reads - (entering_grad * entering).sum(3)
    cumulative[..., -1] += end
    return entering_grad, cumulative.flip(-1).cumsum(-1).flip(-1), b_grad, c_grad


def _decays(log_decay: Tensor, borders: ChunkBorders | None) -> tuple[Tensor, ...]:
    """Factors (b, z, h, l) log-decays give: between two positions of a chunk (b, z, h, l, s), from
    the chunk's start to a position and from a position to its end (b, z, h, l), over it (b, z, h).

    A factor whose way crosses into another document is zero.
    """
    cumulative = log_decay.cumsum(-1)
    from_start = cumulative.exp()
    to_end = (cumulative[..., -1:] - cumulative).exp()
    inside = cumulative[..., :, None] - cumulative[..., None, :]
    if borders is None:
        unread = _later(log_decay.shape[-1], log_decay.device)
    else:
        unread = borders.apart
        from_start *= borders.carried
        to_end *= borders.kept
    inside.masked_fill_(unread, float("-inf")).exp_()
    return inside, from_start, to_end, from_start[..., -1]


def _per_group(value: Tensor, groups: int) -> Tensor:
    """(b, z, h, l, s) -> (b z g, r, l, s)."""
    return value.view(groups, -1, *value.shape[-2:])
