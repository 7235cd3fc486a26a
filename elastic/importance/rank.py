"""Rank once, keep the result on disk, and use it again while nothing it depends on has changed."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastic.architecture import Space
from elastic.config import ImportanceConfig, ParentShape
from elastic.files import atomic_file, digest
from elastic.importance.collect import collect_scores, rank_layers
from elastic.importance.score import Orders, rank_widths
from elastic.parent import HybridParent

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranking:
    """What sorting and depth need: width orders, and layers to drop, least important first."""

    orders: Orders
    drop_order: tuple[int, ...]
    key: str
    depth_errors: list[dict[int, float]]

    def to_json(self, config: ImportanceConfig) -> dict[str, Any]:
        """The `ranking` entry of elastic.json."""
        return {"drop_order": list(self.drop_order), "key": self.key, "settings": asdict(config)}


def fingerprint(parent: HybridParent) -> str:
    """Hash of all weights."""
    total = hashlib.sha256()
    for name, weight in sorted(parent.state_dict().items()):
        total.update(name.encode())
        total.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def rank(
    parent: HybridParent,
    calibration: Tensor,
    config: ImportanceConfig,
    space: Space,
    seed: int,
    data_fingerprint: str,
    path: Path,
) -> Ranking:
    """Scores of every axis, from `path` if they were computed from the same parent, data and
    settings.

    calibration (samples, t) int64. Only what the space can drop or shrink needs a depth ranking.
    """
    smallest_head_dim = space.choices["mamba_head_dim"][-1]
    key = digest(
        {
            "parent": fingerprint(parent),
            "data": data_fingerprint,
            "calibration": list(calibration.shape),
            "settings": asdict(config),
            "dropped": space.max_dropped,
            "seed": seed,
        }
    )
    stored = _load(path, key)
    if stored is None:
        scores = collect_scores(parent, calibration, config)
        generator = torch.Generator().manual_seed(seed)
        order, rounds = rank_layers(parent, calibration, config, space.max_dropped, generator)
        with atomic_file(path) as temporary:
            depth = json.dumps({"order": order, "rounds": rounds})
            save_file(scores, temporary, {"key": key, "depth": depth})
        log.info("importance scores written to %s", path)
    else:
        scores, order, rounds = stored
        log.info("importance scores reused from %s", path)
    orders = rank_widths(parent.shape, scores, smallest_head_dim)
    return Ranking(orders, tuple(order), key, rounds)


def read_orders(path: Path, shape: ParentShape, smallest_head_dim: int) -> Orders:
    """Width orders of a finished ranking; `ValueError` when there is none."""
    stored = _read(path)
    if stored is None:
        raise ValueError(f"{path}: no finished ranking there; run train.py on this run_dir first")
    return rank_widths(shape, stored[0], smallest_head_dim)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Scores and metadata of a ranking file; None when there is none, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError):
        return None


def _load(
    path: Path, key: str
) -> tuple[dict[str, Tensor], list[int], list[dict[int, float]]] | None:
    """Stored scores, if they are there and belong to this key."""
    stored = _read(path)
    if stored is None or stored[1].get("key") != key:
        return None
    depth = json.loads(stored[1]["depth"])
    rounds = [{int(layer): error for layer, error in trial.items()} for trial in depth["rounds"]]
    return stored[0], depth["order"], rounds
