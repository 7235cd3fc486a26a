"""Rank once, keep the result on disk, and reuse it while nothing it depends on has changed."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic.cluster.place import ALONE, Place, first_alone, from_all, from_first
from elastic.config import ImportanceConfig, ParentShape
from elastic.data import Batch
from elastic.importance.basis import (
    energies,
    energy_shares,
    gated_norms,
    principal_directions,
    spread,
    stream_norms,
)
from elastic.importance.collect import Statistics, collect
from elastic.importance.depth import rank_layers
from elastic.importance.passes import make_ready
from elastic.importance.score import Orders, rank_widths
from elastic.importance.sort import mamba_units
from elastic.members.architecture import Space
from elastic.parent import HybridParent
from elastic.parent.weights import open_weights
from elastic.storage.files import atomic_file, digest
from elastic.storage.seals import NAME, REMEDY, SealBroken, Seals
from elastic.storage.store import TensorStore
from elastic.storage.writing import Pending, write_shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The text that a parent is ranked on."""

    widths: Batch
    """(samples, t)."""
    depth: Batch
    """(samples, t), of another length."""

    @property
    def digest(self) -> str:
        """Of its ids and borders."""
        both = (self.widths.inputs, self.widths.documents, self.depth.inputs, self.depth.documents)
        return digest([hashlib.sha256(each.cpu().numpy().tobytes()).hexdigest() for each in both])


@dataclass(frozen=True)
class Ranking:
    """What sorting and depth need: width orders, and layers to drop, least important first."""

    orders: Orders
    drop_order: tuple[int, ...]
    key: str
    depth_errors: list[dict[int, float]]
    energies: dict[str, Tensor]
    """Norm by its stored name -> share of each channel in its input's energy, float32, full width,
    in the basis that the parent is brought into; a gated norm's within each of its groups."""
    found: Tensor
    """(d,): the same for the stream, mean over its norms, in the coordinates as found."""

    def shares(self, space: Space) -> dict[str, dict[str, float]]:
        """The `energy` entry of elastic.json: what each hidden size keeps, beside as many best
        coordinates."""
        names = stream_norms(space.shape)
        of_stream = {name: self.energies[name] for name in names}
        return energy_shares(of_stream, self.found, space.choices["hidden"])

    def to_json(self, config: ImportanceConfig) -> dict[str, Any]:
        """The `ranking` entry of elastic.json."""
        return {"drop_order": list(self.drop_order), "key": self.key, "settings": asdict(config)}


