"""A model in memory from an elastic checkpoint or from an exported directory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, NemotronHConfig, NemotronHForCausalLM

from elastic.extract.layerwise import MODEL_TYPE
from elastic.extract.layerwise.config import NemotronHElasticConfig
from elastic.extract.layerwise.mixer import adopt_mixers
from elastic.extract.layerwise.model import NemotronHElasticForCausalLM
from elastic.extract.layerwise.sizes import layerwise_config
from elastic.extract.slice import open_member
from elastic.members.architecture import Architecture
from elastic.parent.stock import read_config, read_shape, step_limits
from elastic.storage.manifest import NAME, Manifest
from elastic.storage.reading import converted
from elastic.storage.store import TensorStore
from elastic.storage.writing import Pending

_DTYPES = ("float32", "bfloat16", "float16")

_UNBUILDABLE = (
    StrictDataclassError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What transformers raises over a config.json with impossible values."""


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type to convert to; None for `source`, which keeps what is stored."""
    if dtype is None or dtype == "source":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype={name}: must be one of source, {', '.join(_DTYPES)}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def resolve_device(device: torch.device | str) -> torch.device:
    """A device that can hold weights; `ValueError` when there is none of that name here."""
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"device={device}: must be one that torch has here, such as cpu or cuda:0 ({reason[0]})"
        ) from error
    if resolved.type == "meta":
        raise ValueError("device=meta: must be a device that holds weights, such as cpu or cuda:0")
    return resolved


def load(
    path: Path,
    budget: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> NemotronHForCausalLM:
    """A member, or an exported one, as a model in evaluation mode; see `elastic.load`."""
    wanted, place = resolve_dtype(dtype), resolve_device(device)
    if budget is None:
        if (path / NAME).is_file():
            known = ", ".join(Manifest.read(path).budgets)
            raise ValueError(f"budget: {path} is an elastic checkpoint; must be one of {known}")
        return _exported(path, wanted, place)
    if not (path / NAME).is_file() and (path / "config.json").is_file():
        raise ValueError(
            f"budget={budget}: {path / NAME} not found; {path} is a single model and loads without "
            "a budget"
        )
    member = open_member(path, budget, wanted, "per_layer")
    return _filled(_empty(member.config, path), member.tensors(), path, place)


def _exported(path: Path, dtype: torch.dtype | None, device: torch.device) -> NemotronHForCausalLM:
    """The one model that a directory holds."""
    config = read_config(path, ("nemotron_h", MODEL_TYPE))
    tied = read_shape(config).tied_head
    if dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    model = _empty(config, path)
    shapes = {_stored(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    store = TensorStore(path, shapes)
    if not store.head_stored and not tied:
        raise ValueError(f"{path}: tensor lm_head.weight is missing from the shards")
    tensors = (
        Pending(name, shape, converted(name, store[name].dtype, dtype), store[name].blocks)
        for name, shape in shapes.items()
    )
    return _filled(model, tensors, path, device)


def _empty(config: dict[str, Any], path: Path) -> NemotronHForCausalLM:
    """The model of a config.json, without storage; it computes the published function whatever
    `time_step_min` says and whatever the type of its matrices, and honours a `time_step_limit`."""
    shape = read_shape(config)
    older = ("mamba_dt_min", "mamba_dt_limit")  # names that would win over the newer ones
    config = {key: value for key, value in config.items() if key not in older} | step_limits(shape)
    if shape.time_step_limit is not None and config["model_type"] != MODEL_TYPE:
        config = layerwise_config(config, Architecture.full(shape))
    try:
        with torch.device("meta"):
            if config["model_type"] == MODEL_TYPE:
                return NemotronHElasticForCausalLM(NemotronHElasticConfig.from_dict(config))
            model = NemotronHForCausalLM(NemotronHConfig.from_dict(config))
            adopt_mixers(model)
            return model
    except _UNBUILDABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path / 'config.json'}: transformers makes no model of it ({reason})"
        ) from error


def _stored(name: str) -> str:
    """Name of a model's tensor in a checkpoint."""
    return name.replace("model.", "backbone.", 1)


def _filled(
    model: NemotronHForCausalLM, tensors: Iterable[Pending], path: Path, device: torch.device
) -> NemotronHForCausalLM:
    """The model with its weights on a device, where each goes in blocks: host memory holds no
    more than a block of a model that goes to another device."""
    values = {tensor.name: tensor.read(device) for tensor in tensors}
    weights = {name: values.pop(_stored(name)) for name in model.state_dict()}
    assert not values, f"no place in the model for {sorted(values)}"
    model.load_state_dict(weights, strict=True, assign=True)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without a value: {left}"
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()
