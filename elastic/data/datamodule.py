"""Batches for Lightning: an endless training stream and a fixed validation set."""

import hashlib
import itertools
from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from elastic.data.packing import PackedTokens, Tokens


def permutation(seed: int, stage_name: str, epoch: int, size: int) -> Tensor:
    """The order of `size` sequences in one epoch: (size,) int64, a function of its arguments."""
    key = hashlib.sha256(f"{seed}/{stage_name}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.randperm(size, generator=generator)


class SequenceStream(IterableDataset[Tensor]):
    """Endless batches of shuffled sequences, (b, t + 1) int64.

    Every batch comes `repeats` times in a row, once per micro-step. There is one stream of
    positions over all processes; micro-step m of rank r takes the `batch_sequences` from
    (m // repeats * world_size + r) * batch_sequences on. Position q is sequence
    permutation(epoch)[q % n] of epoch q // n. So nothing needs saving to resume: a stream that
    starts at micro-step k has exactly the batches of one that has reached it.
    """

    def __init__(
        self,
        sequences: PackedTokens,
        *,
        batch_sequences: int,
        seed: int,
        stage_name: str,
        repeats: int = 1,
        start_micro_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_sequences > 0 and start_micro_step >= 0 and 0 <= rank < world_size
        assert repeats > 0
        self.sequences = sequences
        self.batch_sequences = batch_sequences
        self.seed = seed
        self.stage_name = stage_name
        self.repeats = repeats
        self.start_micro_step = start_micro_step
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Tensor]:
        size = len(self.sequences)
        epoch, order = -1, torch.empty(0)
        start, skipped = divmod(self.start_micro_step, self.repeats)
        for number in itertools.count(start):
            first = (number * self.world_size + self.rank) * self.batch_sequences
            rows = []
            for position in range(first, first + self.batch_sequences):
                if position // size != epoch:  # a batch may reach into the next epoch
                    epoch = position // size
                    order = permutation(self.seed, self.stage_name, epoch, size)
                rows.append(self.sequences[int(order[position % size])])
            yield from itertools.repeat(torch.stack(rows), self.repeats - skipped)
            skipped = 0


class TextDataModule(L.LightningDataModule):
    """One stage's batches: (b, sequence_length + 1) int64, the inputs and the last target.

    `batch_sequences` is per process and forward pass; each batch comes `repeats` times in a row.
    Validation is the same on every rank and in every call: up to `validation_sequences` windows,
    spread evenly over the held-out text. The trainer must be built with
    use_distributed_sampler=False; the ranks share the work here.

    Raises ConfigError when either array of tokens is shorter than one sequence, and for a batch
    with a token outside the `vocabulary`.
    """

    def __init__(
        self,
        train: Tokens,
        validation: Tokens,
        *,
        sequence_length: int,
        batch_sequences: int,
        validation_sequences: int,
        validation_batch: int,
        seed: int,
        stage_name: str,
        repeats: int = 1,
        start_micro_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        assert validation_sequences > 0 and validation_batch > 0
        setting = f"curriculum.stages.{stage_name}.sequence_length"
        self.stream = SequenceStream(
            PackedTokens(
                train,
                sequence_length,
                setting=setting,
                text="training text",
                vocabulary=vocabulary,
            ),
            batch_sequences=batch_sequences,
            seed=seed,
            stage_name=stage_name,
            repeats=repeats,
            start_micro_step=start_micro_step,
            rank=rank,
            world_size=world_size,
        )
        text = "validation text"
        held_out = PackedTokens(
            validation, sequence_length, setting=setting, text=text, vocabulary=vocabulary
        )
        count = min(validation_sequences, len(held_out))
        self.validation = Subset(held_out, [i * len(held_out) // count for i in range(count)])
        self.validation_batch = validation_batch

    def train_dataloader(self) -> DataLoader[Tensor]:
        # the stream makes whole batches, and slicing an array needs no worker processes
        return DataLoader(self.stream, batch_size=None, pin_memory=torch.cuda.is_available())

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            self.validation,
            batch_size=self.validation_batch,
            pin_memory=torch.cuda.is_available(),
        )
