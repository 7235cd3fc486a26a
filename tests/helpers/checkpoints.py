"""Checkpoints of random parents, changed on disk, and the one line with which they are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.strategies import random_parent
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import NemotronHForCausalLM

from elastic.config import ParentShape
from elastic.parent import HybridParent
from elastic.parent.weights import load_parent, save_parent

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def saved(directory: Path, shape: ParentShape, **arguments: Any) -> HybridParent:
    """A random parent, written to an existing directory."""
    parent = random_parent(shape)
    save_parent(parent, directory, **arguments)
    return parent


def in_published_types(parent: HybridParent) -> HybridParent:
    """The same parent in bfloat16, with what published checkpoints keep in float32 left so."""
    for name, weight in parent.named_parameters():
        if not name.endswith(("A_log", ".D", "dt_bias")):
            weight.data = weight.data.bfloat16()
    return parent


def load_stock(directory: Path) -> NemotronHForCausalLM:
    """Stock transformers, offline and without remote code; every tensor must find its place."""
    model, info = NemotronHForCausalLM.from_pretrained(
        directory, output_loading_info=True, use_cache=False
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], f"{problem}: {info[problem]}"
    return model.eval()


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an unsharded checkpoint."""
    tensors = load_file(directory / WHOLE)
    change(tensors)
    save_file(tensors, directory / WHOLE)


def reconfigure(directory: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Change config.json."""
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if key not in remove}
    (directory / "config.json").write_text(json.dumps(kept))


def refused(directory: Path, message: str) -> None:
    """`load_parent` raises a one-line ValueError that matches."""
    with pytest.raises(ValueError) as caught:
        load_parent(directory)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
