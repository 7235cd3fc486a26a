"""A teacher whose top-k log-probabilities for a run's text are read from disk."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elastic.config import ConfigError
from elastic.data import Batch
from elastic.losses import TopK
from elastic.teacher.base import SPLITS, Teacher
from elastic.teacher.cache.index import CacheContents, CacheIndex, window_bytes
from elastic.teacher.cache.shards import Rows, ShardSet

log = logging.getLogger(__name__)

OPEN_FILES = 16


class CachedTeacher(Teacher):
    """Reads what `elastic cache-teacher` wrote.

    Every distinct sequence is there once, in the order of its first use.

    Args:
        wanted: what this run reads.
        places: as `cache_places`.
        thorough: look at every file now. On many processes one of them is enough; each verifies
            what it reads.

    Raises:
        ConfigError: the cache is of another run, is not complete, or a file is damaged.
    """

    def __init__(
        self,
        directory: Path,
        wanted: CacheContents,
        places: Mapping[str, np.ndarray],
        thorough: bool,
    ) -> None:
        index = CacheIndex.read(directory)
        index.require_same(directory, wanted)
        index.require_covers(directory, wanted)
        self.wanted, self.places = wanted, places
        self.shard_sets = {
            (stage, split): ShardSet.of(directory, index, stage, split)
            for stage in wanted.stages
            for split in SPLITS
        }
        self.device, self.stage = torch.device("cpu"), ""
        self._maps: dict[tuple[str, str, int], Rows] = {}
        if thorough:
            self._require_complete(directory)
            log.info(
                "teacher: cached in %s, top %d tokens in %s", directory, wanted.top_k,
                index.log_probs,
            )  # fmt: skip

    def start(self, device: torch.device, stage: str) -> None:
        self.device, self.stage = device, stage
        self._unseen = set(SPLITS)
        self._maps.clear()

    def distributions(self, batch: Batch, split: str, first: int) -> TopK:
        rows = self._read(split, first, len(batch))
        if split in self._unseen:  # once a stage: to look at a batch is to wait for the device
            self._unseen.remove(split)
            for window, text in zip(batch.tokens, rows["text"], strict=True):
                assert text_digest(window) == text.tobytes(), "not the text of this place"
        indices, log_probs = (
            torch.from_numpy(values).flatten(0, 1).to(self.device)
            for values in (rows["indices"].astype(np.int64), rows["log_probs"])
        )
        return TopK(indices, log_probs)

    def cross_entropy(self, split: str, first: int, batch: Batch) -> float:
        """Loss of the teacher itself on the counted text of some rows, at temperature 1, in nats
        per token."""
        found = self._read(split, first, len(batch))["text_log_probs"].reshape(-1)
        if batch.counted is not None:
            found = found[batch.counted.cpu().numpy()]
        return -float(found.mean(dtype=np.float64))

    def _read(self, split: str, first: int, count: int) -> Rows:
        """Verified copies of `count` sequences from place `first` of a split's order on."""
        shards = self.shard_sets[self.stage, split]
        parts: list[Rows] = []
        for slot in self._slots(split, first, count):
            number, row = divmod(slot, shards.shard_sequences)
            arrays = self._open(shards, number)
            shards.verify(arrays, number, row)
            parts.append({name: array[row] for name, array in arrays.items()})
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _open(self, shards: ShardSet, number: int) -> Rows:
        place = (shards.stage, shards.split, number)
        if place not in self._maps:
            if len(self._maps) >= OPEN_FILES:
                del self._maps[next(iter(self._maps))]
            self._maps[place] = shards.open(number)
        return self._maps[place]

    def _slots(self, split: str, first: int, count: int) -> list[int]:
        """Where the sequences of some places of a split's order are in the cache."""
        if split == "validation":
            return list(range(first, first + count))
        return [int(place) for place in self.places[self.stage][first : first + count]]

    def _require_complete(self, directory: Path) -> None:
        """Raise ConfigError unless every file that this run reads is there and whole."""
        missing = []
        for (stage, split), shards in self.shard_sets.items():
            here = self.wanted.stages[stage]
            for number in range(shards.count(here.train if split == "train" else here.validation)):
                fault = shards.fault(number)
                if fault == "is missing":
                    missing.append(str(shards.path(number).relative_to(directory)))
                elif fault is not None:
                    raise shards.refusal(number, fault)
        if missing:
            raise ConfigError(
                f"objective.teacher_cache={directory}: {len(missing)} files are missing, "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; "
                "run elastic cache-teacher again with the settings of this run"
            )


def text_digest(window: Tensor) -> bytes:
    """Digest of a row's tokens (t + 1,), 8 bytes."""
    return hashlib.sha256(window_bytes(window.cpu().numpy())).digest()[:8]
