"""Hugging Face checkpoint <-> parent: safetensors only, no pickle, no remote code."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastic.config import ConfigError, ParentShape
from elastic.cut import tensor_shapes
from elastic.files import write_json
from elastic.parent.hybrid import HybridParent

SPELLINGS = {
    "linear_attention": "M",
    "mamba": "M",
    "mlp": "-",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
}
"""Both spellings of `layers_block_type`, by pattern letter."""

_STOCK_NAMES = {"mamba": "linear_attention", "mlp": "mlp", "attention": "full_attention"}
_INDEX = "model.safetensors.index.json"


def locate(path: str) -> Path:
    """A local directory as it is; a hub id is downloaded (safetensors, config and tokenizer
    only)."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "LICENSE*"]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"parent.path={path}: neither a local directory nor a hub repository that can be "
            f"downloaded ({type(error).__name__})"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Nemotron-H checkpoint; `ValueError` for another model."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; {directory} is not a Hugging Face checkpoint")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a Hugging Face config.json")
    if config.get("model_type") != "nemotron_h":
        raise ValueError(
            f"{path}: model_type={config.get('model_type')} must be nemotron_h; "
            "other models cannot be a parent"
        )
    return config


def read_shape(config: dict[str, Any]) -> ParentShape:
    """Sizes of a Nemotron-H config.json, of either era.

    Raises:
        ValueError: a field is missing, or asks for something that this parent does not compute.
    """
    fixed = {
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_bias": False,
        "mlp_bias": False,
        "mamba_proj_bias": False,
        "attention_bias": False,
        "sliding_window": None,
    }
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name}={config[name]} must be {value}")
    pattern = config.get("hybrid_override_pattern")
    if pattern is None:
        types = config.get("layers_block_type") or config.get("layer_types") or []
        pattern = "".join(SPELLINGS.get(name, "?") for name in types)
    try:
        return ParentShape(
            pattern=pattern,
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"] if "head_dim" in config else config["attention_head_dim"],
            mamba_num_heads=config["mamba_num_heads"],
            mamba_head_dim=config["mamba_head_dim"],
            n_groups=config["n_groups"],
            ssm_state_size=config["ssm_state_size"],
            conv_kernel=config.get("conv_kernel", 4),
            conv_bias=config.get("use_conv_bias", True),
            tied_head=config.get("tie_word_embeddings", False),
            norm_eps=config.get("layer_norm_epsilon", config.get("norm_eps", 1e-5)),
            time_step_min=config.get("time_step_min", 1e-3),
            max_position_embeddings=config.get("max_position_embeddings", 4096),
        )
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]} is missing") from error
    except TypeError as error:
        raise ValueError(f"config.json: a size is not a number ({error})") from error
    except ConfigError as error:
        raise ValueError(f"config.json: {error}".replace("parent.shape.", "")) from error


