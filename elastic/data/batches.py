"""Packed rows -> batches for Lightning: an endless training stream and a fixed validation set."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from elastic.config import ConfigError
from elastic.data.order import SOURCE_BITS, StageOrder
from elastic.data.packs import Packed
from elastic.data.tokens import TokenStore


@dataclass
class Batch:
    """Rows of packed documents."""

    tokens: Tensor
    """(b, t + 1) int64: the inputs and the last target; 0 in the padding."""
    documents: Tensor
    """(b, t) int32, number of each input's document in its row; the padding counts as one more."""
    counted: Tensor | None = None
    """(n,) int64, places among the b * t targets of those that count; None where all do. A target
    of another document than its input, in the padding, or that the source says is none, does
    not."""
    share: float = 1.0
    """What the mean over the counted targets weighs in an optimizer step, whose loss is the mean
    over all of its targets, on all processes; 1 on average."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> Tensor:
        """(b, t) int64."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """(b * t,) int64."""
        return self.tokens[:, 1:].flatten()

    @property
    def target_count(self) -> int:
        """Targets that count."""
        return self.documents.numel() if self.counted is None else len(self.counted)

    def first(self, count: int) -> "Batch":
        """Its first rows, for their inputs alone."""
        return Batch(self.tokens[:count], self.documents[:count])

    def split(self, rows: int) -> list["Batch"]:
        """Consecutive rows, for their inputs alone."""
        return [
            Batch(tokens, documents)
            for tokens, documents in zip(
                self.tokens.split(rows), self.documents.split(rows), strict=True
            )
        ]

    def _map(self, change: object) -> "Batch":
        assert callable(change)
        counted = None if self.counted is None else change(self.counted)
        return Batch(change(self.tokens), change(self.documents), counted, self.share)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True)
class Row:
    """One packed row, as arrays."""

    tokens: np.ndarray
    """(t + 1,) int64."""
    documents: np.ndarray
    """(t,) int32."""
    counted: np.ndarray
    """(t,) bool."""


def one_document(tokens: Tensor) -> Batch:
    """Rows (b, t + 1) int64, each of which is one document."""
    return Batch(tokens, torch.zeros_like(tokens[:, 1:], dtype=torch.int32))


def batch_of(rows: Sequence[Row], share: float = 1.0) -> Batch:
    """Rows of the same length as a batch."""
    counted = np.stack([row.counted for row in rows])
    places = None if counted.all() else torch.from_numpy(np.flatnonzero(counted))
    return Batch(
        torch.from_numpy(np.stack([row.tokens for row in rows])),
        torch.from_numpy(np.stack([row.documents for row in rows])),
        places,
        share,
    )


class Sequences(Dataset[Row]):
    """All packed rows of some sources at one length, by key: (number of the source << 40) + row.

    Args:
        vocabulary: of the parent; None takes any token.

    Raises:
        ConfigError: a row has a token that the vocabulary does not have.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        packs: Sequence[Packed],
        sequence_length: int,
        vocabulary: int | None = None,
    ) -> None:
        assert len(stores) == len(packs)
        self.stores, self.packs = tuple(stores), tuple(packs)
        self.sequence_length, self.vocabulary = sequence_length, vocabulary

    def __getitem__(self, key: int) -> Row:
        store, pack = self.stores[key >> SOURCE_BITS], self.packs[key >> SOURCE_BITS]
        row = key & ((1 << SOURCE_BITS) - 1)
        length = self.sequence_length
        tokens = np.zeros(length + 1, np.int64)
        documents = np.empty(length + 1, np.int32)
        counted = np.zeros(length + 1, np.bool_)
        end, number = 0, -1
        for number, piece in enumerate(range(int(pack.rows[row]), int(pack.rows[row + 1]))):
            start, size = int(pack.starts[piece]), int(pack.lengths[piece])
            ids, targets = store.read(start, size)
            tokens[end : end + size] = ids
            documents[end : end + size] = number
            counted[end + 1 : end + size] = True if targets is None else targets[1:]
            end += size
        documents[end:] = number + 1
        if self.vocabulary is not None and int(tokens.max()) >= self.vocabulary:
            raise ConfigError(
                f"{store.directories[0].parent}: has token {int(tokens.max())}, the parent's "
                f"vocabulary is {self.vocabulary}; it is damaged, or of another run"
            )
        return Row(tokens, documents[:-1], counted[1:])

    def targets(self, keys: np.ndarray) -> int:
        """Targets that count in some rows."""
        sources, rows = keys >> SOURCE_BITS, keys & ((1 << SOURCE_BITS) - 1)
        return sum(
            int(self.packs[source].targets[rows[sources == source]].sum())
            for source in np.unique(sources).tolist()
        )

    def documents(self, key: int) -> np.ndarray:
        """(t,) int64: number of each target's document in its source; -1 where none counts."""
        store, pack = self.stores[key >> SOURCE_BITS], self.packs[key >> SOURCE_BITS]
        row = key & ((1 << SOURCE_BITS) - 1)
        pieces = slice(int(pack.rows[row]), int(pack.rows[row + 1]))
        numbers = store.document_of(np.asarray(pack.starts[pieces]))
        found = np.repeat(numbers, np.asarray(pack.lengths[pieces]))
        padding = np.full(self.sequence_length + 1 - len(found), -1)
        return np.where(self[key].counted, np.concatenate([found, padding])[1:], -1)


