"""Read a member's part of an elastic checkpoint, and nothing else: the cut behind every extraction.

Stock transformers has one size per kind of layer. A member that has several MLP widths or numbers
of query heads can be zero-padded to the widest kept layer of the kind, which is exact: relu(0)^2 is
0 and there are no biases, and zero columns of o_proj ignore what padded query heads attend to.
Any member can be stored at true size, for a model of our own (`elastic.extract.layerwise`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.config import ParentShape
from elastic.extract.layerwise.sizes import layerwise_config
from elastic.extract.own_norms import read_own_norms
from elastic.members import cost
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.members.cut import Cut, Ranges, kept_shape, member_cuts, norm_cuts, tensor_shapes
from elastic.parent.stock import read_config, read_shape, stock_config
from elastic.storage.ahead import ahead
from elastic.storage.manifest import NAME, Manifest, Member
from elastic.storage.reading import BLOCK_BYTES, StoredTensor, converted
from elastic.storage.seals import check_beside
from elastic.storage.store import TensorStore
from elastic.storage.writing import Pending

LAYERS = {"mlp": "MLP widths", "attention": "query heads", "mamba": "Mamba heads x channels"}
"""Kind of layer -> name of its sizes in messages."""


def padded(
    blocks: Iterable[Tensor], place: Cut, sizes: tuple[int, ...], block_bytes: int = BLOCK_BYTES
) -> Iterator[Tensor]:
    """Row blocks of a tensor of these sizes: `blocks` laid out over the ranges of `place`, zeros
    elsewhere.

    Only rows and columns are padded.
    """
    rows, columns = (*place, None)[:2]
    compact = _Rows(_widened(block, columns, sizes) for block in blocks)
    at = 0
    for start, stop in (*(((0, sizes[0]),) if rows is None else rows), (sizes[0], sizes[0])):
        while at < start:
            zeros = compact.like
            most = max(1, block_bytes // (zeros[0].numel() * zeros.element_size()))
            count = min(start - at, most)
            yield zeros.new_zeros((count, *sizes[1:]))
            at += count
        for block in compact.take(stop - start):
            yield block
            at += len(block)


class _Rows:
    """A stream of row blocks, taken any number of rows at a time."""

    def __init__(self, blocks: Iterable[Tensor]) -> None:
        self._blocks = iter(blocks)
        self._left = next(self._blocks)
        self.like = self._left[:1]
        """A row, for the type and the sizes of the rest."""

    def take(self, count: int) -> Iterator[Tensor]:
        while count:
            if not len(self._left):
                self._left = next(self._blocks)
            block, self._left = self._left[:count], self._left[count:]
            count -= len(block)
            yield block


def _widened(block: Tensor, columns: Ranges | None, sizes: tuple[int, ...]) -> Tensor:
    """A row block with its columns over these ranges of the full width."""
    if columns is None:
        return block
    out = block.new_zeros((len(block), *sizes[1:]))
    at = 0
    for start, stop in columns:
        out[:, start:stop] = block[:, at : at + stop - start]
        at += stop - start
    return out


def stored_shape(shape: ParentShape, architecture: Architecture) -> ParentShape:
    """Sizes that a configuration holds once for a member: the widest kept layer of each kind.

    A kind without a kept layer keeps the parent's sizes, which are legal and weigh nothing. The
    embedding and the head are always stored apart, so nothing is tied.
    """
    mamba = [layer for layer in architecture.layers if isinstance(layer, MambaLayer)]
    ffn = [x.intermediate_size for x in architecture.layers if isinstance(x, MLPLayer)]
    query = [x.num_heads for x in architecture.layers if isinstance(x, AttentionLayer)]
    return replace(
        shape,
        pattern=architecture.pattern,
        hidden_size=architecture.hidden_size,
        intermediate_size=max(ffn, default=shape.intermediate_size),
        num_attention_heads=max(query, default=shape.num_attention_heads),
        mamba_num_heads=max((x.num_heads for x in mamba), default=shape.mamba_num_heads),
        mamba_head_dim=max((x.head_dim for x in mamba), default=shape.mamba_head_dim),
        tied_head=False,
    )


def resolve_export(
    export: str, shape: ParentShape, architecture: Architecture, allow_dt_limit: bool = False
) -> str:
    """The form in which a member is stored: `export`, or native where that is the same.

    Raises:
        ValueError: that form cannot hold the member, or stock transformers cannot compute it; names
            those that can, with their cost.
    """
    limit = shape.time_step_limit
    if limit is not None and export != "per_layer" and not allow_dt_limit:
        raise ValueError(
            f"export={export}: the parent has time_step_limit={limit}, which stock transformers "
            "does not honour (no upper limit, and none when it decodes with a cache); must be "
            "per_layer (loaded where this package is imported), or set allow_dt_limit=true, for "
            "engines that honour it"
        )
    kinds = {kind: sizes_of(architecture, kind) for kind in ("mlp", "attention", "mamba")}
    several = {kind: sizes for kind, sizes in kinds.items() if len(sizes) > 1}
    if not several:
        return "per_layer" if limit is not None and export == "per_layer" else "native"
    exact = cost.parameters(shape, architecture)
    per_layer = f"per_layer ({exact:,} parameters, loaded where this package is imported)"
    uneven = f"{LAYERS['mamba']} of several sizes ({', '.join(kinds['mamba'])})"
    if export == "padded" and "mamba" in several:
        raise ValueError(
            f"export=padded: {uneven} cannot be zero-padded exactly, since their gated norm has an "
            f"eps; must be {per_layer}"
        )
    if export == "native":
        widest = stored_shape(shape, architecture)
        stored = cost.parameters(widest, Architecture.full(widest))
        padded = f"padded ({stored:,} parameters stored for the {exact:,} of the member) or "
        listed = "; ".join(f"{LAYERS[kind]}: {', '.join(sizes)}" for kind, sizes in several.items())
        raise ValueError(
            f"export=native: stock transformers has one size per kind of layer, this member has "
            f"several ({listed}); must be {'' if 'mamba' in several else padded}{per_layer}"
        )
    return export


def sizes_of(architecture: Architecture, kind: str) -> list[str]:
    """The different sizes of the kept layers of a kind, largest first."""
    found = {
        tuple(value for name, value in vars(layer).items() if name != "index")
        for layer in architecture.layers
        if layer.kind == kind
    }
    return ["x".join(map(str, sizes)) for sizes in sorted(found, reverse=True)]


def renumbered(architecture: Architecture) -> Architecture:
    """The same member with its kept layers counted from 0, as they are stored."""
    layers = (replace(layer, index=i) for i, layer in enumerate(architecture.layers))
    return Architecture(architecture.hidden_size, tuple(layers))


@dataclass(frozen=True)
class Widened:
    """A member's own norm at the parent's size, zeros in what the member drops; it stands in for a
    stored tensor of the parent."""

    value: Tensor
    cut: Cut
    size: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.value.dtype

    def blocks(self) -> Iterator[Tensor]:
        """All of it."""
        return padded([self.value], self.cut, self.size)


@dataclass(frozen=True)
class OpenMember:
    """A member of an elastic checkpoint, checked and ready to be read."""

    checkpoint: Path
    budget: str
    manifest: Manifest
    """The whole family."""
    export: str
    """`native`, or `padded` or `per_layer` when layers of one kind differ in size; `per_layer` also
    when stock transformers has no such step sizes."""
    parent: ParentShape
    """Sizes of the sorted parent that the checkpoint holds."""
    shape: ParentShape
    """Sizes that config.json holds once: of every layer, or per_layer of the widest ones."""
    config: dict[str, Any]
    """Its config.json."""
    store: TensorStore
    own: dict[str, Tensor]
    """Norms of its own by their stored names in the parent, in its sizes; empty if it has none."""
    dtype: torch.dtype | None
    """Type that tensors are `converted` to; None keeps the stored ones."""

    @property
    def member(self) -> Member:
        """The budget's entry in elastic.json."""
        return self.manifest.member(self.budget)

    @property
    def parameters(self) -> int:
        """Parameters of the member itself."""
        return cost.parameters(self.parent, self.member.architecture)

    @property
    def stored_parameters(self) -> int:
        """Parameters that are stored, padding included."""
        if self.export == "per_layer":
            return self.parameters
        return cost.parameters(self.shape, Architecture.full(self.shape))

    @property
    def masked(self) -> Mapping[str, StoredTensor | Widened]:
        """The parent's tensors by their stored names, with which it computes this member under hard
        masks: those that are stored, but for norms of the member's own."""
        cuts = norm_cuts(self.parent, self.member.architecture)
        widened = {
            cut.source: Widened(self.own[cut.source], cut.cut, self.store[cut.source].shape)
            for cut in cuts
            if cut.source in self.own
        }
        return {**self.store, **widened}

    def tensors(self) -> Iterator[Pending]:
        """Every tensor by its stored name; of the shards nothing is read before `read()`."""
        sizes = tensor_shapes(self.shape)
        # Where each tensor goes is a cut too: the member's own share of the padded model.
        places = member_cuts(self.shape, renumbered(self.member.architecture))
        cuts = member_cuts(self.parent, self.member.architecture)
        for cut, place in zip(cuts, places, strict=True):
            assert cut.target == place.source
            stored = self.store[cut.source]
            size = sizes[cut.target]
            if self.export != "padded":
                size = kept_shape(cut.cut, stored.shape)
            if cut.source in self.own:
                own = self.own[cut.source]  # a norm is never padded
                dtype = converted(cut.target, own.dtype, self.dtype)
                yield Pending.of(cut.target, own.shape, dtype, partial(_same, own))
                continue
            blocks = partial(self._blocks, stored, cut.cut, place.cut, size)
            dtype = converted(cut.target, stored.dtype, self.dtype)
            yield Pending(cut.target, size, dtype, blocks)

    def _blocks(
        self, stored: StoredTensor, cut: Cut, place: Cut, size: tuple[int, ...]
    ) -> Iterator[Tensor]:
        kept = kept_shape(place, size)
        blocks = stored.blocks(cut, BLOCK_BYTES, True)
        if math.prod(kept) * stored.dtype.itemsize > BLOCK_BYTES:
            blocks = ahead(blocks)  # what is written of it meanwhile does not wait
        return blocks if kept == size else padded(blocks, place, size)


