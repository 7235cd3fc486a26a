"""What each kind of block keeps for its backward pass, and needs beside it: one table per kind.

Read off the forward and backward passes of `elastic.parent` and, for a GPU, of mamba_ssm 2.3
(`ops/triton/ssd_combined.py`). Letters: d hidden, f FFN, q query and k KV width, h Mamba heads,
i = h * head channels, n state, g groups, j = i + 2 * g * n convolved, P = i + j + h projected
channels, l chunk of the scan. Amounts are per token; bytes per element are 4, `stream` (residual
stream) or `compute` (what goes into and comes out of a projection).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from elastic.config import ParentShape
from elastic.members.architecture import AXIS_KIND, Architecture, AttentionLayer, Layer, MambaLayer
from elastic.members.cut import Cut, layer_cut, size_of, tensor_shapes

TORCH_CHUNK, MAMBA_SSM_CHUNK = 32, 256
"""`elastic.parent.ssd_ref.CHUNK` and `elastic.parent.ssd.MAMBA_SSM_CHUNK`, without torch."""


@dataclass(frozen=True)
class Execution:
    """How blocks run."""

    kernels: str
    """`torch` or `mamba_ssm`."""
    stream: int
    """Bytes of an element of the residual stream."""
    compute: int
    """Bytes of an element that a projection reads or writes."""
    length: int
    """Tokens per sequence."""
    soft: frozenset[str] = frozenset()
    """Axes under soft masks; empty where the whole parent or a slice runs."""
    autocast: bool = False
    """Whether projections round float32 weights and inputs themselves, each its own."""


@dataclass(frozen=True)
class Held:
    """Elements per token of one tensor, or of several alike."""

    what: str
    elements: float
    bytes_each: int

    @property
    def bytes(self) -> float:
        return self.elements * self.bytes_each


@dataclass(frozen=True)
class Block:
    """Memory of one block."""

    saved: tuple[Held, ...]
    """From the forward to the backward pass."""
    forward: tuple[Held, ...]
    """More, at the worst moment of the forward pass."""
    backward: tuple[Held, ...]
    """More, at the worst moment of the backward pass."""
    copied_weights: int
    """Bytes of copies of weights that wait for the backward pass."""
    weight_gradient: int
    """Bytes of the gradient of the largest weight, before it is added to the others."""
    weights: int
    """Elements of the whole block's weights."""

    @cached_property
    def saved_bytes(self) -> float:
        """Per token."""
        return total(self.saved)

    @cached_property
    def forward_bytes(self) -> float:
        return total(self.forward)

    @cached_property
    def backward_bytes(self) -> float:
        return total(self.backward)


def total(entries: Iterable[Held]) -> float:
    """Bytes per token."""
    return sum(entry.bytes for entry in entries)


def blocks_of(
    shape: ParentShape, architecture: Architecture, execution: Execution
) -> dict[Layer, Block]:
    """Memory of every block of a member, in order; the same sizes are worked out once."""
    shapes = tensor_shapes(shape)
    made: dict[tuple, Block] = {}
    blocks = {}
    for layer in architecture.layers:
        sizes = (layer.kind, *[value for name, value in vars(layer).items() if name != "index"])
        if sizes not in made:
            made[sizes] = _block(shape, shapes, architecture.hidden_size, layer, execution)
        blocks[layer] = made[sizes]
    return blocks


