"""Stores that a run must not read, each told in one line with its value and the way out."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import STDLIB
from helpers.strategies import random_parent
from helpers.teacher_caches import Case

from elastic.config import ConfigError
from elastic.data import one_document
from elastic.parent.weights import save_parent
from elastic.teacher import CachedTeacher
from elastic.teacher.cache.index import INDEX, checkpoint_fingerprint
from elastic.teacher.cache.shards import ShardSet
from elastic.teacher.cache.write import write_cache

CPU = torch.device("cpu")
EXTRA = "{tokens: 512, sequence_length: 64, batch_tokens: 512, model_lr: 1}"


@pytest.fixture
def copy(case: Case, tmp_path: Path) -> Path:
    """The written cache, to damage."""
    return shutil.copytree(case.cache, tmp_path / "cache")


def refusal(action: Callable[[], object], cache: Path) -> str:
    """The one line of an error; it names the cache."""
    with pytest.raises(ConfigError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line and f"objective.teacher_cache={cache}: " in line
    return line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("objective.top_k=6", ["objective.top_k is 6 here and 7 in the cache; set that"]),
        ("objective.temperature=1", ["objective.temperature is 1.0 here and 1.5 in the cache"]),
        ("seed=1", ["seed is 1 here and 0 in the cache"]),
        ("data.packing=concat", ["the text is ", "restore data.*"]),
        ("data.sources.more.weight=3", ["the order of the text in stage short is"]),
        ("+curriculum.stages.long.weights={files: 1}", ["the order of the text in stage long is"]),
        ("data.validation_every=null", ["the text is ", "restore data.*"]),
        ("data.validation_sequences=7", ["data.validation_sequences", "is 7 here and 8"]),
        ("curriculum.stages.long.sequence_length=128", ["sequence_length is 128 here and 64"]),
        ("curriculum.stages.long.tokens=9999", ["has 16 sequences", "stage long", "reads 50"]),
        (f"+curriculum.stages.extra={EXTRA}", ["has 0 sequences", "stage extra"]),
    ],
)  # fmt: skip
def test_a_store_of_another_run_is_refused(
    change: str, words: list[str], case: Case, make: Callable[..., Case]
) -> None:
    wanted = make(change).wanted()
    line = refusal(lambda: case.read(case.cache, wanted), case.cache)
    for word in (*words, "elastic cache-teacher"):
        assert word in line


def test_a_stage_of_another_name_has_another_order(case: Case) -> None:
    """Guards the hash of the order: its permutation is seeded by the stage's name."""
    wanted = case.wanted()
    orders = {stage.order for stage in wanted.stages.values()}
    assert len(orders) == 2
    swapped = dict(wanted.stages)
    swapped["short"] = dataclasses.replace(swapped["short"], order=swapped["long"].order)
    other = dataclasses.replace(wanted, stages=swapped)
    line = refusal(lambda: case.read(case.cache, other), case.cache)
    assert "the order of the text in stage short" in line


def test_text_that_changed_is_noticed(case: Case, make: Callable[..., Case]) -> None:
    """By its tokens, whatever its settings are."""
    other = make(f"data.path='{STDLIB}/email/mime/[abmn]*.py'").wanted()
    line = refusal(lambda: case.read(case.cache, other), case.cache)
    assert f"the text is {other.text} here and {case.wanted().text} in the cache" in line


def test_a_store_of_another_teacher_is_refused(case: Case, tmp_path: Path) -> None:
    assert case.config.parent.shape is not None
    save_parent(random_parent(case.config.parent.shape, seed=5), tmp_path)
    wanted = dataclasses.replace(case, teacher=tmp_path).wanted()
    line = refusal(lambda: case.read(case.cache, wanted), case.cache)
    assert "the teacher is " in line and "use the parent that" in line


def test_a_fingerprint_sees_config_names_sizes_and_samples(case: Case, tmp_path: Path) -> None:
    """And no path or time: a copied checkpoint is the same teacher."""
    known = checkpoint_fingerprint(case.teacher)
    copied = shutil.copytree(case.teacher, tmp_path / "copy")
    assert checkpoint_fingerprint(copied) == known
    weights = copied / "model.safetensors"
    original = weights.read_bytes()
    for place in (8, len(original) // 2, len(original) - 1):
        changed = bytearray(original)
        changed[place] ^= 1
        weights.write_bytes(changed)
        assert checkpoint_fingerprint(copied) != known
    weights.write_bytes(original)
    (copied / "config.json").write_text("{}")
    assert checkpoint_fingerprint(copied) != known


def test_of_a_large_file_the_fingerprint_reads_samples(tmp_path: Path) -> None:
    """The ends among them; a hole takes no place on disk."""
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 30)
    known = checkpoint_fingerprint(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    assert checkpoint_fingerprint(tmp_path) != known


def test_a_missing_index_is_refused(case: Case, tmp_path: Path) -> None:
    line = refusal(lambda: case.read(tmp_path), tmp_path)
    assert "cache.json is not there" in line and "elastic cache-teacher" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 3, "contents": {"top_k": 3}}', "is damaged"),
        ('{"format_version": 1}', "format_version=1, this version reads 3"),
    ],
)
def test_a_damaged_index_is_refused(text: str, words: str, case: Case, copy: Path) -> None:
    (copy / INDEX).write_text(text)
    assert words in refusal(lambda: case.read(copy), copy)


