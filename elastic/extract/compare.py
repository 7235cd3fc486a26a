"""Shared by all checks of an export: the model to load, float32 weights, comparing results."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM, PreTrainedConfig
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.utils import logging

from elastic.extract.layerwise.sizes import layerwise_config
from elastic.extract.slice import OpenMember, Widened
from elastic.members.architecture import Architecture
from elastic.parent.stock import read_config
from elastic.storage.reading import StoredTensor, assembled, converted

TOLERANCE = 1e-4
"""Largest difference of two results, as a share of the largest value."""


class VerificationError(RuntimeError):
    """An extracted checkpoint is not the member that it should be. The message is one line."""


@dataclass(frozen=True)
class Verified:
    """A check that was passed, and by what margin; str() describes it."""

    check: str
    """`logits` of the whole model, or `blocks`."""
    share: float
    """Largest difference that was found, as a share of the largest value."""
    what: str
    """What was compared."""

    def __str__(self) -> str:
        return f"{self.what} within {self.share:.1e} of the largest ({TOLERANCE:.0e} allowed)"


def difference(member: OpenMember, expected: Tensor, found: Tensor, what: str) -> float:
    """Largest difference, as a share of the largest expected value.

    Raises:
        VerificationError: it is more than `TOLERANCE`, or something is not finite.
    """
    if not (torch.isfinite(expected).all() and torch.isfinite(found).all()):
        raise VerificationError(
            f"{member.budget}: {what} are not finite; a wider dtype may hold the weights"
        )
    largest = expected.abs().max().item()
    off = (found - expected).abs().max().item()
    share = off / largest if largest else float(off > 0)
    if share > TOLERANCE:
        raise VerificationError(
            f"{member.budget}: {what} of transformers and of the masked parent differ by "
            f"{share:.1e} of the largest, more than {TOLERANCE:.0e}; nothing was written"
        )
    return share


def model_class(member: OpenMember) -> type[NemotronHForCausalLM]:
    """The class that an extracted checkpoint is for; ours where stock has no such step sizes."""
    if member.export == "per_layer" or member.parent.time_step_limit is not None:
        from elastic.extract.layerwise.model import NemotronHElasticForCausalLM

        return NemotronHElasticForCausalLM
    return NemotronHForCausalLM


def model_config(directory: Path, member: OpenMember) -> PreTrainedConfig:
    """The configuration for `model_class` that an extracted checkpoint's config.json makes."""
    if member.export == "per_layer" or member.parent.time_step_limit is None:
        kind: Any = model_class(member).config_class
        made: PreTrainedConfig = kind.from_pretrained(directory, local_files_only=True)
        return made
    from elastic.extract.layerwise.config import NemotronHElasticConfig

    one_size = layerwise_config(read_config(directory), Architecture.full(member.shape))
    return NemotronHElasticConfig.from_dict(one_size)


def fill(
    module: nn.Module,
    tensors: Mapping[str, StoredTensor | Widened] | Mapping[str, StoredTensor],
    prefix: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Put float32 weights into a module on the meta device; `dtype` rounds them first, as when they
    are `converted`."""
    for name, weight in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        stored = tensors[f"{prefix}.{name}"]
        rounded = converted(name, stored.dtype, dtype)
        blocks = (block.to(rounded) for block in stored.blocks())
        value = assembled(blocks, torch.empty(weight.shape, dtype=torch.float32))
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def empty(module: nn.Module) -> None:
    """Free the weights."""
    module.to("meta")


@contextmanager
def plain_transformers() -> Iterator[None]:
    """Stock Nemotron-H in plain torch and without log output, whatever kernels are installed.

    Where mamba_ssm is installed transformers calls its GPU kernels on CPU tensors too; each of
    those functions carries its plain twin as `__wrapped__`.
    """
    kernels: dict[str, Any] = {
        name: function
        for name, function in vars(modeling_nemotron_h).items()
        if inspect.isfunction(function)
        and function.__module__ == modeling_nemotron_h.__name__
        and hasattr(function, "__wrapped__")
    }
    had_progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        for name, function in kernels.items():
            setattr(modeling_nemotron_h, name, inspect.unwrap(function))
        yield
    finally:
        for name, function in kernels.items():
            setattr(modeling_nemotron_h, name, function)
        logging.set_verbosity(verbosity)
        if had_progress:
            logging.enable_progress_bar()
