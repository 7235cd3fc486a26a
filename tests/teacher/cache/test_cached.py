"""A teacher's cached top-k log-probabilities against the online teacher that wrote them."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.strategies import random_parent
from helpers.teacher_caches import Case

from elastic.config import ObjectiveConfig
from elastic.data import Batch, batch_of
from elastic.data.batches import SequenceStream
from elastic.data.order import SOURCE_BITS
from elastic.losses import TopK, token_terms
from elastic.parent import HybridParent
from elastic.parent.weights import load_parent
from elastic.teacher import CachedTeacher, OnlineTeacher
from elastic.teacher.cache.write import write_cache

CPU = torch.device("cpu")
SEQUENCES = 4


def online(case: Case) -> OnlineTeacher:
    return OnlineTeacher(load_parent(case.teacher), "32-true")


def losses(case: Case, student: HybridParent, batch: Batch, *output: object) -> list[float]:
    """What a student would minimise, by the outputs of several teachers."""
    head = student(batch.inputs, None, batch.documents).flatten(0, 1), student.head_weight()
    with torch.no_grad():
        terms = [
            token_terms(head, each, batch.targets, case.config.objective, batch.counted)  # type: ignore[arg-type]
            for each in output
        ]
    return [float(each["total"]) for each in terms]


def batches(case: Case, stage: str, world_size: int) -> list[tuple[int, Batch]]:
    """Every micro-batch of a stage as its processes see it, and the place of its first row."""
    stream = case.text(stage).stream
    ranks = [
        SequenceStream(
            stream.order, stream.sequences, batch_sequences=SEQUENCES,
            step_sequences=SEQUENCES * world_size, rank=rank, world_size=world_size,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    rounds = range(case.sequences(stage) // (SEQUENCES * world_size))
    return [
        ((number * world_size + rank) * SEQUENCES, batch)
        for number, row in zip(rounds, zip(*ranks, strict=True), strict=False)
        for rank, batch in enumerate(row)
    ]


def pair(case: Case, stage: str) -> tuple[OnlineTeacher, CachedTeacher]:
    one, two = online(case), case.reader()
    one.start(CPU, stage)
    two.start(CPU, stage)
    return one, two


@pytest.mark.parametrize("stage", ["short", "long"])
def test_every_batch_of_a_run_has_the_loss_of_the_online_teacher(case: Case, stage: str) -> None:
    """Two processes and two sources; several epochs of the short stage, part of one of the long."""
    teacher, cached = pair(case, stage)
    assert case.config.parent.shape is not None
    student = random_parent(case.config.parent.shape, seed=1)
    seen = batches(case, stage, world_size=2)
    keys = case.text(stage).stream.order.keys(0, case.sequences(stage))
    assert len(seen) * SEQUENCES == len(keys) and set((keys >> SOURCE_BITS).tolist()) == {0, 1}
    times = np.unique(keys, return_counts=True)[1]
    assert times.max() >= 3 if stage == "short" else times.max() == 1
    for first, batch in seen:
        outputs = (
            teacher.distributions(batch, "train", first),
            cached.distributions(batch, "train", first),
        )
        expected, found = losses(case, student, batch, *outputs)
        assert found == pytest.approx(expected, rel=1e-6)


def test_validation_has_the_loss_of_the_online_teacher_and_of_its_own_text(case: Case) -> None:
    teacher, cached = pair(case, "long")
    text = case.text("long")
    assert {key >> SOURCE_BITS for key in text.validation} == {0, 1}
    assert case.config.parent.shape is not None
    student = random_parent(case.config.parent.shape, seed=1)
    for first in range(0, len(text.validation), 3):
        batch = batch_of([text.held_out[key] for key in text.validation[first : first + 3]])
        output = teacher.distributions(batch, "validation", first)
        kept = cached.distributions(batch, "validation", first)
        expected, found = losses(case, student, batch, output, kept)
        assert found == pytest.approx(expected, rel=1e-6)
        terms = token_terms(output, None, batch.targets, ObjectiveConfig(), batch.counted)  # type: ignore[arg-type]
        own = cached.cross_entropy("validation", first, batch)
        assert own == pytest.approx(float(terms["cross_entropy"]), rel=1e-6)


def test_a_sequence_is_cached_once_however_often_it_comes(case: Case) -> None:
    cached = case.reader()
    contents = case.wanted().stages
    packs = case.text("short").stream.sequences.packs
    assert contents["short"].train == sum(map(len, packs)) < case.sequences("short") / 2
    assert contents["long"].train == case.sequences("long")
    for stage, length in (("short", 32), ("long", 64)):
        shards = cached.shard_sets[stage, "train"]
        rows = [len(shards.open(number)["text"]) for number in range(shards.count())]
        assert sum(rows) == contents[stage].train and max(rows) <= 20
        assert shards.layout(1)["indices"][1] == (1, length, 7)


def test_half_precision_costs_little(case: Case, make: Callable[..., Case]) -> None:
    """Log-probabilities in float16: three decimals of each, far less of the loss."""
    half = make("cache.log_probs=float16")
    write_cache(half.config)
    assert case.config.parent.shape is not None
    student = random_parent(case.config.parent.shape, seed=1)
    exact, rounded = case.reader(), half.reader()
    errors = []
    for teacher in (exact, rounded):
        teacher.start(CPU, "short")
    for first, batch in itertools.islice(batches(case, "short", 1), 8):
        outputs = [teacher.distributions(batch, "train", first) for teacher in (exact, rounded)]
        assert outputs[1].log_probs.dtype == torch.float16
        expected, found = losses(case, student, batch, *outputs)
        errors.append(abs(found / expected - 1))
    assert 0 < max(errors) < 3e-4, errors


def test_vocabularies_beyond_16_bits_have_wider_indices(case: Case) -> None:
    shards = case.reader().shard_sets["short", "train"]
    small, large = (dataclasses.replace(shards, vocabulary=size) for size in (1 << 16, 131_072))
    assert small.layout(1)["indices"][0] == np.uint16
    assert large.layout(1)["indices"][0] == np.uint32


def test_files_are_mapped_not_loaded(case: Case) -> None:
    cached = case.reader()
    cached.start(CPU, "short")
    (first, batch), *_ = batches(case, "short", 1)
    output = cached.distributions(batch, "train", first)
    assert isinstance(output, TopK) and output.indices.shape == (len(batch.targets), 7)
    arrays = [array for rows in cached._maps.values() for array in rows.values()]
    assert arrays and all(isinstance(array, np.memmap) for array in arrays)


def test_a_cache_of_other_text_is_not_read(case: Case) -> None:
    """The first batch of a stage is held against what was written."""
    _, cached = pair(case, "short")
    (first, batch), (other, _), *_ = batches(case, "short", 1)
    with pytest.raises(AssertionError, match="not the text of this place"):
        cached.distributions(batch, "train", other)