def _block(
    shape: ParentShape,
    shapes: dict[str, tuple[int, ...]],
    hidden: int,
    layer: Layer,
    execution: Execution,
) -> Block:
    wide, narrow = execution.stream, execution.compute
    parts = {
        "mlp": _mlp,
        "attention": _attention,
        "mamba": _mamba_ssm if execution.kernels == "mamba_ssm" else _mamba_torch,
    }
    saved, forward, backward = parts[layer.kind](shape, layer, execution)
    inputs = 3 if layer.kind == "attention" and execution.autocast else 1
    norm = (
        Held("norm: input in float32", hidden, 4),
        Held("norm: scale", 1, 4),
        Held("mixer: normed input", inputs * hidden, narrow),
    )
    masks = tuple(
        Held(f"output before the {axis} mask", hidden, narrow)
        for axis in ("hidden", "depth")
        if axis in execution.soft
    )
    outcome = (Held("update", hidden, narrow), Held("output", hidden, wide))
    where = f"backbone.layers.{layer.index}."
    whole = {name[len(where) :]: sizes for name, sizes in shapes.items() if name.startswith(where)}
    cuts = layer_cut(shape, hidden, layer)
    matrices = {name: sizes for name, sizes in whole.items() if len(sizes) == 2}
    copied = sum(
        _elements(sizes, cuts[name]) for name, sizes in matrices.items() if _scattered(cuts[name])
    )
    largest = max(matrices, key=lambda name: _elements(matrices[name], None))
    gradient = _elements(matrices[largest], None)
    if any(ranges is not None for ranges in cuts[largest]):
        gradient += _elements(matrices[largest], cuts[largest])
    return Block(
        saved=(*norm, *saved, *masks),
        forward=max(tuple(forward), outcome, key=total),
        backward=(Held("gradient of the output", hidden, wide), *backward),
        copied_weights=copied * narrow,
        weight_gradient=gradient * narrow,
        weights=sum(_elements(sizes, None) for sizes in whole.values()),
    )


def _mlp(shape: ParentShape, layer: Layer, execution: Execution) -> tuple:
    c, f = execution.compute, getattr(layer, "intermediate_size", 0)
    soft = "ffn" in execution.soft
    saved = [Held("relu", f, c), Held("squared", f, c)]
    if soft:
        saved.append(Held("squared, masked", f, c))
    return saved, (Held("up projection", f, c),), (Held("gradient of squared", (1 + soft) * f, c),)


def _attention(shape: ParentShape, layer: Layer, execution: Execution) -> tuple:
    assert isinstance(layer, AttentionLayer)
    c, heads = execution.compute, layer.num_heads
    q, k = heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    saved = [
        Held("query", q, c),
        Held("key and value", 2 * k, c),
        Held("attention output", q, c),
        Held("log-sum-exp", heads, 4),
    ]
    backward = [Held("gradients of output and query", 2 * q, c)]
    backward.append(Held("gradients of key and value", 2 * k, c))
    if execution.kernels == "mamba_ssm":  # flash-attention 2
        backward.append(Held("query's gradient in float32", q, 4))
        backward.append(Held("gradients of key and value per query head", 2 * q, c))
    if execution.kernels == "mamba_ssm" and c == 4:  # no fused kernel groups heads in float32
        saved.append(Held("attention weights", heads * execution.length, 4))
        backward.append(Held("gradients of attention weights", heads * execution.length, 4))
    if "attention_heads" in execution.soft:
        saved.append(Held("attention output, masked", q, c))
    return saved, (), backward


def _mamba_sizes(shape: ParentShape, layer: Layer) -> tuple[int, int, int, int]:
    """h, i, j and P."""
    assert isinstance(layer, MambaLayer)
    inner = layer.num_heads * layer.head_dim
    convolved = inner + 2 * shape.n_groups * shape.ssm_state_size
    return layer.num_heads, inner, convolved, inner + convolved + layer.num_heads


