"""Write a member as a Hugging Face checkpoint: native, zero-padded, or with sizes per layer."""

from importlib.metadata import version
from pathlib import Path

from elastic.config import ExtractConfig
from elastic.extract.card import loads_in, write_card
from elastic.extract.exported import PROVENANCE
from elastic.extract.loading import resolve_dtype
from elastic.extract.slice import OpenMember, open_member
from elastic.extract.verify import verify
from elastic.members.architecture import Architecture
from elastic.members.cost import parameters
from elastic.parent.small_files import copy_small_files, small_files
from elastic.storage.files import (
    atomic_directory,
    refuse_inside,
    require_place,
    require_space,
    write_json,
)
from elastic.storage.manifest import NAME
from elastic.storage.progress import Progress
from elastic.storage.writing import write_shards

_ROOM_BYTES = 4 << 20
"""Bytes for what is written beside weights and copied files: headers, index, card."""


def extract(config: ExtractConfig) -> Path:
    """Cut one member out of an elastic checkpoint; everything is checked before it gets its name.

    Raises:
        ValueError: the checkpoint is damaged, has no such member, or none that can be exported so,
            or the output lies in it or where no directory can be.
        FileExistsError: the output exists.
        OSError: the disk has no room for it, or fails.
        VerificationError: the result computes something else than the masked parent.
    """
    output = Path(config.output)
    if output.exists():
        raise FileExistsError(f"output={output}: exists already; nothing was written")
    require_place("output", output)
    refuse_inside("output", output, Path(config.checkpoint), *_checkpoints_around(output))
    dtype = resolve_dtype(config.dtype)
    member = open_member(
        Path(config.checkpoint), config.budget, dtype, config.export, config.allow_dt_limit
    )
    pending = list(member.tensors())
    size = sum(tensor.bytes for tensor in pending)
    small = sum(path.stat().st_size for path in small_files(member.checkpoint))
    require_space(output, size + small + _ROOM_BYTES)
    print(summary(member, size))
    with atomic_directory(output) as temporary:
        write_json(temporary / "config.json", member.config)
        copy_small_files(member.checkpoint, temporary)
        _write_provenance(member, temporary)
        with Progress(size, "writing") as progress:
            write_shards(temporary, pending, config.max_shard_bytes, progress)
        verified = verify(temporary, member) if config.verify else None
        if verified is not None:
            print(f"verified: {verified}")
        write_card(temporary, member, output.name, None if verified is None else str(verified))
    print(f"written to {output}")
    return output


def _checkpoints_around(output: Path) -> list[Path]:
    """Elastic checkpoints that a path lies in, the one it is cut from or another."""
    return [each for each in output.resolve().parents if (each / NAME).is_file()]


def summary(member: OpenMember, size: int) -> str:
    """What is about to be written, and who can load it: a line each."""
    share = member.parameters / parameters(member.parent, Architecture.full(member.parent))
    kept, total = len(member.shape.pattern), len(member.parent.pattern)
    loaders = f"{member.export}: {loads_in(member)}"
    if member.stored_parameters != member.parameters:
        more = member.stored_parameters / member.parameters - 1
        loaders += (
            f": {member.stored_parameters:,} parameters are stored for the {member.parameters:,} "
            f"of the member ({more:+.1%}), zero-padded to the widest layer of each kind"
        )
    return (
        f"{member.budget}: {member.parameters:,} parameters ({share:.1%} of the parent), "
        f"{size / 1e9:.3g} GB, {kept} of {total} layers, hidden {member.shape.hidden_size}\n"
        f"{loaders}"
    )


def _write_provenance(member: OpenMember, directory: Path) -> None:
    value = {
        "checkpoint": str(member.checkpoint),
        "budget": member.budget,
        "export": member.export,
        "target": member.member.target,
        "params": member.parameters,
        "stored_params": member.stored_parameters,
        "architecture": member.member.architecture.to_json(),
        "training": member.manifest.provenance,
        "elastic_version": version("elastic"),
    }
    write_json(directory / PROVENANCE, value)