class SequenceStream(IterableDataset[Batch]):
    """Endless batches of a stage.

    Every batch comes `repeats` times in a row, once per micro-step. There is one stream of
    positions over all processes; micro-step m of rank r takes the `batch_sequences` from
    (m // repeats * world_size + r) * batch_sequences on. Which sequence a position has is
    `StageOrder`'s to say. So nothing needs saving to resume: a stream that starts at micro-step k
    has exactly the batches of one that has reached it, and of one with other processes.

    Args:
        step_sequences: of an optimizer step, over all processes.
    """

    def __init__(
        self,
        order: StageOrder,
        sequences: Sequences,
        *,
        batch_sequences: int,
        step_sequences: int,
        repeats: int = 1,
        start_micro_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_sequences > 0 and start_micro_step >= 0 and 0 <= rank < world_size
        assert repeats > 0 and step_sequences % (batch_sequences * world_size) == 0
        self.order, self.sequences = order, sequences
        self.batch_sequences, self.step_sequences = batch_sequences, step_sequences
        self.repeats, self.start_micro_step = repeats, start_micro_step
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        held, batch = -1, None
        for micro_step in itertools.count(self.start_micro_step + first, every):
            number = micro_step // self.repeats
            if number != held:
                held, batch = number, self._batch(number)
            assert batch is not None
            yield batch

    def _batch(self, number: int) -> Batch:
        size = self.batch_sequences
        first = (number * self.world_size + self.rank) * size
        keys = self.order.keys(first, size)
        rows = [self.sequences[key] for key in keys.tolist()]
        return batch_of(rows, self._share(first, keys))

    def _share(self, first: int, keys: np.ndarray) -> float:
        """Of the targets in the step's mean, times the number of batches that are averaged."""
        step = first // self.step_sequences
        whole = self.sequences.targets(
            self.order.keys(step * self.step_sequences, self.step_sequences)
        )
        batches = self.step_sequences // self.batch_sequences
        return self.sequences.targets(keys) * batches / whole


class TextDataModule(L.LightningDataModule):
    """One stage's batches.

    The trainer must be built with use_distributed_sampler=False; the ranks share the work here.

    Args:
        validation: keys of the rows of `held_out` that every rank measures in every call.
        workers: processes that load training batches.
    """

    def __init__(
        self,
        stream: SequenceStream,
        held_out: Sequences,
        validation: Sequence[int],
        validation_batch: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        assert len(validation) and validation_batch > 0
        self.stream, self.held_out, self.validation = stream, held_out, list(validation)
        self.validation_batch, self.workers = validation_batch, workers

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(
            self.stream,
            batch_size=None,  # the stream makes whole batches
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        parts = [
            self.validation[start : start + self.validation_batch]
            for start in range(0, len(self.validation), self.validation_batch)
        ]
        batches = [batch_of([self.held_out[key] for key in part]) for part in parts]
        return DataLoader(_Batches(batches), batch_size=None)


class _Batches(Dataset[Batch]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        return self.batches[number]


def spread(packs: Mapping[str, Packed], shares: Mapping[str, float], count: int) -> list[int]:
    """Keys of at most `count` rows, of every source by its share and evenly over its rows: one at
    least of each that has a share, none of others, and fewer where a source has not so many.

    The sources of `packs` are numbered in their order.
    """
    wanted: dict[str, int] = {}
    owed, given = 0.0, 0
    for name, pack in packs.items():
        if shares[name] > 0 and len(pack):
            owed += shares[name] * count
            wanted[name] = max(round(owed) - given, 1)
            given = round(owed)
    while sum(wanted.values()) > max(count, len(wanted)):
        wanted[max(wanted, key=lambda name: wanted[name])] -= 1
    keys: list[int] = []
    for number, (name, pack) in enumerate(packs.items()):
        rows = min(wanted.get(name, 0), len(pack))
        keys += [(number << SOURCE_BITS) + i * len(pack) // rows for i in range(rows)]
    return keys
