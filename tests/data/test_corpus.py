"""Sources end as documents in a stable order, and what is wrong with them is said in one line."""

import glob
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from elastic.config import ConfigError, DataConfig
from elastic.data.corpus import (
    corpus_fingerprint,
    load_corpus,
    reason,
    stdlib_files,
    stdlib_root,
    text_batches,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in the user's cache, and nothing may be written where the user stands."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def files(path: Path, **settings: Any) -> DataConfig:
    return replace(DataConfig(source="files", path=str(path), validation_every=2), **settings)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_stdlib_listing_is_sorted_and_leaves_out_tests_and_packages(tmp_path: Path) -> None:
    wanted = ["a.py", "b/c.py", "b/contest/x.py", "b0.py"]
    unwanted = ["b/test/t.py", "tests/t.py", "lib2to3/tests/t.py", "idlelib/idle_test/t.py"]
    unwanted += ["site-packages/p/q.py", "b/__pycache__/c.py", "b/data.txt"]
    for name in wanted + unwanted:
        write(tmp_path / name, "")
    assert stdlib_files(tmp_path) == wanted


def test_stdlib_is_a_few_million_characters_of_python() -> None:
    corpus = load_corpus(DataConfig())
    names = stdlib_files(stdlib_root())
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not [name for name in names if "test" in Path(name).parts[:-1]]
    assert corpus.train.column_names == corpus.validation.column_names == ["text"]
    parts = (corpus.train, corpus.validation, corpus.report)
    assert sum(map(len, parts)) == len(names)
    assert 5e6 < sum(map(len, corpus.train["text"])) < 5e7
    assert not list(Path.cwd().iterdir())


def test_every_nth_document_is_held_out_for_validation_and_the_report_in_turns(
    tmp_path: Path,
) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(11)]
    write(tmp_path / "x.jsonl", "\n".join(lines))
    corpus = load_corpus(files(tmp_path / "*.jsonl", validation_every=3))
    assert corpus.validation["text"][:] == [f"document {i}" for i in (2, 8)]
    assert corpus.report["text"][:] == ["document 5"]
    assert corpus.train["text"][:] == [f"document {i}" for i in (0, 1, 3, 4, 6, 7, 9, 10)]


def test_undecodable_library_files_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.py", "a")
    (tmp_path / "b.py").write_bytes(b"# coding: latin-1\n\xe9")
    for name in "cde":
        write(tmp_path / f"{name}.py", name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = load_corpus(DataConfig(validation_every=2))
    assert corpus.train["text"][:] == ["a", "d"]
    assert corpus.validation["text"][:] == ["c"] and corpus.report["text"][:] == ["e"]


def test_a_text_file_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *a, **k: sorted(found(*a, **k), reverse=True))
    write(tmp_path / "b" / "2.txt", "third\n\nand\n")
    write(tmp_path / "a[1].txt", "first\n")  # brackets in a name are not a pattern
    write(tmp_path / "b" / "1.txt", "second\n")
    write(tmp_path / "b" / "3.txt", "fourth\n")
    corpus = load_corpus(files(tmp_path / "**/*.txt"))
    assert corpus.train["text"][:] == ["first\n", "third\n\nand\n"]
    assert corpus.validation["text"][:] == ["second\n"]
    assert corpus.report["text"][:] == ["fourth\n"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents_and_the_column_is_chosen(tmp_path: Path, kind: str) -> None:
    table = datasets.Dataset.from_dict({"id": [1, 2, 3, 4], "body": ["x", "y", "z", "!"]})
    path = str(tmp_path / f"rows.{kind}")
    table.to_json(path) if kind == "jsonl" else table.to_parquet(path)
    corpus = load_corpus(files(tmp_path / f"*.{kind}", text_column="body"))
    assert corpus.train["text"][:] == ["x", "z"]
    assert corpus.train.column_names == ["text"]


def test_a_hub_data_set_is_loaded_by_split_and_column(tmp_path: Path) -> None:
    """A local directory stands for the hub: the same call, without the network."""
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"body": [f"{split} {i}" for i in range(4)]})
        table.to_parquet(str(tmp_path / "set" / f"{split}-0.parquet"))
    config = DataConfig(
        source="hub",
        path=str(tmp_path / "set"),
        split="test",
        text_column="body",
        validation_every=2,
    )
    assert load_corpus(config).train["text"][:] == ["test 0", "test 2"]
    with pytest.raises(ConfigError, match=r"data\.split=nope\): cannot load .*nope"):
        load_corpus(replace(config, split="nope"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, r"data\.path=.*: no such file; must be"),
        ("x.csv", "a,b", r"data\.path=.*: matches \.csv files; must match .*\.parquet"),
        ("x.jsonl", '{"a": "1", "b": 2}\n' * 3, r"data\.text_column=text: .*one of a, b"),
        ("x.jsonl", '{"text": 1}\n' * 3, r"data\.text_column=text: holds a number in row 1 of .*"),
        ("x.jsonl", '{"text": "1"}\n{"te', r"data\.path=.*: row 2 of .*x.jsonl is not JSON"),
        ("x.jsonl", "", r"data\.path=.*: cannot read these \.jsonl files"),
        ("x.parquet", "PAR?", r"data\.path=.*: cannot read these \.parquet files"),
        ("x.txt", "only one", r"data\.validation_every=2: .*only 1 document"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as error:
        load_corpus(files(tmp_path / f"{name.split('.')[0]}*"))
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": ["1"], "b": ["2"]}).to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(ConfigError, match=r"data\.text_column=text: .*must be one of a, b"):
        load_corpus(files(tmp_path / "x.parquet"))


def test_the_fingerprint_follows_the_files_and_nothing_else(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"{i}.txt", "text")
    config = files(tmp_path / "*.txt")
    first = corpus_fingerprint(config)
    assert load_corpus(config).fingerprint == corpus_fingerprint(config) == first
    write(tmp_path / "1.txt", "more text")
    assert corpus_fingerprint(config) != first
    assert corpus_fingerprint(DataConfig()) == corpus_fingerprint(DataConfig())


def test_batches_are_bounded_by_size_and_leave_out_nothing_but_empty_text() -> None:
    texts = ["a" * 3, "", "b" * 4, "c" * 20, None, "d", "e"]
    batches = list(text_batches(datasets.Dataset.from_dict({"text": texts}), characters=6))
    assert batches == [["aaa", "bbbb"], ["c" * 20], ["d", "e"]]


def test_the_reason_is_the_first_line_of_the_root_cause() -> None:
    outer, inner = RuntimeError("wrapped"), ValueError("\nthis\nand that")
    outer.__cause__ = inner
    assert reason(outer) == "this"
    assert reason(StopIteration()) == "StopIteration"


def test_no_progress_bars_in_a_log_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        write(tmp_path / f"{i}.txt", "text")
    load_corpus(files(tmp_path / "*.txt"))
    assert capfd.readouterr().err == ""
    assert not datasets.utils.are_progress_bars_disabled()  # left as it was found
