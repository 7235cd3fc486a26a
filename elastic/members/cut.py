"""Which part of every stored tensor a member keeps: the one table behind slicing and extraction.

Pure data, no torch. Execution narrows the parent's weights by it, extraction reads only those
ranges from disk, so that the two cannot disagree about what a prefix is (arXiv 2511.16664, section
3.2, and arXiv 2504.11409 for the group-aware SSM cut).
"""

from dataclasses import dataclass

from elastic.config import ParentShape
from elastic.members.architecture import Architecture, AttentionLayer, Layer, MambaLayer, MLPLayer

Ranges = tuple[tuple[int, int], ...]
"""Half-open index ranges, ascending; what a member keeps along one dimension."""

Cut = tuple[Ranges | None, ...]
"""One entry per dimension of a tensor; None keeps the whole dimension."""


@dataclass(frozen=True)
class TensorCut:
    """A tensor of the member: where it comes from, what it is called, which part is kept."""

    source: str
    target: str
    cut: Cut


def prefix(kept: int, size: int) -> Ranges | None:
    """The first `kept` of `size`."""
    return None if kept == size else ((0, kept),)


def grouped(groups: int, units: int, kept: int, width: int, kept_width: int) -> Ranges | None:
    """In (groups, units, width) flattened: the first `kept` units of every group, `kept_width` of
    each.

    `units` is the number of units per group and `width` the size of a unit.
    """
    if kept == units and kept_width == width:
        return None
    ranges: list[tuple[int, int]] = []
    for group in range(groups):
        start = group * units * width
        if kept_width == width:
            ranges.append((start, start + kept * width))
        else:
            starts = range(start, start + kept * width, width)
            ranges.extend((unit, unit + kept_width) for unit in starts)
    return _merge(ranges)


def size_of(ranges: Ranges | None, size: int) -> int:
    """How many indices are kept."""
    return size if ranges is None else sum(stop - start for start, stop in ranges)


def kept_shape(cut: Cut, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what is kept of a tensor."""
    return tuple(size_of(ranges, size) for ranges, size in zip(cut, shape, strict=True))


def _merge(ranges: list[tuple[int, int]]) -> Ranges:
    """Join ranges that touch."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _concatenate(parts: list[tuple[Ranges | None, int]]) -> Ranges | None:
    """Ranges over several blocks stored one after the other, each given with its full size."""
    ranges: list[tuple[int, int]] = []
    offset = 0
    for part, size in parts:
        kept = ((0, size),) if part is None else part
        ranges.extend((start + offset, stop + offset) for start, stop in kept)
        offset += size
    merged = _merge(ranges)
    return None if merged == ((0, offset),) else merged


def layer_cut(shape: ParentShape, hidden_size: int, layer: Layer) -> dict[str, Cut]:
    """Cuts of one layer's tensors, by their name inside the layer."""
    hidden = prefix(hidden_size, shape.hidden_size)
    cuts: dict[str, Cut] = {"norm.weight": (hidden,)}
    if isinstance(layer, MLPLayer):
        width = prefix(layer.intermediate_size, shape.intermediate_size)
        cuts["mixer.up_proj.weight"] = (width, hidden)
        cuts["mixer.down_proj.weight"] = (hidden, width)
    elif isinstance(layer, AttentionLayer):
        groups = shape.num_key_value_heads
        units, kept = shape.num_attention_heads // groups, layer.num_heads // groups
        query = grouped(groups, units, kept, shape.head_dim, shape.head_dim)
        cuts["mixer.q_proj.weight"] = (query, hidden)
        cuts["mixer.k_proj.weight"] = (None, hidden)
        cuts["mixer.v_proj.weight"] = (None, hidden)
        cuts["mixer.o_proj.weight"] = (hidden, query)
    else:
        assert isinstance(layer, MambaLayer)
        groups = shape.n_groups
        units, kept = shape.mamba_num_heads // groups, layer.num_heads // groups
        inner_size = shape.mamba_num_heads * shape.mamba_head_dim
        state_size = 2 * groups * shape.ssm_state_size
        inner = grouped(groups, units, kept, shape.mamba_head_dim, layer.head_dim)
        heads = grouped(groups, units, kept, 1, 1)
        convolved = _concatenate([(inner, inner_size), (None, state_size)])  # x, B and C
        projected = _concatenate(  # z, x, B and C, dt
            [
                (inner, inner_size),
                (inner, inner_size),
                (None, state_size),
                (heads, shape.mamba_num_heads),
            ]
        )
        cuts["mixer.in_proj.weight"] = (projected, hidden)
        cuts["mixer.conv1d.weight"] = (convolved, None, None)
        if shape.conv_bias:
            cuts["mixer.conv1d.bias"] = (convolved,)
        for name in ("A_log", "D", "dt_bias"):
            cuts[f"mixer.{name}"] = (heads,)
        cuts["mixer.norm.weight"] = (inner,)
        cuts["mixer.out_proj.weight"] = (hidden, inner)
    return cuts


def member_cuts(shape: ParentShape, architecture: Architecture) -> list[TensorCut]:
    """Every tensor of a member, in stored order; kept layers are numbered anew from 0."""
    hidden = prefix(architecture.hidden_size, shape.hidden_size)
    cuts = [TensorCut("backbone.embeddings.weight", "backbone.embeddings.weight", (None, hidden))]
    for position, layer in enumerate(architecture.layers):
        for name, cut in layer_cut(shape, architecture.hidden_size, layer).items():
            source = f"backbone.layers.{layer.index}.{name}"
            cuts.append(TensorCut(source, f"backbone.layers.{position}.{name}", cut))
    cuts.append(TensorCut("backbone.norm_f.weight", "backbone.norm_f.weight", (hidden,)))
    cuts.append(TensorCut("lm_head.weight", "lm_head.weight", (None, hidden)))
    return cuts


def norm_cuts(shape: ParentShape, architecture: Architecture) -> list[TensorCut]:
    """The norms among `member_cuts`."""
    return [cut for cut in member_cuts(shape, architecture) if "norm" in cut.source]


def tensor_shapes(shape: ParentShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the parent, as stored."""
    hidden, inner = shape.hidden_size, shape.mamba_num_heads * shape.mamba_head_dim
    convolved = inner + 2 * shape.n_groups * shape.ssm_state_size
    query = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "norm.weight": (hidden,),
        "mixer.up_proj.weight": (shape.intermediate_size, hidden),
        "mixer.down_proj.weight": (hidden, shape.intermediate_size),
        "mixer.q_proj.weight": (query, hidden),
        "mixer.k_proj.weight": (keys, hidden),
        "mixer.v_proj.weight": (keys, hidden),
        "mixer.o_proj.weight": (hidden, query),
        "mixer.in_proj.weight": (inner + convolved + shape.mamba_num_heads, hidden),
        "mixer.conv1d.weight": (convolved, 1, shape.conv_kernel),
        "mixer.conv1d.bias": (convolved,),
        "mixer.A_log": (shape.mamba_num_heads,),
        "mixer.D": (shape.mamba_num_heads,),
        "mixer.dt_bias": (shape.mamba_num_heads,),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (hidden, inner),
        "backbone.embeddings.weight": (shape.vocab_size, hidden),
        "backbone.norm_f.weight": (hidden,),
        "lm_head.weight": (shape.vocab_size, hidden),
    }
    return {
        cut.source: sizes[cut.source.split(".", 3)[3] if ".layers." in cut.source else cut.source]
        for cut in member_cuts(shape, Architecture.full(shape))
    }
