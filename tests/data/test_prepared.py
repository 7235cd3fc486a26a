"""Splits share no document, rows are packed once, and a stage reads what its weights say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.stores import Document, MemoryStore, flip, numbered, parts_of, prepared
from helpers.texts import numbered_texts, text_config
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ConfigError, DataConfig, SourceConfig
from elastic.data import sources
from elastic.data.batches import Batch
from elastic.data.order import SOURCE_BITS
from elastic.data.prepare import open_prepared, prepare_data
from elastic.data.prepared import SPLITS, PreparedData, StageText, stage_text


def stage(name: str, length: int, count: int, **weights: float) -> StageText:
    return StageText(name, length, count, weights or None)


def lengths(seed: int, count: int, longest: int = 30) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


def memory(parts: int, documents: int, first: int = 0, longest: int = 30) -> MemoryStore:
    """Documents whose tokens come once."""
    found, begin = [], first
    for part in range(parts):
        found.append(numbered(lengths(part + first, documents, longest), begin))
        begin += sum(map(len, found[-1]))
    return MemoryStore(found)


# Splits


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda s: sum(s) >= 4),
       st.sampled_from([None, 2, 3, 7]))  # fmt: skip
def test_splits_share_no_document_and_have_all(sizes: list[int], every: int | None) -> None:
    total = sum(sizes)
    if every is not None and total < 2 * every:
        return
    data = prepared(MemoryStore([numbered([2] * size) for size in sizes]), validation_every=every)
    found = {split: data.documents("a", split).tolist() for split in SPLITS}
    assert sorted(sum(found.values(), [])) == list(range(total))
    assert all(found.values()) and all(part == sorted(part) for part in found.values())
    held_out = sorted(found["validation"] + found["report"])
    step = data.every("a")
    assert held_out == list(range(step - 1, total, step))
    assert found["validation"] == held_out[::2] and found["report"] == held_out[1::2]
    slices = [each.tolist() for each in data._train_slices("a")]
    assert sorted(sum(slices, [])) == found["train"]


def test_a_record_of_several_documents_is_in_one_split(tmp_path: Path) -> None:
    """Turns of one conversation know one another's words."""
    turns = [
        [Document((n,), (True,), new=turn == 0) for turn in range(n % 3 + 1)] for n in range(40)
    ]
    flat = [each for record in turns for each in record]
    data = prepared(MemoryStore([flat[:31], flat[31:]] if flat[31].new else [flat]))
    store = data.stores["a"]
    groups = np.concatenate([store.group_numbers(part) for part in range(len(store.directories))])
    owner: dict[int, str] = {}
    for split in SPLITS:
        for group in groups[data.documents("a", split)].tolist():
            assert owner.setdefault(group, split) == split
    assert len(owner) == 40 and [split for _, split in sorted(owner.items())][4::5] == [
        "validation", "report", "validation", "report", "validation", "report", "validation",
        "report",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("documents", "every"), [(4, 2), (9, 4), (10, 5), (299, 5), (600, 10), (10**5, 1000)]
)
def test_small_sources_hold_out_more(documents: int, every: int) -> None:
    data = prepared(MemoryStore([numbered([1] * documents)]), validation_every=None)
    assert data.every("a") == every
    assert len(data.documents("a", "validation")) and len(data.documents("a", "report"))


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_too_few_documents_are_refused(documents: int) -> None:
    data = prepared(MemoryStore([numbered([1] * documents)]), validation_every=None)
    with pytest.raises(ConfigError, match=rf"the source a has only {documents} document\(s\)"):
        data.every("a")


# Rows of training text


@given(parts_of(longest=20, most=20), st.integers(1, 12), st.sampled_from(["best_fit", "concat"]))
def test_training_rows_have_all_training_targets(
    parts: list[list[Document]], length: int, packing: str
) -> None:
    """And none of what is held out: slices that are empty, documents of one token and all."""
    documents = sum(map(len, parts))
    if documents < 4:
        return
    data = prepared(MemoryStore(parts), validation_every=2, packing=packing)
    flat = [each for part in parts for each in part]
    chosen = [flat[number] for number in data.documents("a", "train")]
    wanted = sum(sum(each.targets[1:]) for each in chosen)
    tokens = {token for each in chosen for token in each.ids}
    pack = data.train_pack("a", length)
    assert sum(pack.slice_rows) == len(pack.packed) and len(pack.slice_rows) == len(parts)
    assert int(pack.packed.targets.sum()) == wanted
    assert data.train_tokens == {"a": sum(map(len, chosen))}
    rows = data.sequences(length)
    for row in range(len(pack.packed)):
        size = int(pack.packed.tokens[row])
        assert set(rows[row].tokens[:size].tolist()) <= tokens


