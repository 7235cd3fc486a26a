"""The stream is a pure function of where it stands: ranks and loading processes share it, and
resuming goes on in it; what a batch weighs makes a step's loss the mean over all of its targets."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.stores import Document, MemoryStore, numbered, parts_of
from helpers.strategies import assert_gradients_near, gradients, random_parent, tiny_shape
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.config import ConfigError, ObjectiveConfig
from elastic.data import Batch, Sequences, TextDataModule, batch_of, one_document
from elastic.data.batches import Row, SequenceStream, spread
from elastic.data.order import SOURCE_BITS, SourceOrder, StageOrder
from elastic.data.packs import Packed, joined, pack
from elastic.losses import token_terms

LENGTH = 8


def lengths(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 30, count).tolist()


STORES = (MemoryStore([numbered(lengths(0, 20)), numbered(lengths(1, 9), 600)]),
          MemoryStore([numbered(lengths(2, 12), 1000)]))  # fmt: skip
"""Two sources; no token comes twice."""


def rows_of(
    stores: Sequence[MemoryStore] = STORES, packing: str = "best_fit", vocabulary: int | None = None
) -> tuple[Sequences, list[list[int]]]:
    """All rows, and the rows of each source's slices, which are its parts."""
    packs, slices = [], []
    for store in stores:
        borders = store.document_offsets
        parts = [
            pack(store, np.arange(a, b), LENGTH, packing)
            for a, b in zip(borders, borders[1:], strict=False)
        ]
        packs.append(joined(parts))
        slices.append([len(each) for each in parts])
    return Sequences(stores, packs, LENGTH, vocabulary), slices


def stream(packing: str = "best_fit", seed: int = 0, **settings: Any) -> SequenceStream:
    sequences, slices = rows_of(packing=packing)
    sources: dict[str, SourceOrder | None] = {
        name: SourceOrder(name, rows, seed, "short", 0)
        for name, rows in zip("ab", slices, strict=True)
    }
    order = StageOrder(sources, {"a": 0.7, "b": 0.3}, seed, "short")
    defaults: dict[str, Any] = {"batch_sequences": 3, "step_sequences": 12}
    return SequenceStream(order, sequences, **(defaults | settings))


def batches(count: int, **settings: Any) -> list[Batch]:
    return list(islice(stream(**settings), count))


def same(one: Batch, two: Batch) -> bool:
    fields = [(one.tokens, two.tokens), (one.documents, two.documents)]
    assert (one.counted is None) == (two.counted is None)
    if one.counted is not None and two.counted is not None:
        fields.append((one.counted, two.counted))
    return one.share == two.share and all(a.equal(b) for a, b in fields)


def all_same(one: Sequence[Batch], two: Sequence[Batch]) -> bool:
    return all(same(a, b) for a, b in zip(one, two, strict=True))


def test_a_batch_is_the_rows_of_the_order() -> None:
    found = stream()
    keys = found.order.keys(0, 60)
    for number, batch in enumerate(islice(found, 20)):
        rows = [found.sequences[int(key)] for key in keys[number * 3 : number * 3 + 3]]
        assert same(batch, batch_of(rows, batch.share))
        assert batch.tokens.shape == (3, LENGTH + 1) and batch.tokens.dtype == torch.int64
        assert batch.documents.shape == (3, LENGTH) and batch.documents.dtype == torch.int32
        counted = torch.from_numpy(np.stack([row.counted for row in rows])).flatten()
        wanted = counted.nonzero()[:, 0]
        counts = torch.arange(3 * LENGTH) if batch.counted is None else batch.counted
        assert counts.equal(wanted)
        assert batch.target_count == len(wanted) and len(batch) == 3
        assert batch.targets.equal(batch.tokens[:, 1:].flatten())
        assert batch.inputs.equal(batch.tokens[:, :-1])


@pytest.mark.parametrize("start", [1, 16, 17, 100])
def test_starting_later_is_going_on(start: int) -> None:
    whole = batches(start + 20, rank=1, world_size=2)
    assert all_same(batches(20, rank=1, world_size=2, start_micro_step=start), whole[start:])


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_repeated_batch_is_the_same_text_and_the_next_one_follows(repeats: int) -> None:
    plain = batches(20, rank=1, world_size=2)
    repeated = batches(20 * repeats, rank=1, world_size=2, repeats=repeats)
    assert all_same(repeated, [batch for batch in plain for _ in range(repeats)])
    for start in range(2 * repeats + 2):
        late = batches(10, repeats=repeats, start_micro_step=start, rank=1, world_size=2)
        assert all_same(late, repeated[start : start + 10])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_sequences", [1, 3])
def test_a_step_is_the_same_rows_on_any_number_of_processes(
    world_size: int, batch_sequences: int
) -> None:
    """In the same order, if all are asked for a micro-step in turn; and each row is once there."""
    whole = torch.cat([batch.tokens for batch in batches(20, batch_sequences=12)])
    ranks = [
        batches(
            240 // batch_sequences // world_size,
            rank=rank,
            world_size=world_size,
            batch_sequences=batch_sequences,
        )
        for rank in range(world_size)
    ]
    together = [batch.tokens for row in zip(*ranks, strict=True) for batch in row]
    assert torch.cat(together).equal(whole)