def shard(cache: Path, number: int = 1) -> Path:
    return cache / "short" / "train" / f"{number:06d}.safetensors"


def test_missing_files_are_named(case: Case, copy: Path) -> None:
    for number in (0, 1, 2, 3):
        shard(copy, number).unlink()
    line = refusal(lambda: case.read(copy), copy)
    assert "4 files are missing, short/train/000000.safetensors, " in line and "..." in line
    CachedTeacher(copy, case.wanted(), {}, thorough=False)  # another process has looked


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_refused_at_the_start(kept: int, case: Case, copy: Path) -> None:
    shard(copy).write_bytes(shard(copy).read_bytes()[:kept])
    line = refusal(lambda: case.read(copy), copy)
    assert "short/train/000001.safetensors is truncated, at " in line and "delete it" in line


def test_a_file_of_another_store_is_refused(
    case: Case, copy: Path, make: Callable[..., Case]
) -> None:
    other = make("objective.temperature=1", f"objective.teacher_cache='{copy.parent}/other'")
    write_cache(other.config)
    shutil.copy(shard(other.cache), shard(copy))
    line = refusal(lambda: case.read(copy), copy)
    assert "was written for another cache or place" in line


def test_a_file_in_the_place_of_another_is_refused(case: Case, copy: Path) -> None:
    """Of the same cache, with the same number of sequences."""
    shutil.copy(shard(copy, 2), shard(copy, 1))
    line = refusal(lambda: case.read(copy), copy)
    assert "was written for another cache or place" in line


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["indices", "log_probs", "text_log_probs", "text", "sha256"])
def test_a_flipped_bit_is_noticed_when_its_sequence_is_read(
    part: str, case: Case, copy: Path
) -> None:
    """And in no other sequence, which needs no other bytes."""
    shards = case.read(copy).shard_sets["short", "train"]
    array = shards.open(1)[part]
    row, size = 7, array[0].nbytes
    flip(shard(copy), array.offset + row * size + size // 2)  # type: ignore[attr-defined]
    stored = case.read(copy)
    stored.start(CPU, "short")
    places = stored.places["short"].tolist()
    batch = one_document(torch.zeros((1, 33), dtype=torch.int64))
    for other in (row - 1, row + 1):
        stored.cross_entropy("train", places.index(20 + other), batch)
    place = places.index(20 + row)
    line = refusal(lambda: stored.cross_entropy("train", place, batch), copy)
    assert "000001.safetensors is damaged, by the checksum of its sequence 7; delete it" in line


def test_no_flipped_bit_of_a_header_goes_unnoticed(case: Case, copy: Path) -> None:
    """Refused, or still read for what it is."""
    path = shard(copy)
    whole = path.read_bytes()
    shards = case.read(copy).shard_sets["short", "train"]
    length = int.from_bytes(whole[:8], "little")
    expected = {name: array.tobytes() for name, array in shards.open(1).items()}
    noticed = 0
    for place in range(8 + length):
        flip(path, place)
        if shards.fault(1) is not None:
            noticed += 1
        else:
            found = {name: array.tobytes() for name, array in shards.open(1).items()}
            assert found == expected, whole[place : place + 1]
        path.write_bytes(whole)
    assert noticed > length / 2


def test_the_text_of_a_stage_is_that_of_its_run(case: Case) -> None:
    """What writer and reader take for the text is what the run trains on: later stages go on in the
    text where the earlier ones were, the one without a teacher too."""
    text = case.text("long")
    assert text.stream.sequences.sequence_length == 64 and len(text.validation) == 8
    assert json.loads((case.cache / INDEX).read_text())["contents"]["stages"]["long"]["train"] == 16
    assert isinstance(case.reader().shard_sets["long", "validation"], ShardSet)
    begins = {
        name: [source.begin for source in case.text(name).stream.order.sources if source]
        for name in case.stages
    }
    assert begins["pretrain"] == [0, 0] and min(begins["short"]) > 0
    assert all(a > b for a, b in zip(begins["long"], begins["short"], strict=True))
