"""Prepared text: the tokens of every source on disk, split, cut into slices, and packed."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError, DataConfig
from elastic.data.batches import Sequences, SequenceStream, TextDataModule, spread
from elastic.data.order import SourceOrder, StageOrder
from elastic.data.packs import Packed, joined, pack
from elastic.data.tokens import TokenStore
from elastic.storage.files import atomic_directory, digest, write_json
from elastic.storage.seals import Seals

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "report")
"""Texts that share no document: to learn from, to choose by, and for figures that are reported."""

MOST_SLICES = 64
"""Slices of a source at most; each is packed by itself."""

PACK_VERSION = 1
"""Of the files of packed rows; raise it when the same text no longer gives the same rows."""


@dataclass(frozen=True)
class StageText:
    """What the text needs to know of a stage."""

    name: str
    sequence_length: int
    sequences: int
    """Of the whole stage, over all processes."""
    weights: Mapping[str, float] | None
    """As in its settings."""


@dataclass(frozen=True)
class TrainPack:
    """The training rows of a source at one length, slice after slice."""

    packed: Packed
    slice_rows: tuple[int, ...]


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer, and the documents that it has tokenised."""

    config: DataConfig
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    stores: Mapping[str, TokenStore]
    """By source."""
    fingerprint: str
    """Of the settings, the text, the tokenizer and the library versions behind the tokens."""
    vocabulary: int | None = None
    """Of the parent; a row with another token is refused."""
    _packs: dict[Any, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def digest(self) -> str:
        """Checksum of the tokens of all sources, and of how they are split and packed."""
        every = {name: self.every(name) for name in self.stores}
        tokens = {name: store.digest for name, store in self.stores.items()}
        return digest([PACK_VERSION, tokens, every, self.config.packing])

    def every(self, name: str) -> int:
        """Every so many records of a source one is held out.

        Raises:
            ConfigError: there are too few for one each for validation and for the report.
        """
        groups = self.stores[name].groups
        every = self.config.held_out_every(groups)
        if every < 2 or groups < 2 * every:
            raise ConfigError(
                f"data.validation_every={self.config.validation_every}: the source {name} has only "
                f"{groups} document(s), so that not one each would be held out for validation and "
                "for the report; must be at most half the number of documents, and at least 2 "
                f"(data.sources.{name} can name more or smaller files)"
            )
        return every

    @cached_property
    def train_tokens(self) -> dict[str, int]:
        """Training tokens of every source."""
        return {
            name: sum(
                int(store.places(documents)[1].sum()) for documents in self._train_slices(name)
            )
            for name, store in self.stores.items()
        }

    def documents(self, name: str, split: str, parts: Sequence[int] | None = None) -> np.ndarray:
        """(n,) int64 numbers of a split's documents, ascending; of some parts alone, or of all.

        A record that gave several documents, one per turn, is in one split with all of them.
        """
        store, every = self.stores[name], self.every(name)
        found = []
        for part in range(len(store.directories)) if parts is None else sorted(parts):
            group = store.group_numbers(part)
            held_out = group % every == every - 1
            if split == "train":
                here = ~held_out
            else:
                here = held_out & (group // every % 2 == SPLITS.index(split) - 1)
            found.append(np.flatnonzero(here) + store.document_offsets[part])
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _slice_parts(self, name: str) -> list[list[int]]:
        """The parts of each slice, dealt out by names that have nothing to do with their order."""
        store = self.stores[name]
        dealt = sorted(range(len(store.directories)), key=lambda p: store.directories[p].name)
        count = min(MOST_SLICES, len(dealt))
        return [dealt[number::count] for number in range(count)]

    def _train_slices(self, name: str) -> list[np.ndarray]:
        return [self.documents(name, "train", parts) for parts in self._slice_parts(name)]

    def train_pack(self, name: str, length: int) -> TrainPack:
        """The training rows of a source; from disk where they were packed before."""
        key = ("train", name, length)
        if key not in self._packs:
            self._packs[key] = self._stored_pack(name, length) or self._make_pack(name, length)
        return self._packs[key]

    def held_out(self, split: str, length: int, packing: str | None = None) -> dict[str, Packed]:
        """Rows of a held-out split, by source; of another packing than the settings' if given."""
        packing = packing or self.config.packing
        key = (split, length, packing)
        if key not in self._packs:
            self._packs[key] = {
                name: pack(store, self.documents(name, split), length, packing)
                for name, store in self.stores.items()
            }
        return self._packs[key]

    def _pack_directory(self, name: str, length: int) -> Path:
        known = [PACK_VERSION, self.stores[name].digest, self.every(name), self.config.packing]
        return self.directory / "packs" / f"{name}-{length}-{digest([*known, length])}"

    def _stored_pack(self, name: str, length: int) -> TrainPack | None:
        directory = self._pack_directory(name, length)
        try:
            seals = Seals.read(directory)
            if seals is None:
                return None
            seals.check_all()
            slice_rows = tuple(json.loads((directory / "pack.json").read_bytes())["slice_rows"])
            arrays = {
                each: np.load(directory / f"{each}.npy", mmap_mode="r", allow_pickle=False)
                for each in ("rows", "starts", "lengths", "targets")
            }
            return TrainPack(Packed(**arrays), slice_rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: is packed again (%s)", directory, error)
            return None

    def _make_pack(self, name: str, length: int) -> TrainPack:
        store, packing = self.stores[name], self.config.packing
        slices = [pack(store, each, length, packing) for each in self._train_slices(name)]
        return TrainPack(joined(slices), tuple(len(each) for each in slices))

    def store_packs(self, stages: Sequence[StageText]) -> None:
        """Write the training rows of some stages beside the tokens, where they are not there yet.
        One process alone."""
        for length in sorted({stage.sequence_length for stage in stages}):
            for name in self.stores:
                stored = self._stored_pack(name, length)
                if stored is not None:
                    self._packs["train", name, length] = stored
                    continue
                made = self._packs.get(("train", name, length)) or self._make_pack(name, length)
                self._packs["train", name, length] = made
                directory = self._pack_directory(name, length)
                directory.parent.mkdir(parents=True, exist_ok=True)
                with atomic_directory(directory, replace=True) as temporary:
                    for each in ("rows", "starts", "lengths", "targets"):
                        values = getattr(made.packed, each)
                        np.save(temporary / f"{each}.npy", values, allow_pickle=False)
                    write_json(temporary / "pack.json", {"slice_rows": made.slice_rows})
                    Seals.of(temporary).write()

    def shares(self, weights: Mapping[str, float] | None) -> dict[str, float]:
        """Share of each source in a stage's sequences."""
        return self.config.shares(self.train_tokens, None if weights is None else dict(weights))

    def order(self, stages: Sequence[StageText], name: str, seed: int) -> StageOrder:
        """The order of the sequences of one of these stages, after those before it.

        Raises:
            ConfigError: a source that the stage draws from has no row.
        """
        begun = dict.fromkeys(self.stores, 0)
        for stage in stages:
            shares = self.shares(stage.weights)
            packs = {n: self.train_pack(n, stage.sequence_length) for n in self.stores}
            for source, share in shares.items():
                if share > 0 and not len(packs[source].packed):
                    raise ConfigError(
                        f"data.sources.{source}: has no training text; must have some, or no "
                        f"weight in curriculum.stages.{stage.name}.weights"
                    )
            sources = {
                source: SourceOrder(
                    source, packs[source].slice_rows, seed, stage.name, begun[source]
                )
                if len(packs[source].packed)
                else None
                for source in self.stores
            }
            drawn = sum(self.train_tokens[source] for source, share in shares.items() if share > 0)
            if drawn < stage.sequence_length:
                raise ConfigError(
                    f"curriculum.stages.{stage.name}.sequence_length={stage.sequence_length}: a "
                    f"sequence longer than the training text, which has {drawn} tokens; must be "
                    "at most that, or give more text (data.sources)"
                )
            order = StageOrder(sources, shares, seed, stage.name)
            if stage.name == name:
                return order
            begun |= order.begun(stage.sequences)
        raise AssertionError(name)

    def sequences(self, length: int) -> Sequences:
        """All training rows of a length, by the keys of `order`."""
        packs = [self.train_pack(name, length).packed for name in self.stores]
        return Sequences(list(self.stores.values()), packs, length, self.vocabulary)

    def held_out_rows(
        self, split: str, length: int, count: int, packing: str | None = None
    ) -> tuple[Sequences, list[int]]:
        """Rows of a held-out split, and the keys of at most `count` of them, of every source by its
        share and evenly over its text.

        Raises:
            ConfigError: there is none.
        """
        return self._held_out_rows(split, length, count, packing, self.shares(None))

    def _held_out_rows(
        self, split: str, length: int, count: int, packing: str | None, shares: Mapping[str, float]
    ) -> tuple[Sequences, list[int]]:
        rows, keys = self._spread(self.held_out(split, length, packing), length, count, shares)
        if not keys:
            raise ConfigError(
                f"data.validation_every={self.config.validation_every}: no document that is held "
                f"out as {split} text has a token to predict; must be less, or give more text "
                "(data.sources)"
            )
        return rows, keys

    def calibration(self, length: int, count: int) -> tuple[Sequences, list[int]]:
        """The same of training text, of the first slices of each source that have enough, one
        document after another: padding is not text to be measured on."""
        packs = {}
        for name, store in self.stores.items():
            documents = np.empty(0, np.int64)
            for parts in self._slice_parts(name):
                documents = np.union1d(documents, self.documents(name, "train", parts))
                packs[name] = pack(store, documents, length, "concat").full(length)
                if len(packs[name]) >= count:
                    break
        return self._spread(packs, length, count, self.shares(None))

    def _spread(
        self,
        packs: Mapping[str, Packed],
        length: int,
        count: int,
        shares: Mapping[str, float],
    ) -> tuple[Sequences, list[int]]:
        rows = Sequences(list(self.stores.values()), list(packs.values()), length, self.vocabulary)
        return rows, spread(packs, shares, count)


def stage_text(
    data: PreparedData,
    stages: Sequence[StageText],
    name: str,
    *,
    seed: int,
    batch_sequences: int,
    step_sequences: int,
    repeats: int = 1,
    start_micro_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> TextDataModule:
    """Training and validation text of a stage, from one of its micro-batches on."""
    stage = next(stage for stage in stages if stage.name == name)
    length = stage.sequence_length
    stream = SequenceStream(
        data.order(stages, name, seed),
        data.sequences(length),
        batch_sequences=batch_sequences,
        step_sequences=step_sequences,
        repeats=repeats,
        start_micro_step=start_micro_step,
        rank=rank,
        world_size=world_size,
    )
    count = data.config.validation_sequences
    shares = data.shares(stage.weights)
    held_out, keys = data._held_out_rows("validation", length, count, None, shares)
    return TextDataModule(stream, held_out, keys, batch_sequences, data.config.loader_workers)