def loaded(workers: int, **settings: Any) -> list[Batch]:
    sequences, _ = rows_of()
    module = TextDataModule(stream(**settings), sequences, [0], 1, workers)
    return list(islice(module.train_dataloader(), 9))


def test_loading_processes_change_nothing() -> None:
    """Between the repeats of a batch too."""
    settings = {"rank": 1, "world_size": 2, "repeats": 2, "start_micro_step": 3}
    expected = batches(9, **settings)
    for workers in (0, 2):
        assert all_same(loaded(workers, **settings), expected)


def test_a_stream_can_be_sent_to_another_process() -> None:
    copied = pickle.loads(pickle.dumps(stream(start_micro_step=5)))
    assert all_same(list(islice(copied, 5)), batches(10)[5:])


@pytest.mark.parametrize(("batch_sequences", "world_size"), [(12, 1), (3, 1), (1, 4), (3, 2)])
def test_shares_are_of_the_targets_of_all_processes(batch_sequences: int, world_size: int) -> None:
    """The mean over a step's batches of share x mean is the mean over its targets."""
    settings = {"batch_sequences": batch_sequences, "world_size": world_size}
    micro_batches = 12 // batch_sequences // world_size
    for step in range(4):
        found = []
        for rank in range(world_size):
            first = step * micro_batches
            found += batches(micro_batches, rank=rank, start_micro_step=first, **settings)
        counts = np.array([batch.target_count for batch in found])
        shares = np.array([batch.share for batch in found])
        np.testing.assert_allclose(shares, counts * len(found) / counts.sum())
        assert shares.mean() == pytest.approx(1.0)
    assert batch_sequences == 12 or len(set(shares.tolist())) > 1, "rows differ in padding"


