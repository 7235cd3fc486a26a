"""The config.json of a member whose layers differ in size. No torch."""

from typing import Any

from elastic.extract.layerwise import ARCHITECTURE, MODEL_TYPE
from elastic.members.architecture import Architecture, AttentionLayer, Layer, MLPLayer


def layer_sizes(layer: Layer) -> dict[str, int]:
    """Sizes of a layer by the names that Nemotron-H's configuration has for them."""
    if isinstance(layer, MLPLayer):
        return {"intermediate_size": layer.intermediate_size}
    if isinstance(layer, AttentionLayer):
        return {"num_attention_heads": layer.num_heads}
    return {"mamba_num_heads": layer.num_heads, "mamba_head_dim": layer.head_dim}


def layerwise_config(widest: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """config.json of a member at true size, from the stock one with its widest layers' sizes.

    `per_layer_config` is transformers' own field: over the sizes given once, by a layer's position.
    Every size is spelled out in it, also where it is the widest.
    """
    digits = len(str(len(architecture.layers) - 1))  # transformers sorts its keys like that
    return widest | {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "per_layer_config": {
            str(position).zfill(digits): layer_sizes(layer)
            for position, layer in enumerate(architecture.layers)
        },
    }
