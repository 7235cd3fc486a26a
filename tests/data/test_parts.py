"""Records become documents, none without a word; a part is made once and named by what it is made
from."""

import gzip
from dataclasses import replace
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pytest
from helpers.stores import flip
from helpers.texts import json_lines, parquet, source, text_config, write

from elastic.config import ConfigError, SourceConfig
from elastic.data import parts
from elastic.data.parts import Encoding, Reading, make_part, part_key
from elastic.data.sources import PartTask, find_sources, tasks_of
from elastic.data.tokenizer import load_tokenizer, train_tokenizer
from elastic.data.tokens import TokenStore, read_summary

LIMIT = 1000


def task_of(path: Path | SourceConfig) -> PartTask:
    config = path if isinstance(path, SourceConfig) else source(path)
    (task,) = tasks_of("a", config, find_sources(text_config(config), Path("nowhere"))["a"])
    return task


def read(path: Path | SourceConfig, skips: bool = False) -> tuple[list[str | None], Reading]:
    reading = Reading(task_of(path), skips, LIMIT)
    return [document.text for document in reading], reading


def refused(path: Path | SourceConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


# Reading


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    write(tmp_path / "b" / "1.txt", "second\n")
    write(tmp_path / "b" / "2.txt.gz", gzip.compress(b"third\n\nand\n"))
    write(tmp_path / "a.txt", "first\n")
    texts, reading = read(tmp_path / "**")
    assert texts == ["first\n", "second\n", "third\n\nand\n"] and reading.records == 3
    assert read(tmp_path / "*")[0] == ["first\n"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents_and_the_column_is_chosen(tmp_path: Path, kind: str) -> None:
    bodies = ["x", "y", "z", "!"]
    if kind == "jsonl":
        json_lines(tmp_path / "x.jsonl", *({"id": 1, "body": body} for body in bodies))
    else:
        parquet(tmp_path / "x.parquet", {"id": [1, 2, 3, 4], "body": bodies})
    texts, reading = read(source(tmp_path / "x.*", text="body"))
    assert texts == bodies and reading.characters == 4 and not reading.empty


def test_other_columns_may_have_any_types(tmp_path: Path) -> None:
    """A reader of several files at once would take the first one's types for all."""
    for number, ids in enumerate([[1, 2], ["a", "b"], [[1.5], []], [{"x": 1}, {"x": 2}]]):
        parquet(tmp_path / f"{number}.parquet", {"text": [f"{number}.0", f"{number}.1"], "id": ids})
        rows = [{"text": f"{number}.{n}", "id": each} for n, each in enumerate(ids, start=2)]
        json_lines(tmp_path / f"{number}.jsonl", *rows)
    texts, _ = read(tmp_path / "*")
    assert texts == [f"{a}.{b}" for a in range(4) for b in (2, 3, 0, 1)]
    large = pyarrow.array(["a", "b"], pyarrow.large_string())
    parquet(tmp_path / "large" / "x.parquet", {"text": large})
    assert read(tmp_path / "large" / "*")[0] == ["a", "b"]


def third_without(tmp_path: Path, kind: str) -> Path:
    """30 records in two files; every third has no text."""
    for number in range(2):
        texts = [None if i % 3 == 2 else f"{number}.{i}" for i in range(15)]
        if kind == "parquet":
            parquet(tmp_path / f"{number}.parquet", {"text": texts})
        else:
            absent = {} if kind == "absent" else {"text": None}
            records = [{"id": 1} | (absent if t is None else {"text": t}) for t in texts]
            json_lines(tmp_path / f"{number}.jsonl", *records)
    return tmp_path / ("*.parquet" if kind == "parquet" else "*.jsonl")


@pytest.mark.parametrize("kind", ["absent", "null", "parquet"])
def test_records_without_text_are_refused_by_file_and_place(tmp_path: Path, kind: str) -> None:
    what = "row" if kind == "parquet" else "line"
    said = rf"data\.sources\.a: .*/0\.(jsonl|parquet), {what} 3: the field text is (null|absent)"
    refused(
        third_without(tmp_path, kind), said + r"; must be put right, or set data\.on_error=skip"
    )


@pytest.mark.parametrize("kind", ["absent", "null", "parquet"])
def test_records_without_text_are_left_out_where_that_is_set_and_counted(
    tmp_path: Path, kind: str
) -> None:
    texts, reading = read(source(third_without(tmp_path, kind)), skips=True)
    assert len(texts) == 20 and reading.records == 30
    assert reading.skipped == {"missing_field": 10}
    assert "/0." in reading.first_skipped["missing_field"]


@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": "b"}, {"text": "b"}])
def test_values_beside_text_are_refused(tmp_path: Path, value: object) -> None:
    json_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"text": value})
    refused(tmp_path / "a.jsonl", r"data\.sources\.a: .*/a\.jsonl, line 3: .*; must be put right")
    assert read(source(tmp_path / "a.jsonl"), skips=True)[1].skipped == {"wrong_type": 1}