def _mamba_torch(shape: ParentShape, layer: Layer, execution: Execution) -> tuple:
    """`elastic.parent.ssd_fused`: one function between the projections, in float32."""
    h, i, j, projected = _mamba_sizes(shape, layer)
    g, gn = shape.n_groups, shape.n_groups * shape.ssm_state_size
    chunk = min(TORCH_CHUNK, execution.length)
    padded = -(-execution.length // chunk) * chunk / execution.length
    states = i * shape.ssm_state_size / chunk
    saved = (
        Held("input projection", projected, 4),
        Held("convolution's input and output", 2 * j * padded, 4),
        Held("step sizes", h + h * padded, 4),
        Held("dt * x", i * padded, 4),
        Held("B and C", 2 * gn * padded, 4),
        Held("decays within chunks", h * chunk * padded, 4),
        Held("decays from start and to end", 2 * h * padded, 4),
        Held("C B^T within chunks", g * chunk * padded, 4),
        Held("states at chunks' starts", states * padded, 4),
        Held("scan output", i * padded, 4),
        Held("gated norm: scale", g, 4),
        Held("output projection's input", i, execution.compute),
    )
    forward = [
        Held("convolution after silu", j * padded, 4),
        Held("mixing within chunks", h * chunk * padded, 4),
        Held("scan's temporaries", i * padded, 4),
        Held("states that chunks leave", states * padded, 4),
    ]
    if execution.compute != 4:
        forward.append(Held("input projection before float32", projected, execution.compute))
    backward = (
        Held("gradient of the input projection", projected, 4),
        Held("convolution after silu", j * padded, 4),
        Held("gradient of mixing", h * chunk * padded, 4),
        Held("temporaries of norm and scan", 10 * i * padded, 4),
        Held("gradients of states", 2 * states * padded, 4),
        Held("gradients of C B^T, B and C", (g * chunk + 2 * gn) * padded, 4),
        Held("gradients of step sizes", 3 * h + g, 4),
    )
    return saved, tuple(forward), backward


def _mamba_ssm(shape: ParentShape, layer: Layer, execution: Execution) -> tuple:
    """mamba_ssm's kernels: one call after the input projection, or pieces under soft masks."""
    c = execution.compute
    h, i, j, projected = _mamba_sizes(shape, layer)
    g, gn = shape.n_groups, shape.n_groups * shape.ssm_state_size
    chunk = min(MAMBA_SSM_CHUNK, execution.length)
    states = i * shape.ssm_state_size / chunk
    soft = bool(execution.soft & {"mamba_heads", "mamba_head_dim"})
    scan_forward = [
        Held("step sizes and decays", 2 * h, 4),
        Held("states in float32", states, 4),
        Held("states", states, c),
        Held("C B^T within chunks", g * chunk, 4),
    ]
    scan_backward = [
        Held("gradient of the input projection", projected, c),
        Held("gradient of the convolution", j, c),
        Held("states and their gradients in float32", 2 * states, 4),
        Held("states or their gradients", states, c),
        Held("C B^T and its gradient", 2 * g * chunk, 4),
        Held("gradients of B and C in float32", 2 * gn, 4),
        Held("step sizes, decays and gradients", 5 * h, 4),
    ]
    if not soft:
        saved = [
            Held("input projection", projected, c),
            Held("scan output", i, c),
            Held("gated norm: scale", g, 4),
        ]
        forward = [Held("convolution", j, c), *scan_forward, Held("normed output", i, c)]
        backward = [
            Held("convolution, again", j, c),
            Held("normed output, again", i, c),
            Held("gradients of normed and scan output", 2 * i, c),
            *scan_backward,
        ]
        return saved, forward, backward
    saved = [
        Held("input projection", projected, c),
        Held("convolution's input, output and silu", 3 * j, c),
        Held("scan output", i, c),
        Held("decays", h, 4),
        Held("gated norm in float32", (3 if c == 4 else 5) * i, 4),
        Held("gated norm: scale", g, 4),
        Held("normed output, before and after its weight", 2 * i, c),
    ]
    backward = [Held("gradients of the gated norm in float32", 3 * i, 4), Held("and of y", i, c)]
    if total(scan_backward) > total(backward) + total(saved[4:]):
        backward = scan_backward
    return saved, [*scan_forward, Held("normed output in float32", i, 4)], backward


def soft_axes(axes: Iterable[str], kinds: Iterable[str]) -> frozenset[str]:
    """Of the elastic axes those under whose masks something of a parent with these kinds runs."""
    present = set(kinds)
    return frozenset(axis for axis in axes if AXIS_KIND.get(axis) in (None, *present))


def _elements(sizes: tuple[int, ...], cut: Cut | None) -> int:
    count = 1
    for ranges, size in zip(cut or (None,) * len(sizes), sizes, strict=True):
        count *= size_of(ranges, size)
    return count


def _scattered(cut: Cut) -> bool:
    """Whether what is kept is no single block, so that narrowing copies it."""
    return any(ranges is not None and len(ranges) > 1 for ranges in cut)
