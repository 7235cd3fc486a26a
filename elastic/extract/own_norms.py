"""Norm weights that a member has for itself: members.safetensors of an elastic checkpoint.

Keys are `<budget>/<the norm's stored name in the parent>`; values are in the member's size, with
the scale of its width folded in, and replace the prefix of the parent's norm.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic.config import ParentShape
from elastic.members.cut import kept_shape, norm_cuts, tensor_shapes
from elastic.storage.manifest import MEMBERS, Manifest
from elastic.storage.reading import all_finite
from elastic.storage.seals import check_beside


def read_own_norms(
    checkpoint: Path, manifest: Manifest, budget: str, shape: ParentShape
) -> dict[str, Tensor]:
    """A budget's own norms by their stored names in the parent; empty where it has none.

    Raises:
        ValueError: the file is missing or damaged, or holds something else than all norms of the
            member, finite and in its sizes.
    """
    if manifest.version == 1:
        return {}
    path = checkpoint / MEMBERS
    if not path.is_file():
        raise ValueError(f"{path}: not found, and members without their norms would be wrong")
    check_beside(checkpoint, MEMBERS)
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.partition("/")[0] == budget]
            # Copies: a map of a file that is replaced later would end the process.
            found = {key.partition("/")[2]: file.get_tensor(key).clone() for key in keys}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if not found:
        return {}
    full = tensor_shapes(shape)
    wanted = {
        cut.source: kept_shape(cut.cut, full[cut.source])
        for cut in norm_cuts(shape, manifest.member(budget).architecture)
    }
    for name in sorted(wanted.keys() | found.keys()):
        there = tuple(found[name].shape) if name in found else None
        if there != wanted.get(name):
            raise ValueError(
                f"{path}: {budget}/{name} has shape {there}, but must have {wanted.get(name)} for "
                "the architecture in elastic.json"
            )
        if not all_finite(found[name]):
            raise ValueError(f"{path}: {budget}/{name} is not finite")
    return found
