"""What a member costs, in closed form: parameters, bytes and FLOPs. No torch.

The formulas use only + and *, so that they take integers (an `Architecture`, exact) as well as
differentiable scalars (the expected sizes of a router). With independent axes the expected cost
*is* the cost of the expected sizes, because every formula is linear in each axis on its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.config import ParentShape
from elastic.members.architecture import Architecture, AttentionLayer, Layer, MambaLayer, MLPLayer


@dataclass(frozen=True)
class LayerSize:
    """Sizes of one layer, integers or differentiable scalars.

    `gate` is 1 for a kept layer, the probability of keeping it, or how many layers are alike;
    `width` is the MLP width, the number of Mamba heads or of query heads; `channels` is the Mamba
    head size.
    """

    kind: str
    width: Any
    channels: Any = 1
    gate: Any = 1


def layer_size(layer: Layer) -> LayerSize:
    """Exact sizes of a kept layer."""
    if isinstance(layer, MambaLayer):
        return LayerSize("mamba", layer.num_heads, layer.head_dim)
    if isinstance(layer, MLPLayer):
        return LayerSize("mlp", layer.intermediate_size)
    assert isinstance(layer, AttentionLayer)
    return LayerSize("attention", layer.num_heads)


def layer_sizes(architecture: Architecture) -> list[LayerSize]:
    """Exact sizes of a member's kept layers."""
    return [layer_size(layer) for layer in architecture.layers]


def layer_parameters(shape: ParentShape, hidden: Any, size: LayerSize) -> Any:
    """Parameters of one kept layer, its input norm included (without the gate)."""
    if size.kind == "mlp":
        return hidden + 2 * hidden * size.width
    if size.kind == "attention":
        query_and_output = 2 * hidden * size.width * shape.head_dim
        return hidden + query_and_output + 2 * hidden * shape.num_key_value_heads * shape.head_dim
    inner = size.width * size.channels
    state = 2 * shape.n_groups * shape.ssm_state_size
    in_proj = hidden * (2 * inner + state + size.width)
    conv = (inner + state) * (shape.conv_kernel + int(shape.conv_bias))
    return hidden + in_proj + conv + 3 * size.width + inner + inner * hidden


def total_parameters(shape: ParentShape, hidden: Any, sizes: Sequence[LayerSize]) -> Any:
    """Parameters of a whole member; embedding and LM head are stored apart, tied or not."""
    total = 2 * shape.vocab_size * hidden + hidden
    for size in sizes:
        total = total + size.gate * layer_parameters(shape, hidden, size)
    return total


def parameters(shape: ParentShape, architecture: Architecture) -> int:
    """Exact number of parameters of the extracted checkpoint."""
    return int(total_parameters(shape, architecture.hidden_size, layer_sizes(architecture)))


def weight_bytes(shape: ParentShape, architecture: Architecture, bytes_per_weight: int = 2) -> int:
    """Bytes of the weights; 2 per weight is bfloat16."""
    return parameters(shape, architecture) * bytes_per_weight


def kv_cache_bytes(
    shape: ParentShape, architecture: Architecture, context: int, batch: int = 1, bytes_per: int = 2
) -> int:
    """Bytes of keys and values for `batch` sequences of `context` tokens."""
    return batch * _added(_keys_and_values, shape, architecture, context, bytes_per)


def ssm_state_bytes(
    shape: ParentShape, architecture: Architecture, batch: int = 1, bytes_per: int = 4
) -> int:
    """Bytes of the recurrent SSM state (float32 by default), whatever the context."""
    return batch * _added(_ssm_state, shape, architecture, bytes_per)


def conv_state_bytes(
    shape: ParentShape, architecture: Architecture, batch: int = 1, bytes_per: int = 2
) -> int:
    """Bytes of the convolution's window over the last `conv_kernel` inputs."""
    return batch * _added(_conv_state, shape, architecture, bytes_per)