@given(parts_of(longest=12), st.sampled_from(["best_fit", "none", "concat"]), st.data())
def test_any_split_of_a_step_has_its_mean(
    parts: list[list[Document]], packing: str, data: st.DataObject
) -> None:
    """Of any numbers that targets may have: marks, padding, and rows with a single target."""
    store = MemoryStore(parts)
    rows, (slices,) = rows_of([store], packing)
    if not sum(slices):
        return
    order = StageOrder({"a": SourceOrder("a", slices, 0, "s", 0)}, {"a": 1.0}, 0, "s")
    size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    step = data.draw(st.integers(0, 3))
    start = step * 12 // size
    found = SequenceStream(order, rows, batch_sequences=size, step_sequences=12,
                           start_micro_step=start)  # fmt: skip
    split = list(islice(found, 12 // size))
    (whole,) = islice(
        SequenceStream(order, rows, batch_sequences=12, step_sequences=12, start_micro_step=step), 1
    )
    assert whole.share == 1.0
    means = [batch.share * mean_square(batch) for batch in split]
    assert sum(means) / len(means) == pytest.approx(mean_square(whole))


def mean_square(batch: Batch) -> float:
    targets = batch.targets if batch.counted is None else batch.targets[batch.counted]
    return float(targets.double().square().mean())


def loss_of(parent: Any, batch: Batch) -> Tensor:
    hidden = parent(batch.inputs, None, batch.documents).flatten(0, 1)
    head = hidden, parent.head_weight(None)
    terms = token_terms(head, None, batch.targets, ObjectiveConfig(chunk_tokens=5), batch.counted)
    return batch.share * terms["total"]


@pytest.mark.parametrize("batch_sequences", [1, 2, 3])
def test_a_split_step_has_the_loss_and_gradients_of_the_whole(batch_sequences: int) -> None:
    """Of a parent, with padding, several documents in a row, and prompts that are no targets."""
    parent = random_parent(tiny_shape())
    random = np.random.default_rng(0)
    documents, vocabulary = [], parent.shape.vocab_size
    for size in random.integers(1, 20, 30).tolist():
        ids = tuple(random.integers(0, vocabulary, size).tolist())
        documents.append(Document(ids, tuple((random.random(size) < 0.6).tolist())))
    rows, (slices,) = rows_of([MemoryStore([documents])])
    order = StageOrder({"a": SourceOrder("a", slices, 0, "s", 0)}, {"a": 1.0}, 0, "s")

    def step(size: int) -> Tensor:
        found = islice(
            SequenceStream(order, rows, batch_sequences=size, step_sequences=6), 6 // size
        )
        losses = [loss_of(parent, batch) for batch in found]
        assert size == 6 or len({round(loss.item(), 4) for loss in losses}) > 1
        return torch.stack(losses).mean()

    whole, split = step(6), step(batch_sequences)
    assert split.item() == pytest.approx(whole.item(), rel=1e-5)
    assert_gradients_near(gradients(parent, split), gradients(parent, whole))


def test_a_token_that_the_vocabulary_lacks_is_named_with_its_source() -> None:
    """The row that has it; the others, and any token where no vocabulary is given, pass."""
    store = MemoryStore([numbered([9, 9])])
    rows, _ = rows_of([store], "none", vocabulary=17)
    assert rows[0].tokens.tolist() == list(range(9))
    with pytest.raises(ConfigError, match=r"has token 17, the parent's vocabulary is 17; it is"):
        rows[1]
    for vocabulary in (None, 18):
        assert rows_of([store], "none", vocabulary)[0][1].tokens.max() == 17


def test_rows_without_padding_count_all() -> None:
    rows = [Row(np.arange(5), np.zeros(4, np.int32), np.ones(4, np.bool_)) for _ in range(2)]
    batch = batch_of(rows)
    assert batch.counted is None and batch.target_count == 8 and batch.share == 1.0
    plain = one_document(torch.arange(10).view(2, 5))
    assert plain.counted is None and plain.documents.tolist() == [[0] * 4] * 2


def test_parts_of_a_batch_are_its_rows() -> None:
    (batch,) = batches(1)
    assert batch.first(2).tokens.equal(batch.tokens[:2]) and len(batch.first(2)) == 2
    halves = batch.split(2)
    assert torch.cat([half.tokens for half in halves]).equal(batch.tokens)
    assert torch.cat([half.documents for half in halves]).equal(batch.documents)
    moved = batch.to(torch.device("cpu"))
    assert same(moved, batch) and moved is not batch


# Validation


def packed(rows: int) -> Packed:
    return pack(MemoryStore([numbered([LENGTH + 1] * rows)]), np.arange(rows), LENGTH, "none")


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (7, 7), (50, 50), (80, 50)])
def test_validation_is_fixed_and_spread_evenly(asked: int, given: int) -> None:
    keys = spread({"a": packed(50)}, {"a": 1.0}, asked)
    assert len(keys) == given and keys[0] == 0
    gaps = np.diff([*keys, 50])
    assert gaps.min() >= 50 // given and gaps.max() <= -(-50 // given)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(0, 100),
)
def test_held_out_rows_are_of_every_source_by_its_share(
    sizes: list[int], count: int, seed: int
) -> None:
    """One at least of each that has a share, no row twice, and no more than were asked for where
    they are enough for that."""
    weights = np.random.default_rng(seed).random(len(sizes)).round()
    weights *= np.random.default_rng(seed + 1).lognormal(0, 2, len(sizes))
    if not weights.any():
        return
    names = [str(n) for n in range(len(sizes))]
    shares = dict(zip(names, (weights / weights.sum()).tolist(), strict=True))
    packs = {name: packed(size) for name, size in zip(names, sizes, strict=True)}
    keys = spread(packs, shares, count)
    assert keys == sorted(set(keys))
    drawn = [n for n, size in enumerate(sizes) if size and weights[n]]
    sources = [key >> SOURCE_BITS for key in keys]
    assert set(sources) == set(drawn)
    assert len(keys) <= max(count, len(drawn))
    for key, source in zip(keys, sources, strict=True):
        assert key - (source << SOURCE_BITS) < sizes[source]
    for n in drawn:
        wanted = shares[names[n]] * count
        assert sources.count(n) < wanted + 2
        assert sources.count(n) == sizes[n] or sources.count(n) > wanted - 1 - len(drawn)
    if set(drawn) == set(np.flatnonzero(weights)) and min(sizes[n] for n in drawn) >= count:
        assert len(keys) == max(count, len(drawn))


def test_every_rank_measures_the_same_rows() -> None:
    sequences, _ = rows_of()
    keys = spread(dict(zip("ab", sequences.packs, strict=True)), {"a": 0.5, "b": 0.5}, 7)
    module = TextDataModule(stream(), sequences, keys, 3)
    other = TextDataModule(stream(rank=1, world_size=2, seed=9), sequences, keys, 3)
    found = list(module.val_dataloader())
    assert all_same(found, list(other.val_dataloader())) and [len(each) for each in found] == [
        3,
        3,
        1,
    ]
    rows = batch_of([sequences[key] for key in keys])
    assert torch.cat([each.tokens for each in found]).equal(rows.tokens)
    assert all(each.share == 1.0 for each in found)


class Recorder(L.LightningModule):
    """Keeps what Lightning hands to a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


@pytest.mark.filterwarnings("ignore")
def test_lightning_passes_the_stream_on_unchanged() -> None:
    module = Recorder()
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    sequences, _ = rows_of()
    trainer.fit(module, datamodule=TextDataModule(stream(start_micro_step=2), sequences, [0], 1))
    assert all_same(module.batches, batches(5)[2:])


def test_share_is_no_field_that_is_forgotten() -> None:
    """A batch that is moved or pinned weighs what it weighed."""
    batch = replace(batches(1)[0], share=0.25)
    assert batch.to(torch.device("cpu")).share == 0.25
