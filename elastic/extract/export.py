"""Write a member as a plain Hugging Face checkpoint, or build it in memory."""

import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, NemotronHConfig, NemotronHForCausalLM

from elastic.architecture import Architecture
from elastic.config import ExtractConfig
from elastic.cost import parameters
from elastic.extract.slice import OpenMember, open_member
from elastic.extract.verify import TOLERANCE, verify
from elastic.files import atomic_directory, write_json
from elastic.tensors import write_shards

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
"""Small files of the checkpoint that belong to every member."""

_DTYPES = ("float32", "bfloat16", "float16")


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type to convert to; None for `source`, which keeps what is stored."""
    if dtype is None or dtype == "source":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype={name}: must be one of source, {', '.join(_DTYPES)}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def extract(config: ExtractConfig) -> Path:
    """Cut one member out of an elastic checkpoint; everything is checked before it gets its name.

    Raises:
        ValueError: the checkpoint is damaged, or has no such member.
        FileExistsError: the output exists.
        VerificationError: stock transformers computes something else than the masked parent.
    """
    output = Path(config.output)
    if output.exists():
        raise FileExistsError(f"output={output}: exists already; nothing was written")
    member = open_member(Path(config.checkpoint), config.budget, resolve_dtype(config.dtype))
    pending = list(member.tensors())
    size = sum(tensor.bytes for tensor in pending)
    print(summary(member, size))
    with atomic_directory(output) as temporary:
        write_json(temporary / "config.json", member.config)
        _copy_small_files(member.checkpoint, temporary)
        _write_provenance(member, temporary)
        # `disable=None` draws the bar on a terminal only
        with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            write_shards(temporary, pending, config.max_shard_bytes, bar.update)
        if config.verify:
            share = verify(temporary, member)
            print(f"verified: logits within {share:.1e} of the largest ({TOLERANCE:.0e} allowed)")
    print(f"written to {output}")
    return output


def load(
    checkpoint: Path,
    budget: str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> NemotronHForCausalLM:
    """One member as a stock model in evaluation mode; see `elastic.load`."""
    member = open_member(checkpoint, budget, resolve_dtype(dtype))
    config = NemotronHConfig.from_dict(member.config)
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    tensors = {
        tensor.name.replace("backbone.", "model.", 1): tensor.read().to(device)
        for tensor in member.tensors()
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without a value: {left}"
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.eval()


def summary(member: OpenMember, size: int) -> str:
    """What is about to be written, in one line, and a second one when it is padded."""
    share = member.parameters / parameters(member.parent, Architecture.full(member.parent))
    kept, total = len(member.shape.pattern), len(member.parent.pattern)
    lines = [
        f"{member.budget}: {member.parameters:,} parameters ({share:.1%} of the parent), "
        f"{size / 1e9:.3g} GB, {kept} of {total} layers, hidden {member.shape.hidden_size}"
    ]
    if member.stored_parameters != member.parameters:
        lines.append(
            f"layers differ in width and are zero-padded: {member.stored_parameters:,} parameters "
            f"are stored for the {member.parameters:,} of the member"
        )
    return "\n".join(lines)


def _copy_small_files(source: Path, target: Path) -> None:
    found = {path for pattern in COPIED for path in source.glob(pattern)}
    for path in sorted(found):
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)


def _write_provenance(member: OpenMember, directory: Path) -> None:
    value = {
        "checkpoint": str(member.checkpoint),
        "budget": member.budget,
        "target": member.member.target,
        "params": member.parameters,
        "stored_params": member.stored_parameters,
        "architecture": member.member.architecture.to_json(),
        "training": member.provenance,
        "elastic_version": version("elastic"),
    }
    write_json(directory / "provenance.json", value)
