"""What a member costs, in closed form: parameters, bytes and FLOPs. No torch.

The formulas use only + and *, so that they take integers (an `Architecture`, exact) as well as
differentiable scalars (the expected sizes of a router). With independent axes the expected cost
*is* the cost of the expected sizes, because every formula is linear in each axis on its own.
"""

from collections.abc import Sequence
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


def layer_sizes(architecture: Architecture) -> list[LayerSize]:
    """Exact sizes of a member's kept layers."""
    sizes = []
    for layer in architecture.layers:
        if isinstance(layer, MambaLayer):
            sizes.append(LayerSize("mamba", layer.num_heads, layer.head_dim))
        elif isinstance(layer, MLPLayer):
            sizes.append(LayerSize("mlp", layer.intermediate_size))
        else:
            assert isinstance(layer, AttentionLayer)
            sizes.append(LayerSize("attention", layer.num_heads))
    return sizes


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


def parameters_per_width(shape: ParentShape, hidden: Any, kind: str, channels: Any = 1) -> Any:
    """Parameters that one more unit of width adds to a layer of a kind, whatever its width."""
    two, one = (layer_parameters(shape, hidden, LayerSize(kind, w, channels)) for w in (2, 1))
    return two - one


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
    layers = sum(layer.kind == "attention" for layer in architecture.layers)
    per_token = 2 * shape.num_key_value_heads * shape.head_dim * bytes_per
    return layers * per_token * context * batch


def ssm_state_bytes(
    shape: ParentShape, architecture: Architecture, batch: int = 1, bytes_per: int = 4
) -> int:
    """Bytes of the recurrent SSM state (float32 by default), whatever the context."""
    heads = sum(
        layer.num_heads * layer.head_dim
        for layer in architecture.layers
        if isinstance(layer, MambaLayer)
    )
    return heads * shape.ssm_state_size * bytes_per * batch


def conv_state_bytes(
    shape: ParentShape, architecture: Architecture, batch: int = 1, bytes_per: int = 2
) -> int:
    """Bytes of the convolution's window over the last `conv_kernel` inputs."""
    state = 2 * shape.n_groups * shape.ssm_state_size
    channels = sum(
        layer.num_heads * layer.head_dim + state
        for layer in architecture.layers
        if isinstance(layer, MambaLayer)
    )
    return channels * shape.conv_kernel * bytes_per * batch


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
    """Forward FLOPs per token at a mean over a causal context of that length.

    A multiply-add counts as two. Matrix products count every weight once per token, attention
    scores and values half the context (causal); the scan is counted in its recurrent form: decay,
    input and readout of a (head_dim x state) matrix per head, 5 operations per element.
    """
    hidden = architecture.hidden_size
    layers = sum(layer_flops(shape, hidden, layer, context) for layer in architecture.layers)
    return 2 * hidden * shape.vocab_size + layers


def layer_flops(shape: ParentShape, hidden: int, layer: Layer, context: int) -> int:
    """What one layer adds to `flops_per_token`."""
    if isinstance(layer, MLPLayer):
        return 4 * hidden * layer.intermediate_size
    if isinstance(layer, AttentionLayer):
        query, keys = layer.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        # Scores and values over context / 2 keys on average.
        return 2 * hidden * (2 * query + 2 * keys) + 2 * query * context
    inner = layer.num_heads * layer.head_dim
    state = 2 * shape.n_groups * shape.ssm_state_size
    projections = 2 * hidden * (2 * inner + state + layer.num_heads) + 2 * inner * hidden
    scan = 5 * inner * shape.ssm_state_size
    return projections + 2 * (inner + state) * shape.conv_kernel + scan
