"""Proof that an extracted checkpoint is the member: stock transformers == the masked parent."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import NemotronHForCausalLM
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.utils import logging

from elastic.extract.slice import OpenMember
from elastic.masks import hard_keep
from elastic.parent import HybridParent

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit."""


class VerificationError(RuntimeError):
    """An extracted checkpoint is not the member that it should be. The message is one line."""


@torch.no_grad()
def verify(directory: Path, member: OpenMember) -> float:
    """Largest difference of logits between both models, as a share of the largest logit.

    Both run in float32 on the CPU. The parent is read a block at a time, so that memory holds one
    float32 copy of the member and little of the parent.

    Raises:
        VerificationError: the checkpoint does not load cleanly, or computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(member.parent.vocab_size, (2, 64), generator=generator)
    expected = parent_logits(member, tokens)  # (b, t, v)
    with plain_transformers():
        found = _reopen(directory, member)(tokens, use_cache=False).logits
    largest = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    if not (torch.isfinite(expected).all() and torch.isfinite(found).all()):
        raise VerificationError(
            f"{member.budget}: logits are not finite; a wider dtype may hold the weights"
        )
    share = difference / largest if largest else float(difference > 0)
    if share > TOLERANCE:
        raise VerificationError(
            f"{member.budget}: stock transformers and the masked parent differ by {share:.1e} of "
            f"the largest logit, more than {TOLERANCE:.0e}; nothing was written"
        )
    return share


def _reopen(directory: Path, member: OpenMember) -> NemotronHForCausalLM:
    """The checkpoint in stock transformers, float32; every tensor must be there, and no other."""
    try:
        loaded: Any = NemotronHForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise VerificationError(
            f"stock transformers cannot load the result: {reason[0]}"
        ) from error
    model, report = loaded
    for problem, keys in report.items():
        if keys:
            raise VerificationError(f"stock transformers reports {problem}: {sorted(keys)[:3]}")
    count = sum(weight.numel() for weight in model.parameters())
    if count != member.stored_parameters:
        raise VerificationError(
            f"stock transformers loads {count} parameters instead of {member.stored_parameters}"
        )
    stock: NemotronHForCausalLM = model.eval()
    return stock


def parent_logits(member: OpenMember, tokens: Tensor) -> Tensor:
    """Logits of the whole parent under the member's hard masks: (b, t) -> (b, t, v), float32.

    Weights take the output's dtype on their way to float32, as the extracted ones do.
    """
    with torch.device("meta"):
        parent = HybridParent(member.parent, "torch")

    def load(module: nn.Module, prefix: str) -> None:
        for name, _ in list(module.named_parameters()):
            owner_name, _, leaf = name.rpartition(".")
            value = member.store[f"{prefix}.{name}"].read()
            value = value.to(member.dtype or value.dtype).float()
            setattr(module.get_submodule(owner_name), leaf, nn.Parameter(value, False))

    def unload(module: nn.Module, *_: Any) -> None:
        module.to("meta")

    for index, block in enumerate(parent.backbone.layers):
        prefix = f"backbone.layers.{index}"
        block.register_forward_pre_hook(lambda module, _, prefix=prefix: load(module, prefix))
        block.register_forward_hook(unload)
    load(parent.backbone.embeddings, "backbone.embeddings")
    load(parent.backbone.norm_f, "backbone.norm_f")
    load(parent.lm_head, "lm_head")
    return parent.logits(tokens, hard_keep(member.parent, member.member.architecture))


@contextmanager
def plain_transformers() -> Iterator[None]:
    """Stock Nemotron-H in plain torch and in silence, whatever kernels are installed.

    Where mamba_ssm is installed transformers calls its GPU kernels on CPU tensors too; each of
    those functions carries its plain twin as `__wrapped__`.
    """
    kernels = {
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