def test_many_parts_are_a_few_slices_each_packed_by_itself() -> None:
    data = prepared(memory(200, 3), validation_every=5)
    parts = data._slice_parts("a")
    assert len(parts) == 64 and sorted(sum(parts, [])) == list(range(200))
    assert max(map(len, parts)) == 4 and min(map(len, parts)) == 3
    pack, store = data.train_pack("a", 16), data.stores["a"]
    ends = np.cumsum([0, *pack.slice_rows])
    for number, numbers in enumerate(parts):
        rows = slice(pack.packed.rows[ends[number]], pack.packed.rows[ends[number + 1]])
        owners = np.searchsorted(store.token_offsets, pack.packed.starts[rows], "right") - 1
        assert set(owners.tolist()) <= set(numbers)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Two sources of several parts."""
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    numbered_texts(tmp_path / "a.jsonl", 120)
    numbered_texts(tmp_path / "b.jsonl", 40, first=1000)
    return text_config(tmp_path / "a.jsonl", tmp_path / "b.jsonl", validation_every=5)


STAGES = [stage("short", 16, 60), stage("long", 40, 30)]


def test_rows_are_packed_once_and_read_by_all(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another length are packed from the tokens that are there."""
    data = prepare_data(config, tmp_path / "run", None)
    data.store_packs(STAGES)
    packs = tmp_path / "run" / "data" / "packs"
    times = {path: path.stat().st_mtime_ns for path in packs.iterdir()}
    assert sorted(path.name.rsplit("-", 1)[0] for path in times) == ["a-16", "a-40", "b-16", "b-40"]
    monkeypatch.setattr("elastic.data.prepare.make", None)
    parts = {path: path.stat().st_mtime_ns for path in (packs.parent / "parts").rglob("*")}
    again = prepare_data(config, tmp_path / "run", None)
    again.store_packs([*STAGES, stage("longer", 64, 4)])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list(packs.iterdir())) == 6
    assert {path: path.stat().st_mtime_ns for path in (packs.parent / "parts").rglob("*")} == parts
    with monkeypatch.context() as patch:
        patch.setattr("elastic.data.prepared.pack", None)
        read = open_prepared(config, tmp_path / "run")
        for length in (16, 40, 64):
            for name in "ab":
                one, two = read.train_pack(name, length), data.train_pack(name, length)
                assert one.slice_rows == two.slice_rows
                for field in ("rows", "starts", "lengths", "targets"):
                    assert (getattr(one.packed, field) == getattr(two.packed, field)).all()


def test_rows_of_other_settings_are_not_taken(config: DataConfig, tmp_path: Path) -> None:
    data = prepare_data(config, tmp_path / "run", None)
    data.store_packs(STAGES[:1])
    names = {path.name for path in (tmp_path / "run" / "data" / "packs").iterdir()}
    for change in ({"packing": "concat"}, {"packing": "none"}, {"validation_every": 3}):
        other = replace(data, config=replace(config, **change), _packs={})  # type: ignore[arg-type]
        other.store_packs(STAGES[:1])
        new = {path.name for path in (tmp_path / "run" / "data" / "packs").iterdir()}
        assert len(new) == len(names) + 2
        names = new


