"""Check that an extracted checkpoint is the member: transformers == the masked parent.

Every tensor is read back and compared with the cut of the checkpoint. Where the whole model fits
in memory its logits are compared with the masked parent's, else the outputs of some blocks, one at
a time (`verify_blocks`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import NemotronHForCausalLM

from elastic.extract.compare import (
    VerificationError,
    Verified,
    difference,
    empty,
    fill,
    model_class,
    model_config,
    plain_transformers,
)
from elastic.extract.slice import OpenMember
from elastic.extract.verify_blocks import check_blocks
from elastic.members import cost
from elastic.members.architecture import Architecture
from elastic.parent import HybridParent
from elastic.routing.masks import hard_keep
from elastic.storage.progress import Progress
from elastic.storage.reading import StoredTensor
from elastic.storage.store import TensorStore
from elastic.storage.writing import Pending

MEMORY_BYTES = 1 << 30
"""Weights in float32 and logits that a check of the whole model may hold. Everything else, most of
it libraries, takes up to 0.7 GiB: together that is less than the 2 GiB in which a member of any
size is extracted. A block of the largest parent needs 0.8 GiB."""

TOKENS = (2, 64)
"""Batch and time that the check of the whole model runs on."""

UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)
"""What transformers raises over a directory that it cannot load."""


@torch.no_grad()
def verify(directory: Path, member: OpenMember, memory_bytes: int = MEMORY_BYTES) -> Verified:
    """Compare an extracted checkpoint with what it was cut out of; all in float32 on the CPU.

    `memory_bytes` decides between the check of the whole model and that of some blocks.

    Raises:
        VerificationError: the checkpoint does not load cleanly, holds something else than the cut,
            or computes something else than the masked parent.
    """
    check_config(directory, member)
    if whole_model_bytes(member) <= memory_bytes:
        share = check_logits(directory, member)
        count = len(check_stored(directory, member))
        return Verified("logits", share, f"all {count} tensors are those of the cut, logits are")
    with plain_transformers():
        model = _on_meta(directory, member)
        stored = check_stored(directory, member, model)
        share, blocks = check_blocks(model, stored, member)
    return Verified(
        "blocks",
        share,
        f"all {len(stored)} tensors are those of the cut, {blocks} of "
        f"{len(member.shape.pattern)} blocks and samples of embedding and head are",
    )


def whole_model_bytes(member: OpenMember) -> int:
    """Memory that `check_logits` needs at its peak."""
    parent = member.parent
    batch, time = TOKENS
    logits = batch * time * parent.vocab_size
    layers = cost.layer_sizes(Architecture.full(parent))
    block = max(cost.layer_parameters(parent, parent.hidden_size, layer) for layer in layers)
    streamed = 4 * (2 * parent.vocab_size * parent.hidden_size + block + 2 * logits)
    # transformers maps a shard into memory while it converts its tensors.
    stored = sum(tensor.bytes for tensor in member.tensors())
    return max(streamed, 4 * (member.stored_parameters + 4 * logits) + stored)


def check_logits(directory: Path, member: OpenMember) -> float:
    """Largest difference of logits, as a share of the largest logit.

    The parent is read a block at a time, so that memory holds one float32 copy of the member and
    little of the parent.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(member.parent.vocab_size, TOKENS, generator=generator)
    expected = parent_logits(member, tokens)  # (b, t, v)
    with plain_transformers():
        found = _reopen(directory, member)(tokens, use_cache=False).logits
    return difference(member, expected, found, "logits")


def check_config(directory: Path, member: OpenMember) -> None:
    """config.json must be the member's configuration, field by field."""
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    wanted: dict[str, Any] = json.loads(json.dumps(member.config))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise VerificationError(
                f"{member.budget}: config.json has {key}={found.get(key)} instead of "
                f"{wanted.get(key)}; nothing was written"
            )