def fingerprint(store: TensorStore) -> str:
    """Hash of all weights as they are stored; sealed ones are not read for it."""
    if store.seals is not None:
        files = {store[name].file.path.name for name in store}
        return digest({name: store.seals.files[name].digest for name in files})
    total = hashlib.sha256()
    for name in sorted(store):
        total.update(f"{name} {store[name].dtype}".encode())
        for block in store[name].blocks():
            total.update(block.view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def rank(
    source: Path,
    load: Callable[[], HybridParent],
    calibration: Calibration,
    config: ImportanceConfig,
    space: Space,
    seed: int,
    data_fingerprint: str,
    path: Path,
    seals: Seals | None = None,
    dtype: torch.dtype = torch.float32,
    place: Place = ALONE,
) -> Ranking:
    """Scores of every axis, from `path` if they were computed from the same parent, data and
    settings and are as they were written; sealed beside it. To be called by all processes: the
    first one looks and writes, all compute, and all read.

    Args:
        seals: the source's; see `open_weights`.
        source: checkpoint of the unsorted parent.
        load: makes that parent, in float32; not called for scores that are there already.
        calibration: the same on every process, on the device that the parent is to run on.
        dtype: of the matrices and their products; a ranking that is there serves any, so that a run
            may be resumed with another.
        place: this process' share is that of its rank.

    Only what the space can drop or shrink needs a depth ranking.

    Raises:
        ValueError: the parent overflows on this text.
    """
    with first_alone(place):
        if place.rank == 0:
            key = _key(source, calibration, config, space, seed, data_fingerprint, seals)
            there = _is_there(path, key)
    if not from_first(place.rank == 0 and there):
        parent = make_ready(load(), calibration.widths.tokens.device, dtype)
        statistics = collect(parent, calibration.widths, config, place)
        tensors = _tensors(parent, statistics, config, space, seed, place)
        del statistics
        generator = torch.Generator().manual_seed(seed)
        order, rounds = rank_layers(
            parent, calibration.depth, config, space.max_dropped, generator, place
        )
        depth = json.dumps({"order": order, "rounds": rounds})
        with first_alone(place):
            if place.rank == 0:
                _write(path, tensors, {"depth": depth, "key": key})
                log.info("importance scores written to %s", path)
    else:
        log.info("importance scores reused from %s", path)
    return read_ranking(path, space.shape, space.choices["mamba_head_dim"][-1])


def _key(
    source: Path,
    calibration: Calibration,
    config: ImportanceConfig,
    space: Space,
    seed: int,
    data_fingerprint: str,
    seals: Seals | None,
) -> str:
    """What a ranking rests on."""
    return digest(
        {
            "parent": fingerprint(open_weights(source, seals)[1]),
            "data": data_fingerprint,
            "calibration": calibration.digest,
            "settings": asdict(config),
            "dropped": space.max_dropped,
            "widths": space.choices["hidden"] if config.spread else None,
            "seed": seed,
        }
    )


def _is_there(path: Path, key: str) -> bool:
    """Whether a finished ranking with this key is there."""
    try:
        stored = _read(path)
    except SealBroken as error:
        log.warning("%s: ranking again", str(error).removesuffix(f"; {REMEDY}"))
        return False
    return stored is not None and stored[1].get("key") == key


def read_ranking(path: Path, shape: ParentShape, smallest_head_dim: int) -> Ranking:
    """A finished ranking; `ValueError` when there is none, or it is not as it was written."""
    stored = _read(path)
    if stored is None:
        raise ValueError(f"{path}: no finished ranking; run elastic train with this run_dir first")
    scores, metadata = stored
    depth = json.loads(metadata["depth"])
    rounds = [{int(layer): error for layer, error in trial.items()} for trial in depth["rounds"]]
    orders = rank_widths(shape, scores, smallest_head_dim)
    orders = replace(orders, rotation=scores.get("rotation"))
    found = torch.stack([scores[f"found.{name}"] for name in stream_norms(shape)]).mean(0)
    return Ranking(
        orders,
        tuple(depth["order"]),
        metadata["key"],
        rounds,
        _energies(shape, scores, orders),
        found,
    )


def _tensors(
    parent: HybridParent,
    statistics: Statistics,
    config: ImportanceConfig,
    space: Space,
    seed: int,
    place: Place,
) -> dict[str, Tensor]:
    """All that is stored of the widths: scores, energies as found and rotated, the rotation."""
    covariances = statistics.covariances
    found = _of_all(energies(covariances, None)) | statistics.gated
    scores = statistics.scores
    if config.order == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {
            name: torch.rand(score.shape, generator=generator) for name, score in scores.items()
        }
    tensors = scores | {f"found.{name}": energy for name, energy in found.items()}
    if config.rotates(parent.shape.tied_head):
        rotation = principal_directions(parent, covariances, place)
        if config.spread:
            generator = torch.Generator().manual_seed(seed)
            rotation = spread(rotation, space.choices["hidden"], generator)
        turned = _of_all(energies(covariances, rotation))
        tensors |= {f"energy.{name}": energy for name, energy in turned.items()}
        tensors["rotation"] = rotation.contiguous()
    return tensors


def _of_all(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the processes have worked out of their norms, together."""
    return {name: energy for share in from_all(mine) for name, energy in share.items()}


def _energies(
    shape: ParentShape, scores: Mapping[str, Tensor], orders: Orders
) -> dict[str, Tensor]:
    """Energies in the basis of the orders."""
    if orders.rotation is not None:
        found = {name: scores[f"energy.{name}"] for name in stream_norms(shape)}
    else:
        found = {name: scores[f"found.{name}"][orders.hidden] for name in stream_norms(shape)}
    for name in gated_norms(shape):
        units = mamba_units(shape, orders, int(name.split(".")[2]))
        found[name] = scores[f"found.{name}"][units]
    return found


def _write(path: Path, scores: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Scores, then their seals: a file without seals is not finished. The same scores give the same
    bytes."""
    tensors = [
        Pending.of(name, scores[name].shape, scores[name].dtype, partial(scores.__getitem__, name))
        for name in sorted(scores)
    ]
    with atomic_file(path) as temporary:
        seal = write_shard(tensors, temporary, metadata=metadata)
        (path.parent / NAME).unlink(missing_ok=True)
    Seals.of(path.parent, {path.name: seal}, [path.name]).write()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Scores and metadata of a ranking file; None when there is none, or none that was finished.

    Raises:
        SealBroken: it is not as it was written.
    """
    seals = Seals.read(path.parent)
    if seals is None:
        return None
    seals.check(path.name)
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: a map of a file that is replaced or cut short later would end the process.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError):
        return None