@pytest.mark.parametrize(
    "name", ["rows", "starts", "lengths", "targets", "pack.json", "seals.json"]
)
@pytest.mark.parametrize("kind", ["bit", "cut", "gone"])
def test_damaged_rows_are_packed_again(
    config: DataConfig, tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """To the same bytes; a process that may not write packs them for itself."""
    data = prepare_data(config, tmp_path / "run", None)
    data.store_packs(STAGES[:1])
    whole = data.train_pack("a", 16)
    (directory,) = (tmp_path / "run" / "data" / "packs").glob("a-16-*")
    path = directory / (name if "." in name else f"{name}.npy")
    before = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(before[:-3])
    else:
        flip(path, -4)
    again = prepare_data(config, tmp_path / "run", None)
    assert again.train_pack("a", 16).slice_rows == whole.slice_rows
    assert (again.train_pack("a", 16).packed.starts == whole.packed.starts).all()
    assert "is packed again" in caplog.text or (name, kind) == ("seals.json", "gone")
    writer = prepare_data(config, tmp_path / "run", None)
    writer.store_packs(STAGES[:1])
    assert path.read_bytes() == before


# Stages


def keys(data: PreparedData, stages: Sequence[StageText], name: str, seed: int = 0) -> np.ndarray:
    (found,) = [each for each in stages if each.name == name]
    return data.order(stages, name, seed).keys(0, found.sequences)


def test_sources_have_their_tokens_weights_or_the_stage_s() -> None:
    stores = memory(3, 40), memory(2, 30, 10**4)
    plain = prepared(*stores)
    tokens = plain.train_tokens
    total = sum(tokens.values())
    assert plain.shares(None) == {"a": tokens["a"] / total, "b": tokens["b"] / total}
    weighted = prepared(*stores, weights=[3, 1])
    assert weighted.shares(None) == {"a": 0.75, "b": 0.25}
    assert weighted.shares({"b": 2, "a": 2}) == {"a": 0.5, "b": 0.5}
    assert weighted.shares({"b": 0.1}) == {"a": 0.0, "b": 1.0}
    stages = [
        stage("short", 16, 2560),
        stage("mixed", 16, 2560, a=1, b=9),
        stage("one", 16, 512, b=1),
    ]
    for name, share in (("short", 0.25), ("mixed", 0.9), ("one", 1.0)):
        drawn = keys(weighted, stages, name) >> SOURCE_BITS
        assert (drawn == 1).mean() == pytest.approx(share, abs=1 / 2560)


def batches(data: PreparedData, stages: Sequence[StageText], name: str) -> list[Batch]:
    (found,) = [each for each in stages if each.name == name]
    text = stage_text(data, stages, name, seed=0, batch_sequences=4, step_sequences=8)
    stream = iter(text.train_dataloader())
    return [*(next(stream) for _ in range(found.sequences // 4)), *text.val_dataloader()]


def test_a_stage_of_one_source_never_sees_another() -> None:
    """In training or in validation, though what is held out of it is little."""
    border = 10**4
    data = prepared(memory(3, 60), memory(2, 30, border), validation_sequences=40)
    stages = [stage("both", 16, 64), stage("a", 16, 64, a=1), stage("b", 16, 64, b=1)]
    for name, sides in (("a", {False}), ("b", {True}), ("both", {False, True})):
        found: set[bool] = set()
        for batch in batches(data, stages, name):
            tokens = batch.tokens[batch.tokens > 0]
            found |= set((tokens >= border).tolist())
        assert found == sides


def test_weights_of_a_stage_do_not_move_the_others_texts() -> None:
    """Where a stage begins depends on what those before it have read of each source."""
    data = prepared(memory(80, 5), memory(80, 5, 10**5))
    first = stage("first", 16, 40)
    plain = keys(data, [first, stage("second", 16, 40)], "second")
    assert (
        keys(data, [first, stage("second", 16, 40)], "first") == keys(data, [first], "first")
    ).all()
    without = [replace(first, weights={"a": 1.0}), stage("second", 16, 40)]
    assert plain.tolist() != keys(data, without, "second").tolist()
    order = data.order(without, "second", 0)
    starts = {s.name: s.begin for s in order.sources if s is not None}
    assert starts["a"] > 0 and starts["b"] == 0


@given(st.integers(0, 5), st.sampled_from(["best_fit", "concat", "none"]))
def test_no_document_comes_twice_before_its_epoch_ends(seed: int, packing: str) -> None:
    """Over stages that pack it to different lengths, while slices last."""
    data = prepared(memory(64, 6, longest=12), packing=packing)
    stages = [stage("short", 8, 60), stage("long", 24, 20), stage("longer", 30, 15)]
    seen: dict[int, str] = {}
    for each in stages:
        rows = data.sequences(each.sequence_length)
        found = {
            document
            for key in keys(data, stages, each.name, seed).tolist()
            for document in rows.documents(key).tolist()
            if document >= 0
        }
        assert not found & seen.keys()
        seen |= dict.fromkeys(found, each.name)
    assert len(set(seen.values())) == 3


def test_a_source_that_is_drawn_from_must_have_rows() -> None:
    """A document of one token has no target; where no stage wants it, it may be there."""
    silent = MemoryStore([numbered([1] * 20)])
    data = prepared(memory(2, 30), silent)
    stages = [stage("short", 16, 8)]
    with pytest.raises(ConfigError, match=r"^data\.sources\.b: has no training text; must have .*"
                                          r"curriculum\.stages\.short\.weights$"):  # fmt: skip
        data.order(stages, "short", 0)
    alone = [stage("short", 16, 8, a=1), stage("long", 32, 8, a=1)]
    assert set((keys(data, alone, "long") >> SOURCE_BITS).tolist()) == {0}
    assert len(batches(data, alone, "short")) > 2


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_a_sequence_longer_than_the_training_text_is_refused(packing: str) -> None:
    data = prepared(MemoryStore([numbered([10] * 10)]), packing=packing)
    assert data.train_tokens == {"a": 80}
    keys(data, [stage("short", 80, 4)], "short")
    message = r"^curriculum\.stages\.short\.sequence_length=81: .* training text, .* 80 tokens"
    with pytest.raises(ConfigError, match=message):
        data.order([stage("short", 81, 4)], "short", 0)


def test_held_out_rows_are_of_their_split(config: DataConfig, tmp_path: Path) -> None:
    data = prepare_data(config, tmp_path / "run", None)
    for packing in (None, "none", "concat"):
        for split in SPLITS[1:]:
            rows, found = data.held_out_rows(split, 16, 12, packing)
            assert found and len(found) <= 12
            for key in found:
                source = "ab"[key >> SOURCE_BITS]
                documents = {n for n in rows.documents(key).tolist() if n >= 0}
                assert documents <= set(data.documents(source, split).tolist())


def test_held_out_text_without_a_target_is_refused() -> None:
    """No loss could be measured on it."""
    silent = [numbered([1 if n % 5 == 4 else 9], 100 * n)[0] for n in range(20)]
    data = prepared(MemoryStore([silent]))
    message = r"^data\.validation_every=5: no document that is held out as \w+ text has a token to"
    for split in SPLITS[1:]:
        with pytest.raises(ConfigError, match=message):
            data.held_out_rows(split, 16, 4)
    with pytest.raises(ConfigError, match=message):
        batches(data, [stage("short", 16, 8)], "short")


# What a parent is ranked on


@pytest.mark.parametrize("parts", [1, 2, 30])
def test_calibration_rows_are_full_and_as_many_as_there_are(parts: int) -> None:
    """However little is in the first of the text's slices."""
    data = prepared(memory(parts, 12), memory(2, 90, 10**5), weights=[1, 1])
    rows, found = data.calibration(20, 16)
    assert len(found) == 16 or parts == 1
    assert {key >> SOURCE_BITS for key in found} == {0, 1}
    for key in found:
        source = "ab"[key >> SOURCE_BITS]
        assert (rows.documents(key) >= 0).sum() == rows[key].counted.sum()
        documents = rows.documents(key)
        assert set(documents[documents >= 0]) <= set(data.documents(source, "train").tolist())
        assert rows[key].tokens.shape == (21,) and len(set(rows[key].tokens.tolist())) == 21


def test_calibration_looks_beyond_a_slice_that_has_too_little() -> None:
    """The slices come by names; the first may be the end of a file, or empty."""
    for small in range(4):
        parts = [numbered([9] * 60, part * 1000) for part in range(4)]
        parts[small] = parts[small][:1]
        _, found = prepared(MemoryStore(parts)).calibration(20, 24)
        assert len(found) == 24
    _, found = prepared(MemoryStore([numbered([9] * 10)])).calibration(200, 24)
    assert found == []


# End to end


def test_prompts_are_read_and_not_learned(tmp_path: Path) -> None:
    """Of generated problems, the assistant's words alone: every target stands in an answer."""
    source = SourceConfig(kind="arithmetic", problems=60, loss_on="assistant", difficulties=[1])
    config = text_config(source, chat_template="chatml", validation_every=5)
    data = prepare_data(config, tmp_path / "run", None)
    rows = data.sequences(256)
    start, end = (data.tokenizer.convert_tokens_to_ids(f"<|im_{n}|>") for n in ("start", "end"))
    for number in range(len(data.train_pack("a", 256).packed)):
        row = rows[number]
        targets = row.tokens[1:][row.counted]
        assert len(targets) and start not in targets
        text = data.tokenizer.decode(targets)
        assert "user" not in text and "<think>" in text
        # one end of turn of two is the assistant's
        inside = row.tokens[: int(data.train_pack("a", 256).packed.tokens[number])]
        assert (targets == end).sum() * 2 == (inside == end).sum() or len(inside) == 257
    everything = replace(source, loss_on="all")
    plain = prepare_data(text_config(everything, chat_template="chatml"), tmp_path / "other", None)
    assert plain.stores["a"].tokens == data.stores["a"].tokens
    assert plain.stores["a"].digest != data.stores["a"].digest


def test_a_run_that_starts_later_goes_on(config: DataConfig, tmp_path: Path) -> None:
    """Another start, from disk, on other processes: the same batches from there on."""
    data = prepare_data(config, tmp_path / "run", None)
    data.store_packs(STAGES)
    settings: dict[str, Any] = {"seed": 3, "step_sequences": 8}
    text = stage_text(data, STAGES, "long", batch_sequences=2, **settings)
    whole = [batch for batch, _ in zip(text.stream, range(24), strict=False)]
    again = open_prepared(config, tmp_path / "run")
    for rank in range(2):
        late = stage_text(
            again, STAGES, "long", batch_sequences=2, start_micro_step=4, rank=rank, world_size=2,
            **settings,
        )  # fmt: skip
        for number, batch in zip(range(8), late.stream, strict=False):
            expected = whole[8 + 2 * number + rank]
            assert batch.tokens.equal(expected.tokens) and batch.share == expected.share
    assert whole[0].tokens.shape == (2, 41)
