"""The Mamba-2 scan in plain torch: the specification, and the path that a CPU runs.

Shapes: b batch, t time, h heads, p head channels, g groups, n state (arXiv 2405.21060, section 6).
Heads are stored group by group, so head i reads the B and C of group i // (h // g).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Steps handled at once by `ssd_chunked`; any value gives the same result."""


def ssd_recurrent(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """State-space scan, one step at a time: slow, and what every other path must equal.

        state_t = exp(dt_t a) state_{t-1} + dt_t x_t b_t^T,    y_t = state_t c_t + d x_t

    x (b, t, h, p), dt (b, t, h) positive, a (h,) negative, b and c (b, t, g, n), d (h,) -> (b, t,
    h, p).
    """
    heads = x.shape[2] // b.shape[2]
    dtype, x, dt, a = x.dtype, x.float(), dt.float(), a.float()
    b, c = (z.float().repeat_interleave(heads, dim=2) for z in (b, c))  # (b, t, h, n)
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[3])  # (b, h, p, n)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * a)[..., None, None]
        entering = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        state = decay * state + entering
        outputs.append((state * c[:, t, :, None, :]).sum(-1))
    return (torch.stack(outputs, dim=1) + d.float()[:, None] * x).to(dtype)


def ssd_chunked(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, chunk: int = CHUNK
) -> Tensor:
    """The same scan by matrix products inside chunks and a recurrence between them.

    Shapes as in `ssd_recurrent`. Products of B and C are formed once per group, not per head.
    """
    batch, time, heads, channels = x.shape
    groups, states = b.shape[2:]
    chunk = min(chunk, time)
    chunks = -(-time // chunk)
    padding = chunks * chunk - time
    dtype = x.dtype
    x, dt, b, c = x.float(), dt.float(), b.float(), c.float()
    skip = d.float()[:, None] * x
    entering = x * dt[..., None]
    log_decay = dt * a.float()
    if padding:  # a step with dt = 0 neither decays nor enters
        entering = F.pad(entering, (0, 0, 0, 0, 0, padding))
        log_decay = F.pad(log_decay, (0, 0, 0, padding))
        b, c = (F.pad(z, (0, 0, 0, 0, 0, padding)) for z in (b, c))

    per_group = heads // groups
    blocks = (batch, chunks, chunk, groups)
    entering = entering.view(*blocks, per_group, channels).permute(0, 1, 3, 4, 2, 5)  # b c g r l p
    cumulative = log_decay.view(*blocks, per_group).permute(0, 1, 3, 4, 2).cumsum(-1)  # b c g r l
    b = b.view(*blocks, states).permute(0, 1, 3, 2, 4)  # b c g l n
    c = c.view(*blocks, states).permute(0, 1, 3, 2, 4)  # b c g l n

    # Inside a chunk: position l reads position s <= l through c_l . b_s and the decay between them.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = cumulative[..., :, None] - cumulative[..., None, :]  # b c g r l s
    decay = between.masked_fill(later, float("-inf")).exp()
    scores = (c @ b.transpose(-1, -2))[:, :, :, None] * decay  # b c g r l s
    inside = scores @ entering  # b c g r l p

    # What each chunk leaves behind, carried from chunk to chunk.
    to_end = (cumulative[..., -1:] - cumulative).exp()
    left = (entering * to_end[..., None]).transpose(-1, -2) @ b[:, :, :, None]  # b c g r p n
    over_chunk = cumulative[..., -1].exp()[..., None, None]  # b c g r 1 1
    state = torch.zeros_like(left[:, 0])
    before = []
    for index in range(chunks):
        before.append(state)
        state = over_chunk[:, index] * state + left[:, index]
    carried = torch.stack(before, dim=1)  # b c g r p n, the state at each chunk's start
    across = c[:, :, :, None] @ carried.transpose(-1, -2) * cumulative.exp()[..., None]

    y = (inside + across).permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * chunk, heads, channels)
    return (y[:, :time] + skip).to(dtype)