@pytest.mark.parametrize("line", ['{"text": "a"', '"text"', "[1]", "[" * 100_000, "x" * 2000])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path / "x.jsonl", '{"text": "a"}\n\n' + line + "\n")
    refused(tmp_path / "x.jsonl", r"data\.sources\.a: .*/x\.jsonl, line 3: the line ")


@pytest.mark.parametrize("bad", range(12))
def test_of_twelve_files_the_bad_record_s_is_named(tmp_path: Path, bad: int) -> None:
    for number in range(12):
        records: list[object] = [{"text": f"{number} {n}"} for n in range(5)]
        if number == bad:
            records[3] = {"text": None}
        json_lines(tmp_path / f"{number:02d}.jsonl", *records)
    refused(tmp_path / "*.jsonl", rf"data\.sources\.a: .*/{bad:02d}\.jsonl, line 4: the field text")


def test_every_kind_of_fault_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", '{"text": "a"}\n{\n[1]\n{"text": 1}\n{"text": 2}\n{"b": 1}\n')
    write(tmp_path / "y.txt", b"\xff")
    texts, reading = read(source(tmp_path / "*"), skips=True)
    assert texts == ["a"] and reading.records == 7
    assert reading.skipped == {
        "not_json": 1, "not_object": 1, "wrong_type": 2, "missing_field": 1, "not_utf8": 1,
    }  # fmt: skip
    assert "x.jsonl, line 4" in reading.first_skipped["wrong_type"]


def test_undecodable_files_of_the_library_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.py", "a")
    write(tmp_path / "b.py", b"# coding: latin-1\n\xe9")
    write(tmp_path / "c.py", "c")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    texts, reading = read(SourceConfig(kind="stdlib"))
    assert texts == ["a", "c"] and not reading.skipped


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    json_lines(tmp_path / "x.jsonl", *({"text": text} for text in ("a", "", "b", "", "c")))
    write(tmp_path / "y.txt", "")
    texts, reading = read(tmp_path / "*")
    assert texts == ["a", "b", "c"] and (reading.empty, reading.records) == (3, 6)


def test_records_of_another_kind_are_no_part_of_the_source(tmp_path: Path) -> None:
    """By a value, an entry of a list, or a word between commas."""
    langs = ["en", "de", None, ["de", "en"], "fr, en", 5]
    records = ({"text": text, "lang": lang} for text, lang in zip("abcdef", langs, strict=True))
    json_lines(tmp_path / "x.jsonl", *records)
    texts, reading = read(source(tmp_path / "*", where={"lang": ["en", "5"]}))
    assert texts == ["a", "d", "e", "f"] and reading.records == 4


# Parts


@pytest.fixture
def encoding(tmp_path: Path) -> Encoding:
    train_tokenizer(["some words, some more words"], 270).save_pretrained(tmp_path / "tokenizer")
    return Encoding(tmp_path / "tokenizer", "digest", None, False, LIMIT, ("1",))


def texts_of(encoding: Encoding, directory: Path) -> list[str]:
    tokenizer = load_tokenizer(encoding.tokenizer)
    summary = read_summary(directory)
    assert summary is not None
    store = TokenStore([directory], [summary])
    tokens, targets = store.read(0, store.tokens)
    assert targets is None
    starts = [0, *store.ends(0).tolist()]
    assert all(tokens[end - 1] == 2 for end in starts[1:]), "each is ended"
    return [tokenizer.decode(tokens[a : b - 1]) for a, b in zip(starts, starts[1:], strict=False)]