def total_cache_bytes(
    shape: ParentShape, sizes: Sequence[LayerSize], context: int, batch: int
) -> Any:
    """Bytes that a member keeps between two steps of decoding `batch` sequences of `context`
    tokens: keys and values and the convolution's window in bfloat16, the SSM state in float32."""
    total: Any = 0
    for size in sizes:
        states = _ssm_state(shape, size, 4) + _conv_state(shape, size, 2)
        total = total + size.gate * (_keys_and_values(shape, size, context, 2) + states)
    return batch * total


def _added(
    layer_bytes: Callable[..., Any], shape: ParentShape, member: Architecture, *rest: int
) -> int:
    return int(sum(layer_bytes(shape, size, *rest) for size in layer_sizes(member)))


def _keys_and_values(shape: ParentShape, size: LayerSize, context: int, bytes_per: int) -> Any:
    """Of one sequence in one layer; the heads of keys and values are never cut."""
    if size.kind != "attention":
        return 0
    return 2 * shape.num_key_value_heads * shape.head_dim * bytes_per * context


def _ssm_state(shape: ParentShape, size: LayerSize, bytes_per: int) -> Any:
    """Of one sequence in one layer."""
    if size.kind != "mamba":
        return 0
    return size.width * size.channels * shape.ssm_state_size * bytes_per


def _conv_state(shape: ParentShape, size: LayerSize, bytes_per: int) -> Any:
    """Of one sequence in one layer."""
    if size.kind != "mamba":
        return 0
    channels = size.width * size.channels + 2 * shape.n_groups * shape.ssm_state_size
    return channels * shape.conv_kernel * bytes_per


def decode_bytes(
    shape: ParentShape, architecture: Architecture, context: int, batch: int = 1
) -> int:
    """Bytes that one decoding step of `batch` sequences moves, each `context` tokens long.

    All weights in bfloat16 once, of the embedding only a row per sequence; the KV cache is read,
    the states of scan and convolution are read and written. A step of few sequences takes as long
    as this does.
    """
    rows = (shape.vocab_size - batch) * architecture.hidden_size
    states = ssm_state_bytes(shape, architecture, batch)
    states += conv_state_bytes(shape, architecture, batch)
    caches = kv_cache_bytes(shape, architecture, context, batch) + 2 * states
    return weight_bytes(shape, architecture) - 2 * rows + caches


def flops_per_token(shape: ParentShape, architecture: Architecture, context: int) -> int:
    """`total_flops` of a member."""
    return int(total_flops(shape, architecture.hidden_size, layer_sizes(architecture), context))


def total_flops(shape: ParentShape, hidden: Any, sizes: Sequence[LayerSize], context: int) -> Any:
    """Forward FLOPs per token at a mean over a causal context of that length.

    A multiply-add counts as two. Matrix products count every weight once per token, attention
    scores and values half the context (causal); the scan is counted in its recurrent form: decay,
    input and readout of a (head_dim x state) matrix per head, 5 operations per element.
    """
    total = 2 * hidden * shape.vocab_size
    for size in sizes:
        total = total + size.gate * layer_flops(shape, hidden, size, context)
    return total


def layer_flops(shape: ParentShape, hidden: Any, size: LayerSize, context: int) -> Any:
    """What one kept layer adds to `total_flops` (without the gate)."""
    if size.kind == "mlp":
        return 4 * hidden * size.width
    if size.kind == "attention":
        query, keys = size.width * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        # Scores and values over context / 2 keys on average.
        return 2 * hidden * (2 * query + 2 * keys) + 2 * query * context
    inner = size.width * size.channels
    state = 2 * shape.n_groups * shape.ssm_state_size
    projections = 2 * hidden * (2 * inner + state + size.width) + 2 * inner * hidden
    scan = 5 * inner * shape.ssm_state_size
    return projections + 2 * (inner + state) * shape.conv_kernel + scan