def stock_config(shape: ParentShape, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json for these sizes in both spellings, over whatever else `base` says.

    Stock transformers reads `layers_block_type`; other engines read `hybrid_override_pattern` and
    `num_hidden_layers`.
    """
    config = dict(base or {"chunk_size": 128, "torch_dtype": "float32"})
    for stale in ("layer_types", "attention_head_dim", "norm_eps", "auto_map"):
        config.pop(stale, None)
    return config | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "layers_block_type": [_STOCK_NAMES[kind] for kind in shape.kinds],
        "hybrid_override_pattern": shape.pattern,
        "num_hidden_layers": len(shape.pattern),
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "mamba_num_heads": shape.mamba_num_heads,
        "mamba_head_dim": shape.mamba_head_dim,
        "n_groups": shape.n_groups,
        "ssm_state_size": shape.ssm_state_size,
        "conv_kernel": shape.conv_kernel,
        "use_conv_bias": shape.conv_bias,
        "tie_word_embeddings": shape.tied_head,
        "layer_norm_epsilon": shape.norm_eps,
        "time_step_min": shape.time_step_min,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    }


class TensorStore:
    """The tensors of a checkpoint directory, read one at a time from memory-mapped shards.

    Raises:
        ValueError: a shard is missing or damaged, or a tensor is absent, unknown or of another
        shape
            than config.json says.
    """

    def __init__(self, directory: Path, expected: dict[str, tuple[int, ...]]) -> None:
        self._where: dict[str, Any] = {}
        index = directory / _INDEX
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: damaged ({error!r})") from error
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
            files = [name for name in files if name != "router.safetensors"]
        if not files:
            raise ValueError(f"{directory}: no model weights (*.safetensors) found")
        for name in files:
            path = directory / name
            if not path.is_file():
                raise ValueError(f"{path}: shard is missing, though {_INDEX} names it")
            try:
                shard = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: shard is truncated or damaged ({error})") from error
            for key in shard.keys():
                self._where[key] = shard
        if "lm_head.weight" not in self._where and "lm_head.weight" in expected:
            # Checkpoints with a tied head may store the embedding alone.
            self._where["lm_head.weight"] = self._where.get("backbone.embeddings.weight")
            self.head_stored = False
        else:
            self.head_stored = True
        for key, shape in expected.items():
            if self._where.get(key) is None:
                raise ValueError(f"{directory}: tensor {key} is missing from the shards")
            found = tuple(self.slice(key).get_shape())
            if found != shape:
                raise ValueError(
                    f"{directory}: tensor {key} has shape {found}, config.json asks for {shape}"
                )
        unknown = sorted(set(self._where) - set(expected))
        if unknown:
            raise ValueError(f"{directory}: unknown tensor {unknown[0]} ({len(unknown)} in all)")

    def slice(self, key: str) -> Any:
        """Lazy view of a tensor: `get_shape()`, and indexing reads only those bytes."""
        stored = (
            key if self.head_stored or key != "lm_head.weight" else "backbone.embeddings.weight"
        )
        return self._where[key].get_slice(stored)

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self.slice(key)[:]
        return tensor


def load_parent(
    directory: Path, kernels: str = "torch", activation_checkpointing: bool = False
) -> HybridParent:
    """Read a checkpoint into float32 weights; see `read_shape` and `TensorStore` for the errors."""
    shape = read_shape(read_config(directory))
    store = TensorStore(directory, tensor_shapes(shape))
    if shape.tied_head and store.head_stored:
        # The flag alone means nothing to stock transformers: it uses the head that is stored.
        same = torch.equal(store["lm_head.weight"], store["backbone.embeddings.weight"])
        shape.tied_head = same
    elif not shape.tied_head and not store.head_stored:
        raise ValueError(f"{directory}: tensor lm_head.weight is missing from the shards")
    parent = HybridParent(shape, kernels, activation_checkpointing)
    with torch.no_grad():
        for name, weight in parent.state_dict().items():
            weight.copy_(store[name])
    return parent


@dataclass(frozen=True)
class Pending:
    """A tensor yet to be written: its size is known before it is read."""

    name: str
    bytes: int
    read: Callable[[], Tensor]


def write_shards(directory: Path, tensors: Iterable[Pending], max_shard_bytes: int) -> None:
    """Write tensors as safetensors shards with an index, holding one shard in memory at a time."""
    shards: list[list[Pending]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        contents = {tensor.name: tensor.read() for tensor in shards[0]}
        save_file(contents, directory / "model.safetensors", metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: tensor.read() for tensor in shard}, directory / file, metadata)
        weight_map.update({tensor.name: file for tensor in shard})
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / _INDEX, index)


def save_weights(
    directory: Path,
    shape: ParentShape,
    tensors: list[Pending],
    base_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Write config.json and weights in stock Nemotron-H format into an existing directory, holding
    one shard in memory at a time."""
    write_shards(directory, tensors, max_shard_bytes)
    dtype = str(tensors[0].read().dtype).removeprefix("torch.")
    write_json(directory / "config.json", stock_config(shape, base_config) | {"torch_dtype": dtype})


def save_parent(
    parent: HybridParent,
    directory: Path,
    base_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """`save_weights` of a parent in memory."""

    def pending(name: str, weight: Tensor) -> Pending:
        size = weight.numel() * weight.element_size()
        return Pending(name, size, lambda: weight.detach().cpu().contiguous().clone())

    tensors = [pending(name, weight) for name, weight in parent.state_dict().items()]
    save_weights(directory, parent.shape, tensors, base_config, max_shard_bytes)
