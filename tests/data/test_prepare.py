"""Preparing writes nothing; what was saved is found again, and only when it still fits."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from elastic.config import ConfigError, DataConfig
from elastic.data import prepare
from elastic.data.prepare import PreparedData, prepare_data
from elastic.data.tokenizer import train_tokenizer


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"document number {i}\n" * 20)
    return DataConfig(
        source="files", path=str(tmp_path / "*.txt"), validation_every=2, tokenizer_vocab=300
    )


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("read the text again")

    monkeypatch.setattr(prepare, "load_corpus", fail)


def assert_same(one: PreparedData, other: PreparedData) -> None:
    np.testing.assert_array_equal(one.train, other.train)
    np.testing.assert_array_equal(one.validation, other.validation)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert one.fingerprint == other.fingerprint


def test_preparing_writes_nothing_and_is_deterministic(config: DataConfig, tmp_path: Path) -> None:
    run = tmp_path / "run" / "data"
    prepared = prepare_data(config, run, None)
    assert not run.parent.exists()
    assert_same(prepared, prepare_data(config, run, None))
    assert prepared.tokenizer.decode(prepared.validation).count("document number 1") == 20


def test_what_was_saved_is_used_again(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_data(config, tmp_path / "data", None)
    prepared.save(tmp_path / "data")
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert names == ["data.json", "tokenizer", "train.npy", "validation.npy"]
    forbid_work(monkeypatch)
    # how much is validated says nothing about the tokens
    found = prepare_data(
        replace(config, validation_sequences=5, separate_documents=True), tmp_path / "data", None
    )
    assert_same(prepared, found)
    assert isinstance(found.train, np.memmap)
    before = (tmp_path / "data" / "train.npy").stat().st_mtime_ns
    found.save(tmp_path / "data")  # a resumed run saves what it has found
    assert (tmp_path / "data" / "train.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["settings", "text", "lost file", "broken json"])
def test_what_no_longer_fits_is_made_again(config: DataConfig, tmp_path: Path, change: str) -> None:
    run = tmp_path / "data"
    old = prepare_data(config, run, None)
    old.save(run)
    if change == "settings":
        config = replace(config, tokenizer_vocab=280)
    elif change == "text":
        (tmp_path / "2.txt").write_text("other words")
    elif change == "lost file":
        (run / "validation.npy").unlink()
    else:
        (run / "data.json").write_text("{")
    new = prepare_data(config, run, None)
    assert not isinstance(new.train, np.memmap)
    assert (new.fingerprint == old.fingerprint) == (change not in ("settings", "text"))
    new.save(run)
    again = prepare_data(config, run, None)
    assert_same(new, again)
    assert isinstance(again.train, np.memmap)


def test_a_save_that_is_cut_short_vouches_for_nothing(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old data.json beside new tokens would be believed by a run with the old settings."""
    run = tmp_path / "data"
    prepare_data(config, run, None).save(run)
    new = prepare_data(replace(config, tokenizer_vocab=280), run, None)
    monkeypatch.setattr(prepare, "write_json", lambda path, value: None)
    new.save(run)
    assert not isinstance(prepare_data(config, run, None).train, np.memmap)


def test_a_tokenizer_can_come_from_the_parent_or_a_path(config: DataConfig, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    train_tokenizer(["other text altogether"], 265).save_pretrained(parent)
    by_parent = prepare_data(replace(config, tokenizer="parent"), tmp_path / "d", str(parent))
    by_path = prepare_data(replace(config, tokenizer=str(parent)), tmp_path / "d", None)
    assert len(by_parent.tokenizer) == len(by_path.tokenizer) == 265
    np.testing.assert_array_equal(by_parent.train, by_path.train)
    train_tokenizer(["and now this"], 265).save_pretrained(parent)
    changed = prepare_data(replace(config, tokenizer="parent"), tmp_path / "d", str(parent))
    assert changed.fingerprint != by_parent.fingerprint


@pytest.mark.parametrize("parent", [None, "nowhere"])
def test_a_parent_without_a_tokenizer_is_refused(
    config: DataConfig, tmp_path: Path, parent: str | None
) -> None:
    path = parent and str(tmp_path / parent)
    with pytest.raises(ConfigError, match=r"parent\.path"):
        prepare_data(replace(config, tokenizer="parent"), tmp_path / "d", path)


def test_an_empty_part_is_refused(config: DataConfig, tmp_path: Path) -> None:
    for name in ("1.txt", "3.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="every document of the validation part is empty"):
        prepare_data(config, tmp_path / "d", None)
