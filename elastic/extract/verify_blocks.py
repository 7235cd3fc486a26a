"""The check of a member that is too large to run: some of its blocks, one in memory at a time.

Blocks of one size are cut in the same way, so that one of each size is enough to know that the cut
is right; that every block *was* cut is known from its tensors, bit for bit.
"""

import random

import torch
from torch import Tensor
from transformers import NemotronHForCausalLM
from transformers.masking_utils import create_causal_mask

from elastic.extract.compare import difference, empty, fill
from elastic.extract.slice import OpenMember
from elastic.members import cost
from elastic.members.architecture import Architecture
from elastic.parent import HybridParent
from elastic.parent.hybrid import Block
from elastic.routing.masks import hard_keep
from elastic.storage.store import TensorStore

TOKENS = (2, 48)
"""Batch and time that a block runs on: longer than a chunk of our scan."""

ALL_BELOW = 1_000_000_000
"""Of parents with fewer parameters all blocks are compared: that takes seconds."""

ROWS = 64
"""Rows of embedding and head that are compared."""


def check_blocks(
    model: NemotronHForCausalLM, stored: TensorStore, member: OpenMember, all_below: int = ALL_BELOW
) -> tuple[float, int]:
    """Compare blocks of transformers with the parent's full-width blocks under hard masks.

    `model` is on the meta device and stays there, `offline` has its weights. Returns the largest
    difference of what a block adds to the residual stream, as a share of the largest value, and the
    number of blocks; samples of embedding, final norm and head count too.

    Raises:
        VerificationError: one differs, or is not finite.
    """
    with torch.device("meta"):
        parent = HybridParent(member.parent, "torch")
    generator = torch.Generator().manual_seed(0)
    chosen = sampled(member, all_below)
    shares = [_ends(model, stored, member, parent, generator)]
    for position in chosen:
        x = _hidden_states(member, generator)  # (b, t, d)
        expected = _parent_block(parent, member, position, x)
        found = _stored_block(model, stored, position, x)
        what = f"outputs of block {position} ({member.shape.kinds[position]})"
        shares.append(difference(member, expected, found, what))
    return max(shares), len(chosen)


def sampled(member: OpenMember, all_below: int = ALL_BELOW) -> list[int]:
    """Positions of the kept layers to compare: all of a small parent, else the first, the last, and
    one of every size of every kind, drawn."""
    layers = member.member.architecture.layers
    if cost.parameters(member.parent, Architecture.full(member.parent)) < all_below:
        return list(range(len(layers)))
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, layer in enumerate(layers):
        sizes = (value for name, value in vars(layer).items() if name != "index")
        groups.setdefault((layer.kind, *sizes), []).append(position)
    draw = random.Random(0)
    return sorted({0, len(layers) - 1, *(draw.choice(group) for group in groups.values())})


def _hidden_states(member: OpenMember, generator: torch.Generator) -> Tensor:
    """(b, t, d) as small as the root of the norms' eps, which then counts as much as they do; and
    what a block adds is not lost in the rounding of what it is added to."""
    size = (*TOKENS, member.shape.hidden_size)
    return torch.randn(size, generator=generator) * member.parent.norm_eps**0.5


def _widened(x: Tensor, member: OpenMember) -> Tensor:
    """Hidden states as the parent has them, zeros in masked channels: (b, t, d)."""
    return torch.nn.functional.pad(x, (0, member.parent.hidden_size - x.shape[-1]))


def _parent_block(parent: HybridParent, member: OpenMember, position: int, x: Tensor) -> Tensor:
    """What the whole block adds under the member's masks: (b, t, d)."""
    architecture = member.member.architecture
    index = architecture.layers[position].index
    keep = hard_keep(member.parent, architecture)
    block = parent.backbone.layers[index]
    assert isinstance(block, Block)
    fill(block, member.masked, f"backbone.layers.{index}", member.dtype)
    out = block(_widened(x, member), None, {}, keep.hidden, keep.layers[index])
    empty(block)
    assert not out[..., x.shape[-1] :].any(), "a masked channel is not zero"
    return out[..., : x.shape[-1]] - x


def _stored_block(
    model: NemotronHForCausalLM, stored: TensorStore, position: int, x: Tensor
) -> Tensor:
    """What transformers' block adds with the weights that were written: (b, t, d)."""
    block = model.model.layers[position]
    fill(block, stored, f"backbone.layers.{position}")
    mask = None
    if block.block_type == "full_attention":
        steps = torch.arange(x.shape[1])[None]
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            position_ids=steps,
        )
    out: Tensor = block(x, attention_mask=mask)
    empty(block)
    return out - x


def _ends(
    model: NemotronHForCausalLM,
    stored: TensorStore,
    member: OpenMember,
    parent: HybridParent,
    generator: torch.Generator,
) -> float:
    """Largest difference of embedding, and of final norm and head, on some rows of the
    vocabulary."""
    tokens = torch.randperm(member.parent.vocab_size, generator=generator)[:ROWS].sort().values
    rows = tuple((token, token + 1) for token in tokens.tolist())
    hidden = hard_keep(member.parent, member.member.architecture).hidden
    x = _hidden_states(member, generator)
    fill(parent.backbone.norm_f, member.masked, "backbone.norm_f", member.dtype)
    fill(model.model.norm_f, stored, "backbone.norm_f")
    expected = parent.backbone.norm_f(_widened(x, member), None, hidden)  # (b, t, d)
    found = model.model.norm_f(x)

    def both(name: str) -> tuple[Tensor, Tensor]:
        """(rows, d) of the parent, rounded, and of the member."""
        mine = member.store[name].read((rows, None))
        mine = mine.to(member.dtype or mine.dtype).float()
        return mine, stored[name].read((rows, None)).float()

    embedded = both("backbone.embeddings.weight")
    share = difference(member, embedded[0][:, : x.shape[-1]], embedded[1], "embeddings")
    head = both("lm_head.weight")
    logits = difference(member, expected @ head[0].T, found @ head[1].T, "logits of random states")
    return max(share, logits)
