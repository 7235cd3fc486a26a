"""Read a member's part of an elastic checkpoint, and nothing else: the cut behind every extraction.

Stock transformers has one MLP width and one number of query heads for all layers. A member that
has several is stored zero-padded to the widest kept layer of the kind, which is exact: relu(0)^2 is
0 and there are no biases, and zero columns of o_proj ignore what padded query heads attend to.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic import cost
from elastic.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.config import ParentShape
from elastic.cut import Cut, Ranges, member_cuts, size_of, tensor_shapes
from elastic.manifest import NAME, Manifest, Member
from elastic.parent.weights import Pending, TensorStore, read_config, read_shape, stock_config

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""Stored types that can be cut, by their name in safetensors."""


def read_cut(view: Any, cut: Cut, dtype: torch.dtype) -> Tensor:
    """The kept part of a stored tensor, each block of ranges read on its own, in memory of its own.

    `view` is a safetensors slice: indexing it touches only the bytes of that block.
    """
    spans = [_spans(ranges, size) for ranges, size in zip(cut, view.get_shape(), strict=True)]
    out = torch.empty([sum(stop - start for start, stop, _ in dim) for dim in spans], dtype=dtype)
    for block in product(*spans):
        source = tuple(slice(start, stop) for start, stop, _ in block)
        target = tuple(slice(at, at + stop - start) for start, stop, at in block)
        out[target].copy_(view[source])
    return out


def pad(compact: Tensor, place: Cut, sizes: tuple[int, ...]) -> Tensor:
    """Zeros of these sizes with `compact` laid out over the ranges of `place`."""
    out = compact.new_zeros(sizes)
    for block in product(*(_spans(r, size) for r, size in zip(place, sizes, strict=True))):
        target = tuple(slice(start, stop) for start, stop, _ in block)
        source = tuple(slice(at, at + stop - start) for start, stop, at in block)
        out[target].copy_(compact[source])
    return out


def _spans(ranges: Ranges | None, size: int) -> list[tuple[int, int, int]]:
    """Ranges with the place of each when they are laid end to end: (start, stop, at)."""
    spans, at = [], 0
    for start, stop in ((0, size),) if ranges is None else ranges:
        spans.append((start, stop, at))
        at += stop - start
    return spans


def stored_shape(shape: ParentShape, architecture: Architecture) -> ParentShape:
    """Sizes under which stock transformers holds a member; the widest layer of each kind decides.

    A kind without a kept layer keeps the parent's sizes, which are legal and weigh nothing. The
    embedding and the head are always stored apart, so nothing is tied.

    Raises:
        ValueError: the Mamba layers differ in size.
    """
    mamba = {(x.num_heads, x.head_dim) for x in architecture.layers if isinstance(x, MambaLayer)}
    if len(mamba) > 1:
        sizes = ", ".join(f"{heads}x{channels}" for heads, channels in sorted(mamba))
        raise ValueError(
            f"Mamba layers of different sizes ({sizes} heads x channels) cannot become a stock "
            "checkpoint, since zero-padding them is not exact (the gated norm has an eps); run it "
            "with elastic.parent, or train with mamba_heads left out of space.heterogeneous"
        )
    heads, channels = mamba.pop() if mamba else (shape.mamba_num_heads, shape.mamba_head_dim)
    ffn = [x.intermediate_size for x in architecture.layers if isinstance(x, MLPLayer)]
    query = [x.num_heads for x in architecture.layers if isinstance(x, AttentionLayer)]
    return replace(
        shape,
        pattern=architecture.pattern,
        hidden_size=architecture.hidden_size,
        intermediate_size=max(ffn, default=shape.intermediate_size),
        num_attention_heads=max(query, default=shape.num_attention_heads),
        mamba_num_heads=heads,
        mamba_head_dim=channels,
        tied_head=False,
    )