def check_stored(
    directory: Path, member: OpenMember, model: NemotronHForCausalLM | None = None
) -> TensorStore:
    """Re-read the result: every tensor must be the member's, bit for bit.

    The shapes must be those of `model` too, which transformers made of config.json.
    """
    pending = list(member.tensors())
    try:
        stored = TensorStore(directory, {tensor.name: tensor.shape for tensor in pending})
    except ValueError as error:
        raise VerificationError(f"{member.budget}: {error}; nothing was written") from error
    if not stored.head_stored:
        raise VerificationError(f"{member.budget}: lm_head.weight is missing; nothing was written")
    if model is not None:
        built = {
            name.replace("model.", "backbone.", 1): tuple(weight.shape)
            for name, weight in model.named_parameters()
        }
        for name in sorted(built.keys() | stored.keys()):
            there = stored[name].shape if name in stored else None
            if built.get(name) != there:
                raise VerificationError(
                    f"{member.budget}: transformers has tensor {name} of shape {built.get(name)}, "
                    f"stored is {there}; nothing was written"
                )
    total = sum(tensor.bytes for tensor in pending)
    with Progress(total, "verifying") as progress:
        for tensor in pending:
            _check_tensor(member, tensor, stored[tensor.name], progress)
    return stored


def _check_tensor(
    member: OpenMember, tensor: Pending, stored: StoredTensor, progress: Progress
) -> None:
    """Row block by row block."""
    if stored.dtype != tensor.dtype:
        raise VerificationError(
            f"{member.budget}: tensor {tensor.name} is stored as {stored.dtype} instead of "
            f"{tensor.dtype}; nothing was written"
        )
    at = 0
    for block in tensor.blocks():
        rows: Any = (((at, at + len(block)),), *(None for _ in tensor.shape[1:]))
        wanted = block.to(tensor.dtype)
        if member.dtype is not None and not torch.isfinite(wanted).all():
            raise VerificationError(
                f"{member.budget}: values of {tensor.name} are not finite; a wider dtype may hold "
                "the weights"
            )
        if not _same_bits(stored.read(rows), wanted):
            raise VerificationError(
                f"{member.budget}: tensor {tensor.name} differs from the cut of the checkpoint in "
                f"rows {at} to {at + len(block) - 1}; nothing was written"
            )
        progress(wanted.nbytes)
        at += len(block)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as they are stored: NaN is itself, and 0 is not -0."""
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(as_integer), b.contiguous().view(as_integer))


def _on_meta(directory: Path, member: OpenMember) -> NemotronHForCausalLM:
    """The model that transformers makes of the directory's config.json, without weights."""
    model: Any = model_class(member)
    try:
        with torch.device("meta"):
            built: NemotronHForCausalLM = model(model_config(directory, member)).eval()
            return built
    except UNREADABLE as error:
        raise _cannot_load(error) from error


def _reopen(directory: Path, member: OpenMember) -> NemotronHForCausalLM:
    """The checkpoint in transformers, float32; every tensor must be there, and no other."""
    try:
        loaded: Any = model_class(member).from_pretrained(
            directory,
            config=model_config(directory, member),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (*UNREADABLE, SafetensorError) as error:
        raise _cannot_load(error) from error
    model, report = loaded
    for problem, keys in report.items():
        if keys:
            raise VerificationError(f"transformers reports {problem}: {sorted(keys)[:3]}")
    count = sum(weight.numel() for weight in model.parameters())
    if count != member.stored_parameters:
        raise VerificationError(
            f"transformers loads {count} parameters instead of {member.stored_parameters}"
        )
    stock: NemotronHForCausalLM = model.eval()
    return stock


def _cannot_load(error: Exception) -> VerificationError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return VerificationError(f"transformers cannot load the result: {reason[0]}")


@torch.no_grad()
def parent_logits(member: OpenMember, tokens: Tensor) -> Tensor:
    """Logits of the whole parent under the member's hard masks: (b, t) -> (b, t, v), float32.

    Weights take the output's dtype on their way to float32, as the extracted ones do.
    """
    with torch.device("meta"):
        parent = HybridParent(member.parent, "torch")

    tensors = member.masked

    def load(module: nn.Module, prefix: str) -> None:
        fill(module, tensors, prefix, member.dtype)

    def unload(module: nn.Module, *_: Any) -> None:
        empty(module)

    for index, block in enumerate(parent.backbone.layers):
        prefix = f"backbone.layers.{index}"
        block.register_forward_pre_hook(lambda module, _, prefix=prefix: load(module, prefix))
        block.register_forward_hook(unload)
    load(parent.backbone.embeddings, "backbone.embeddings")
    load(parent.backbone.norm_f, "backbone.norm_f")
    load(parent.lm_head, "lm_head")
    return parent.logits(tokens, hard_keep(member.parent, member.member.architecture))