def open_member(
    checkpoint: Path,
    budget: str,
    dtype: torch.dtype | None = None,
    export: str = "native",
    allow_dt_limit: bool = False,
) -> OpenMember:
    """Check a checkpoint from end to end, headers only, and find one member in it.

    `allow_dt_limit` lets a member with a limit of its steps be stored for stock transformers, which
    does not honour it.

    Raises:
        ValueError: not an elastic checkpoint, a damaged one, no such budget, or a member that
            cannot be stored like that.
    """
    manifest = Manifest.read(checkpoint)
    member = manifest.member(budget)
    check_beside(checkpoint, "config.json")
    base = read_config(checkpoint)
    parent = read_shape(base)
    try:
        manifest.check(parent)
    except ValueError as error:
        raise ValueError(f"{checkpoint / NAME}: {error}") from error
    try:
        export = resolve_export(export, parent, member.architecture, allow_dt_limit)
    except ValueError as error:
        raise ValueError(f"budget={budget}: {error}") from error
    store = TensorStore(checkpoint, tensor_shapes(parent))
    if not store.head_stored and not parent.tied_head:
        raise ValueError(f"{checkpoint}: tensor lm_head.weight is missing from the shards")
    shape = stored_shape(parent, member.architecture)
    config = stock_config(shape, base)
    if export == "per_layer":
        config = layerwise_config(config, member.architecture)
    if dtype is not None:
        config.pop("dtype", None)  # transformers' newer name for the same setting
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    own = read_own_norms(checkpoint, manifest, budget, parent)
    return OpenMember(
        checkpoint, budget, manifest, export, parent, shape, config, store, own, dtype
    )


def _same(value: Tensor) -> Tensor:
    return value