def renumbered(architecture: Architecture) -> Architecture:
    """The same member with its kept layers counted from 0, as they are stored."""
    layers = (replace(layer, index=i) for i, layer in enumerate(architecture.layers))
    return Architecture(architecture.hidden_size, tuple(layers))


@dataclass(frozen=True)
class OpenMember:
    """A member of an elastic checkpoint, checked and ready to be read."""

    checkpoint: Path
    budget: str
    member: Member
    provenance: dict[str, Any]
    parent: ParentShape
    """Sizes of the sorted parent that the checkpoint holds."""
    shape: ParentShape
    """Sizes of the stock model that holds the member, padding included."""
    config: dict[str, Any]
    """Its config.json."""
    store: TensorStore
    dtype: torch.dtype | None
    """Type that every tensor is converted to; None keeps the stored one."""

    @property
    def parameters(self) -> int:
        """Parameters of the member itself."""
        return cost.parameters(self.parent, self.member.architecture)

    @property
    def stored_parameters(self) -> int:
        """Parameters of the stock model, padding included."""
        return cost.parameters(self.shape, Architecture.full(self.shape))

    def tensors(self) -> Iterator[Pending]:
        """Every tensor of the stock model by its stored name; nothing is read before `read()`."""
        sizes = tensor_shapes(self.shape)
        # Where each tensor goes is a cut too: the member's own share of the padded model.
        places = member_cuts(self.shape, renumbered(self.member.architecture))
        cuts = member_cuts(self.parent, self.member.architecture)
        for cut, place in zip(cuts, places, strict=True):
            assert cut.target == place.source
            dtype = self.dtype or DTYPES[self.store.slice(cut.source).get_dtype()]
            size = sizes[cut.target]
            count = 1
            for length in size:
                count *= length
            read = partial(self._read, cut.source, cut.cut, place.cut, size, dtype)
            yield Pending(cut.target, count * dtype.itemsize, read)

    def _read(
        self, source: str, cut: Cut, place: Cut, size: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        compact = read_cut(self.store.slice(source), cut, dtype)
        kept = tuple(size_of(ranges, n) for ranges, n in zip(place, size, strict=True))
        assert tuple(compact.shape) == kept, (source, tuple(compact.shape), kept)
        return compact if kept == size else pad(compact, place, size)


def open_member(checkpoint: Path, budget: str, dtype: torch.dtype | None = None) -> OpenMember:
    """Check a checkpoint from end to end, headers only, and find one member in it.

    Raises:
        ValueError: not an elastic checkpoint, a damaged one, no such budget, or a member that stock
            transformers cannot hold.
    """
    manifest = Manifest.read(checkpoint)
    member = manifest.member(budget)
    base = read_config(checkpoint)
    parent = read_shape(base)
    try:
        member.architecture.check(parent)
        shape = stored_shape(parent, member.architecture)
    except ValueError as error:
        raise ValueError(f"{checkpoint / NAME}: budget {budget}: {error}") from error
    exact = cost.parameters(parent, member.architecture)
    if member.params != exact:
        raise ValueError(
            f"{checkpoint / NAME}: budget {budget}: params={member.params}, but its architecture "
            f"has {exact}; the file is damaged"
        )
    store = TensorStore(checkpoint, tensor_shapes(parent))
    if not store.head_stored and not parent.tied_head:
        raise ValueError(f"{checkpoint}: tensor lm_head.weight is missing from the shards")
    for cut in member_cuts(parent, member.architecture):
        stored = store.slice(cut.source).get_dtype()
        if stored not in DTYPES:
            raise ValueError(
                f"{checkpoint}: tensor {cut.source} is stored as {stored}; must be one of "
                + ", ".join(DTYPES)
            )
    config = stock_config(shape, base)
    if dtype is not None:
        config.pop("dtype", None)  # transformers' newer name for the same setting
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return OpenMember(
        checkpoint, budget, member, manifest.provenance, parent, shape, config, store, dtype
    )
