"""Load a directory that should hold one member of an elastic checkpoint, once it is known to."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHForCausalLM

from elastic.config import ParentShape
from elastic.extract.layerwise import MODEL_TYPE
from elastic.extract.layerwise.sizes import layer_sizes
from elastic.extract.loading import load
from elastic.extract.slice import OpenMember, open_member
from elastic.members.architecture import Architecture
from elastic.parent.stock import read_config, read_shape
from elastic.storage.foreign import read_json
from elastic.storage.manifest import NAME

PROVENANCE = "provenance.json"
"""File of an export that says what was cut."""


def load_exported(
    directory: Path, checkpoint: Path, budget: str, dtype: torch.dtype | str | None = None
) -> NemotronHForCausalLM:
    """The model in a directory, once it is known to be the member `budget` of `checkpoint`.

    config.json and `PROVENANCE` are held against elastic.json here, and the tensors against
    config.json by `load`, which runs no code of the directory's and unpickles nothing.

    Raises:
        ValueError: it is another member, a member of another family, or damaged.
    """
    member = open_member(checkpoint, budget, export="per_layer")
    config = read_config(directory, ("nemotron_h", MODEL_TYPE))
    found = read_shape(config)
    for name in (field.name for field in fields(ParentShape)):
        _same(directory / "config.json", name, getattr(found, name), getattr(member.shape, name))
    if config["model_type"] == MODEL_TYPE:
        _check_sizes(directory / "config.json", config, member)
    if (directory / PROVENANCE).is_file():  # not where it was trained on and saved by others
        _check_provenance(directory / PROVENANCE, member)
    return load(directory, dtype=dtype)


def _same(path: Path, name: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ValueError(
            f"{path}: {name}={found}, but {NAME} gives {wanted}; this is not that member: extract "
            "it again, or give another directory"
        )


def _check_sizes(path: Path, config: dict[str, Any], member: OpenMember) -> None:
    """Layer by layer; a layer without a size of its own has the one for all."""
    for position, layer in enumerate(member.member.architecture.layers):
        wanted = layer_sizes(layer)
        try:
            listed = {int(key): sizes for key, sizes in config["per_layer_config"].items()}
            found = {name: listed.get(position, {}).get(name, config[name]) for name in wanted}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: per_layer_config is damaged ({error!r})") from error
        _same(path, f"layer {position}", found, wanted)


def _check_provenance(path: Path, member: OpenMember) -> None:
    """Two members may have the same sizes and other layers."""
    try:
        said = Architecture.from_json(read_json(path)["architecture"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error!r})") from error
    wanted = member.member.architecture
    _same(path, "layers", [x.index for x in said.layers], [x.index for x in wanted.layers])
    for ours, theirs in zip(wanted.layers, said.layers, strict=True):
        _same(path, f"layer {ours.index}", layer_sizes(theirs), layer_sizes(ours))