def test_documents_are_in_their_order_and_each_is_ended(
    tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that spells an end is text; however much is tokenised at a time."""
    texts = ["some words", "more <eos> words\n", "", "so", "\x00\ud7ff " * 3]
    json_lines(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    for characters in (1, 12, 1 << 20):
        monkeypatch.setattr(parts, "BATCH_CHARACTERS", characters)
        name, summary = make_part(
            task_of(tmp_path / "x.jsonl"), encoding, tmp_path / f"{characters}"
        )
        found = texts_of(encoding, tmp_path / f"{characters}" / name)
        assert found == [text for text in texts if text]
        assert (summary.documents, summary.groups, summary.empty) == (4, 4, 1)
        assert summary.targets == summary.tokens and summary.characters == sum(map(len, texts))


def test_a_part_without_documents_is_one(tmp_path: Path, encoding: Encoding) -> None:
    json_lines(tmp_path / "x.jsonl", {"text": ""})
    name, summary = make_part(task_of(tmp_path / "x.jsonl"), encoding, tmp_path / "parts")
    assert summary.documents == summary.tokens == 0 and summary.empty == 1
    assert read_summary(tmp_path / "parts" / name) == summary


def test_a_part_is_made_once(
    tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever its files lie, and whatever its source is called; a damaged one is made again."""
    json_lines(tmp_path / "x.jsonl", *({"text": text} for text in "abc"))
    write(tmp_path / "moved" / "y.jsonl", (tmp_path / "x.jsonl").read_bytes())
    made = make_part(task_of(tmp_path / "x.jsonl"), encoding, tmp_path / "parts")
    tokens = tmp_path / "parts" / made[0] / "tokens.npy"
    whole, time = tokens.read_bytes(), tokens.stat().st_mtime_ns
    other = replace(task_of(source(tmp_path / "moved" / "*", weight=0.5)), source="b")
    assert make_part(other, encoding, tmp_path / "parts") == made
    assert tokens.stat().st_mtime_ns == time
    for name in ("tokens.npy", "ends.npy", "part.json", "seals.json"):
        flip(tmp_path / "parts" / made[0] / name, -2)
        assert make_part(other, encoding, tmp_path / "parts") == made
        assert tokens.read_bytes() == whole


def test_a_part_is_named_by_all_that_its_tokens_depend_on(
    tmp_path: Path, encoding: Encoding
) -> None:
    records = [{"text": text, "body": text, "lang": "en"} for text in "abc"]
    json_lines(tmp_path / "x.jsonl", *records)
    write(tmp_path / "x.txt", (tmp_path / "x.jsonl").read_bytes())
    json_lines(tmp_path / "y.jsonl", *records[:2])
    base = source(tmp_path / "x.jsonl")
    tasks = [
        base,
        source(tmp_path / "x.txt"),
        source(tmp_path / "y.jsonl"),
        replace(base, text="body"),
        replace(base, messages="body"),
        replace(base, where={"lang": ["en"]}),
        replace(base, where={"lang": ["de"]}),
    ]
    keys = [part_key(_task(each), encoding) for each in tasks]
    for change in (
        {"tokenizer_digest": "other"},
        {"libraries": ("2",)},
        {"skips": True},
        {"max_characters": 9},
    ):
        keys.append(part_key(task_of(base), replace(encoding, **change)))  # type: ignore[arg-type]
    chat = _task(replace(base, messages="body"))
    for chats in ({"loss_on": "assistant"}, {"reasoning": "strip"}):
        keys.append(part_key(replace(chat, config=replace(chat.config, **chats)), encoding))
    keys.append(part_key(chat, replace(encoding, template="x")))
    assert len(set(keys)) == len(keys)
    assert part_key(task_of(base), replace(encoding, template="x")) == keys[0], "no chat in it"


def _task(config: SourceConfig) -> PartTask:
    """Without the check that a template is there."""
    return replace(task_of(replace(config, messages=None)), config=config)


def test_generated_problems_are_named_by_their_settings(encoding: Encoding) -> None:
    configs = [
        SourceConfig(kind="arithmetic", problems=problems, difficulties=list(difficulties))
        for problems in (10, 20)
        for difficulties in ((1,), (1, 2))
    ]
    keys = {part_key(PartTask("a", config, ()), encoding) for config in configs}
    assert len(keys) == 4
