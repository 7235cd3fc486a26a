"""Hugging Face checkpoint <-> parent: safetensors only, no pickle, no remote code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elastic.config import ConfigError, ParentShape
from elastic.members.cut import tensor_shapes
from elastic.parent.hybrid import HybridParent
from elastic.parent.stock import read_config, read_shape, stock_config
from elastic.storage.files import require_space, write_json
from elastic.storage.reading import assembled
from elastic.storage.seals import FileSeal, Seals
from elastic.storage.store import TensorStore
from elastic.storage.writing import Pending, write_shards


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


def open_weights(directory: Path, seals: Seals | None = None) -> tuple[ParentShape, TensorStore]:
    """Sizes and tensors of a checkpoint, checked against each other; a tied head apart
    only headers are read.

    The flag of a tied head means nothing to stock transformers, which uses the head that is stored;
    here it means that they are equal, or that only one is stored.

    Args:
        seals: what the files are compared with as they are read; None takes seals.json beside them,
            if it is there.

    Raises:
        ValueError: see `read_shape` and `TensorStore`.
    """
    seals = seals or Seals.read(directory)
    if seals is not None:
        seals.check("config.json")
    shape = read_shape(read_config(directory))
    store = TensorStore(directory, tensor_shapes(shape), seals)
    if not store.head_stored and not shape.tied_head:
        raise ValueError(f"{directory}: tensor lm_head.weight is missing from the shards")
    if store.head_stored and shape.tied_head:
        head, embedding = store["lm_head.weight"], store["backbone.embeddings.weight"]
        pairs = zip(head.blocks(), embedding.blocks(), strict=True)
        shape.tied_head = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    return shape, store


def load_parent(
    directory: Path,
    kernels: str = "torch",
    activation_checkpointing: bool = False,
    seals: Seals | None = None,
) -> HybridParent:
    """Read a checkpoint into float32 weights; see `open_weights` for `seals` and the errors."""
    shape, store = open_weights(directory, seals)
    parent = HybridParent(shape, kernels, activation_checkpointing)
    with torch.no_grad():
        for name, weight in parent.state_dict().items():
            assembled(store[name].blocks(), weight)
    return parent


def save_weights(
    directory: Path,
    shape: ParentShape,
    tensors: list[Pending],
    base_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 4_000_000_000,
    written: Callable[[int], object] = lambda count: None,
) -> dict[str, FileSeal]:
    """Write config.json and weights in stock Nemotron-H format into an existing directory, one
    tensor at a time; `written` is called with the bytes of every block. Returns the seals of the
    weights' files, by name.

    Raises:
        OSError: not enough space; nothing is written.
    """
    require_space(directory, sum(tensor.bytes for tensor in tensors))
    sealed = write_shards(directory, tensors, max_shard_bytes, written)
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    config = stock_config(shape, base_config)
    config.pop("dtype", None)  # transformers' newer name for the same setting
    write_json(directory / "config.json", config | {"torch_dtype": dtype})
    return sealed


def save_parent(
    parent: HybridParent,
    directory: Path,
    base_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """`save_weights` of a parent in memory."""
    tensors = [
        Pending.of(name, weight.shape, weight.dtype, weight.detach)
        for name, weight in parent.state_dict().items()
    ]
    save_weights(directory, parent.shape, tensors, base_config, max_shard_bytes)
