"""No record is lost and no value changes its type without a word."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from elastic.config import ConfigError, DataConfig
from elastic.data.corpus import load_corpus
from elastic.data.prepare import TEXTS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def files(path: Path, **settings: object) -> DataConfig:
    return DataConfig(source="files", path=str(path), validation_every=2, **settings)  # type: ignore[arg-type]


def refused(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_corpus(config)
    assert "\n" not in str(caught.value)


def json_lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def parquet(path: Path, values: list, kind: pyarrow.DataType | None = None) -> None:
    table = pyarrow.table({"text": pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def third_without(tmp_path: Path, kind: str) -> Path:
    """30 records in two files; every third has no text."""
    for number in range(2):
        texts = [None if i % 3 == 2 else f"{number}.{i}" for i in range(15)]
        if kind == "parquet":
            parquet(tmp_path / f"{number}.parquet", texts)
        else:
            absent = {} if kind == "absent" else {"text": None}
            records = [{"id": 1} | (absent if t is None else {"text": t}) for t in texts]
            json_lines(tmp_path / f"{number}.jsonl", *records)
    return tmp_path / ("*.parquet" if kind == "parquet" else "*.jsonl")


@pytest.mark.parametrize("kind", ["absent", "null", "parquet"])
def test_records_without_text_are_refused_by_file_row_and_field(tmp_path: Path, kind: str) -> None:
    glob = third_without(tmp_path, kind)
    said = r"data\.text_column=text: row 3 of .*/0\.(jsonl|parquet) has none \(10 in all\); must be"
    refused(files(glob), said + r".*, or set data\.skip_missing=true")


@pytest.mark.parametrize("kind", ["absent", "null", "parquet"])
def test_records_without_text_are_left_out_where_that_is_set_and_counted(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = load_corpus(files(third_without(tmp_path, kind), skip_missing=True))
    texts = [text for name in TEXTS for text in getattr(corpus, name)["text"][:] if text]
    assert len(texts) == 20
    assert "10 records without data.text_column=text are left out" in caplog.text


def test_a_hub_data_set_is_held_to_the_same(tmp_path: Path) -> None:
    """A local directory stands for the hub."""
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train-0.parquet", ["a", "b", None, "d"])
    config = DataConfig(source="hub", path=str(tmp_path / "set"), validation_every=2)
    refused(config, r"data\.text_column=text: row 3 of .*/set has none; must be in every record")


def test_empty_documents_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    json_lines(tmp_path / "x.jsonl", *({"text": t} for t in ("a", "", "b", "", "c")))
    load_corpus(files(tmp_path / "x.jsonl"))
    assert "2 of 5 documents are empty and left out" in caplog.text


def test_nothing_is_said_of_whole_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    json_lines(tmp_path / "x.jsonl", *({"text": t} for t in "abcd"))
    parquet(tmp_path / "x.parquet", ["a", "b", "c", "d"], pyarrow.large_string())
    for name in ("x.jsonl", "x.parquet"):
        assert len(load_corpus(files(tmp_path / name)).train) == 2
    assert caplog.text == ""


@pytest.mark.parametrize("skip", [False, True])
def test_parquet_numbers_beside_text_are_refused(tmp_path: Path, skip: bool) -> None:
    """Whichever file comes first: the reader of both would take its type for all."""
    parquet(tmp_path / "a.parquet", ["x", "y"])
    parquet(tmp_path / "b.parquet", [1, 2])
    said = r"data\.text_column=text: holds int64 values in .*/b\.parquet; must hold text"
    refused(files(tmp_path / "*.parquet", skip_missing=skip), said)
    (tmp_path / "a.parquet").rename(tmp_path / "c.parquet")
    refused(files(tmp_path / "*.parquet", skip_missing=skip), said)


@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": "b"}])
@pytest.mark.parametrize("apart", [True, False], ids=["own-file", "same-file"])
def test_json_values_beside_text_are_refused(tmp_path: Path, value: object, apart: bool) -> None:
    texts = [{"text": "a"}, {"text": "b"}]
    if apart:
        json_lines(tmp_path / "a.jsonl", *texts)
        json_lines(tmp_path / "b.jsonl", {"text": value})
        where = r"row 1 of .*/b\.jsonl"
    else:
        json_lines(tmp_path / "a.jsonl", *texts, {"text": value})
        where = r"row 3 of .*/a\.jsonl"
    said = rf"data\.text_column=text: holds (a|an) \w+ in {where}; must hold text"
    refused(files(tmp_path / "*.jsonl"), said)


@pytest.mark.parametrize("line", ['{"text": "a"', '"text"', "[1]", "[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    refused(files(tmp_path / "x.jsonl"), r"data\.path=.*: row 3 of .*x\.jsonl is not (a )?JSON")
