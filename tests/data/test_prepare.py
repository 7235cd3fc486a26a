"""Preparing writes nothing; what was saved is found again, and only when it still fits."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from elastic.config import ConfigError, DataConfig
from elastic.data import prepare
from elastic.data.packing import Tokens
from elastic.data.prepare import TEXTS, PreparedData, prepare_data
from elastic.data.tokenizer import train_tokenizer
from elastic.storage import seals
from elastic.storage.seals import FileSeal, SealBroken, Seals


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"document number {i}\n" * 20)
    return DataConfig(
        source="files", path=str(tmp_path / "*.txt"), validation_every=2, tokenizer_vocab=300
    )


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("read the text again")

    monkeypatch.setattr(prepare, "load_corpus", fail)


def assert_same(one: PreparedData, other: PreparedData) -> None:
    for name in TEXTS:
        np.testing.assert_array_equal(*(np.asarray(getattr(each, name)) for each in (one, other)))
    assert one.digest == other.digest
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
    prepared = prepare_data(config, tmp_path / "run" / "data", None)
    prepared.save(tmp_path / "run" / "data")
    names = sorted(path.name for path in (tmp_path / "run" / "data").iterdir())
    assert (
        names
        == "data.json report.npy seals.json text.json tokenizer train.npy validation.npy".split()
    )
    forbid_work(monkeypatch)
    # how much is validated says nothing about the tokens
    found = prepare_data(
        replace(config, validation_sequences=5, separate_documents=True),
        tmp_path / "run" / "data",
        None,
    )
    assert_same(prepared, found)
    assert found.stored
    before = (tmp_path / "run" / "data" / "train.npy").stat().st_mtime_ns
    found.save(tmp_path / "run" / "data")  # a resumed run saves what it has found
    assert (tmp_path / "run" / "data" / "train.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["settings", "text", "lost file", "broken json"])
def test_what_no_longer_fits_is_made_again(config: DataConfig, tmp_path: Path, change: str) -> None:
    run = tmp_path / "run" / "data"
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
    assert not new.stored
    assert (new.fingerprint == old.fingerprint) == (change not in ("settings", "text"))
    new.save(run)
    again = prepare_data(config, run, None)
    assert_same(new, again)
    assert again.stored


def test_a_save_that_is_cut_short_vouches_for_nothing(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old data.json beside new tokens would be believed by a run with the old settings."""
    run = tmp_path / "run" / "data"
    prepare_data(config, run, None).save(run)
    new = prepare_data(replace(config, tokenizer_vocab=280), run, None)

    def full(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(prepare, "write_json", full)
    with pytest.raises(OSError, match="disk full"):
        new.save(run)
    assert not prepare_data(config, run, None).stored


def test_a_tokenizer_can_come_from_the_parent_or_a_path(config: DataConfig, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    train_tokenizer(["other text altogether"], 265).save_pretrained(parent)
    by_parent = prepare_data(
        replace(config, tokenizer="parent"), tmp_path / "run" / "d", str(parent)
    )
    by_path = prepare_data(replace(config, tokenizer=str(parent)), tmp_path / "run" / "d", None)
    assert len(by_parent.tokenizer) == len(by_path.tokenizer) == 265
    np.testing.assert_array_equal(by_parent.train, by_path.train)
    train_tokenizer(["and now this"], 265).save_pretrained(parent)
    changed = prepare_data(replace(config, tokenizer="parent"), tmp_path / "run" / "d", str(parent))
    assert changed.fingerprint != by_parent.fingerprint


@pytest.mark.parametrize("parent", [None, "nowhere"])
def test_a_parent_without_a_tokenizer_is_refused(
    config: DataConfig, tmp_path: Path, parent: str | None
) -> None:
    path = parent and str(tmp_path / parent)
    with pytest.raises(ConfigError, match=r"parent\.path"):
        prepare_data(replace(config, tokenizer="parent"), tmp_path / "run" / "d", path)


@pytest.mark.parametrize(("name", "part"), [("1.txt", "validation"), ("3.txt", "report")])
def test_an_empty_part_is_refused(config: DataConfig, tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=f"every document of the {part} part is empty"):
        prepare_data(config, tmp_path / "run" / "d", None)


def trained_on(config: DataConfig, run: Path) -> str:
    """Prepare and save; returns what a checkpoint would say of the tokens."""
    prepared = prepare_data(config, run, None)
    prepared.save(run)
    return prepared.digest


def test_tokens_are_hashed_once_however_often_they_are_asked_for(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the seals and for the checkpoints' digest alike, before and after they are saved; what
    is found on disk has its seals there."""
    hashed: list[int] = []
    original = prepare.sealed_tokens

    def counting(tokens: Tokens) -> FileSeal:
        hashed.append(len(tokens))
        return original(tokens)

    monkeypatch.setattr(prepare, "sealed_tokens", counting)
    run = tmp_path / "run" / "data"
    digest = trained_on(config, run)
    prepared = prepare_data(config, tmp_path / "other" / "data", None)
    before, _ = prepared.digest, prepared.save(tmp_path / "other" / "data")
    assert digest == before == prepared.digest and len(hashed) == 6
    found = Seals.read(tmp_path / "other" / "data")
    assert found is not None and found == Seals.of(tmp_path / "other" / "data")


@pytest.mark.parametrize(
    "name", ["train.npy", "validation.npy", "report.npy", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["bit", "cut", "gone"])
def test_damaged_tokens_are_named_made_again_and_saved(
    config: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    kind: str,
) -> None:
    """To the same bytes, once: the next start reads them."""
    run = tmp_path / "run" / "data"
    digest = trained_on(config, run)
    path = run / name
    whole = path.read_bytes()
    damaged = {"bit": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "cut": whole[:-3]}
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[kind])
    made = prepare_data(config, run, None, digest)
    assert not made.stored and path.name in caplog.text and "made from the text" in caplog.text
    made.save(run)
    assert path.read_bytes() == whole
    forbid_work(monkeypatch)
    assert prepare_data(config, run, None, digest).stored


def test_another_process_compares_sizes_now_and_the_rest_as_it_is_read(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "BLOCK_BYTES", 128)
    run = tmp_path / "run" / "data"
    digest = trained_on(config, run)
    whole = (run / "train.npy").read_bytes()
    (run / "train.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = prepare_data(config, run, None, digest, thorough=False)
    assert found.stored
    with pytest.raises(SealBroken, match="train.npy: block 4 "):
        np.asarray(found.train)
    (run / "train.npy").write_bytes(whole[:-1])
    assert not prepare_data(config, run, None, digest, thorough=False).stored


CHANGES = {
    "appended": (
        lambda d: (d / "0.txt").write_text("x" * 364),
        "0.txt has 364 bytes, it had 360",
    ),
    "edited": (lambda d: (d / "0.txt").write_text("x" * 360), "0.txt has other contents than it"),
    "removed": (lambda d: (d / "3.txt").unlink(), "3.txt is gone"),
    "added": (lambda d: (d / "5.txt").write_text("new"), "5.txt has been added"),
    "renamed": (lambda d: (d / "0.txt").rename(d / "9.txt"), "0.txt is gone"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_no_model_goes_on_with_other_text(config: DataConfig, tmp_path: Path, kind: str) -> None:
    """What changed is named, and nothing is written; before any training it is read anew."""
    run = tmp_path / "run" / "data"
    digest = trained_on(config, run)
    change, said = CHANGES[kind]
    change(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = rf"^data\.path: .*/{said}.*, and the run in .*/run has trained on the text as it was"
    with pytest.raises(ConfigError, match=message + "; restore that, or choose another run_dir"):
        prepare_data(config, run, None, digest)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not prepare_data(config, run, None).stored


@pytest.mark.parametrize("lost", ["all", "data.json", "text.json"])
def test_other_text_is_found_out_by_its_tokens_where_nothing_else_tells(
    config: DataConfig, tmp_path: Path, lost: str
) -> None:
    run = tmp_path / "run" / "data"
    digest = trained_on(config, run)
    shutil.rmtree(run) if lost == "all" else (run / lost).unlink()
    assert prepare_data(config, run, None, digest).digest == digest
    (tmp_path / "2.txt").write_text("other words")
    with pytest.raises(ConfigError, match="the text gives other tokens now than this run has"):
        prepare_data(config, run, None, digest)


def test_a_file_that_was_only_touched_is_the_same_text(config: DataConfig, tmp_path: Path) -> None:
    run = tmp_path / "run" / "data"
    digest = trained_on(config, run)
    fingerprint = prepare_data(config, run, None).fingerprint
    os.utime(tmp_path / "1.txt", ns=(5, 5))
    found = prepare_data(config, run, None, digest)
    assert found.stored and found.fingerprint == fingerprint


def test_libraries_of_another_version_do_not_change_what_a_model_is_trained_on(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run" / "data"
    digest = trained_on(config, run)
    monkeypatch.setattr(prepare, "version", lambda name: "99")
    assert prepare_data(config, run, None, digest).stored
    assert not prepare_data(config, run, None).stored


def test_a_run_does_not_read_its_own_output(config: DataConfig, tmp_path: Path) -> None:
    run = tmp_path / "run" / "data"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("said by a tokenizer")
    with pytest.raises(ConfigError, match="notes.txt, which lies in the run's own directory; must"):
        prepare_data(replace(config, path=str(tmp_path / "**/*.txt")), run, None)
