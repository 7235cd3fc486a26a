"""Causal attention that stays inside documents, each device its own way.

A CPU attends document by document, which costs less than attending over the whole row; many short
documents share a mask. A GPU runs flex_attention (arXiv 2412.05496), which leaves out the blocks of
(query, key) that no document crosses. The mask is the plain twin of both. Shapes: b batch, t time,
q query heads, k KV heads, p head channels.
"""

import functools
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Steps in a block of flex_attention, its default."""

LEAST_CHANNELS = 16
"""flex_attention has no kernel on a GPU for heads of fewer channels."""

SHORT = 8
"""Below so many tokens a document on average, a CPU may be faster with one mask than with a call
for every document (docs/performance.md)."""

Lengths = tuple[int, ...]
"""Tokens of every document, row after row."""

Seen = Tensor | BlockMask | Lengths | None
"""What every step may attend to: a mask (b, 1, t, t), blocks, documents, or all before it."""


def one_each(documents: Tensor) -> bool:
    """Whether every row of (b, t) ids is one document; False on a GPU, which would have to be
    waited for."""
    if documents.device.type != "cpu":
        return False
    ids = documents.numpy()
    return bool((ids == ids[:, :1]).all())


def seen_in(documents: Tensor, channels: int) -> Seen:
    """What steps of (b, t) ids may attend to, in the form for their device and for heads of so many
    channels."""
    if documents.device.type == "cuda":
        return block_mask(documents) if channels >= LEAST_CHANNELS else document_mask(documents)
    if documents.device.type == "cpu":
        lengths = document_lengths(documents)
        if len(lengths) * SHORT <= documents.numel():
            return lengths
    return document_mask(documents)


def document_mask(documents: Tensor) -> Tensor:
    """Causal attention mask inside documents: (b, t) ids -> (b, 1, t, t) bool.

    True where the column (key) is the row's (query's) own step or an earlier one of its document.
    One byte per pair of steps: 2.4 GB for a sequence of 49,152.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def document_lengths(documents: Tensor) -> Lengths:
    """Tokens of every document of (b, t) ids, row after row; on a CPU."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    ends = [*begins.flatten().nonzero().flatten().tolist(), documents.numel()]
    return tuple(after - start for start, after in zip(ends[:-1], ends[1:], strict=True))


def block_mask(documents: Tensor) -> BlockMask:
    """`document_mask` in blocks: (b, t) ids that never fall along a row.

    A block is known from its first and its last ids, so that nothing of t x t is ever made. It is
    full, and no step of it is masked, where it lies before the diagonal and inside one document.
    """
    batch, time = documents.shape
    beyond = torch.iinfo(documents.dtype).max  # what fills up the last block is no document's
    padded = F.pad(documents, (0, -time % BLOCK), value=beyond).unflatten(1, (-1, BLOCK))
    first, last = padded[..., 0], padded[..., -1]  # (b, blocks)
    diagonal = torch.eye(first.shape[1], dtype=torch.bool, device=documents.device)
    earlier = (first[:, :, None] == last[:, None, :]).tril(-1)  # (b, query block, key block)
    full = earlier & (last[:, :, None] == first[:, None, :])

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    return BlockMask.from_kv_blocks(
        *_ordered(earlier & ~full | diagonal),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_document,
        seq_lengths=(time, time),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks every query block has, and which, those first: (b, 1, blocks) and (b, 1,
    blocks, blocks) int32."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None].contiguous(), order[:, None].contiguous()


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen) -> Tensor:
    """Grouped-query attention: (b, q, t, p), (b, k, t, p) twice -> (b, q, t, p)."""
    heads, groups = query.shape[1], key.shape[1]
    if seen is None:
        return _causal(query, key, value)
    if isinstance(seen, BlockMask):
        flex: Callable[..., Tensor] = flex_attention
        if query.is_cuda:
            flex = _compiled(heads)
        # The other kernel, for less than a block of queries, takes only some numbers of heads.
        options = {"FORCE_USE_FLEX_ATTENTION": True}
        return flex(query, key, value, block_mask=seen, enable_gqa=True, kernel_options=options)
    if isinstance(seen, tuple):
        return _by_document(query, key, value, seen)
    # No GPU kernel both takes a mask and groups heads.
    key, value = (z.repeat_interleave(heads // groups, dim=1) for z in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def _by_document(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """Every document in a call of its own."""
    batch = len(query)
    each = [
        z.transpose(0, 1).flatten(1, 2).split(lengths, dim=1)  # heads, all steps, p
        for z in (query, key, value)
    ]
    mixed = [_causal(*(z[None] for z in document))[0] for document in zip(*each, strict=True)]
    return torch.cat(mixed, dim=1).unflatten(1, (batch, -1)).transpose(0, 1)


@functools.cache
def _compiled(heads: int) -> Callable[..., Tensor]:
    """flex_attention compiled for a number of query heads.

    Compiled code is for one number of heads, and after eight compilations of one function torch
    falls back, with a warning, to one that makes all scores. So each number, of which members have
    several, is a function of its own: compilations are counted by code object.
    """

    def attention(*arguments: Tensor, **options: object) -> Tensor:
        return flex_attention(*arguments, **options)  # type: ignore[call-overload]

    code = attention.__code__.replace(co_name=f"attention_{heads}_heads")
    own = types.FunctionType(code, globals(), code.co_name, None, attention.__closure__)
    compiled: Callable[..., Tensor] = torch.compile(own)
    return compiled
