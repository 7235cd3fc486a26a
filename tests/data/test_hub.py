"""Data sets of the hub are files of a commit. A local directory stands for the hub: the same call,
without the network."""

import os
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from helpers.texts import documents_of, json_lines, parquet, text_config

from elastic.config import ConfigError, SourceConfig
from elastic.data import hub
from elastic.data.hub import hub_files
from elastic.data.prepare import prepare_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> SourceConfig:
    """Files whose other columns have different types, which must not get in the way."""
    parquet(tmp_path / "set" / "train-0.parquet", {"text": ["a 0", "a 1", "a 2"], "id": [1, 2, 3]})
    parquet(tmp_path / "set" / "train-1.parquet", {"text": ["b 0", "b 1"], "id": ["x", "y"]})
    parquet(tmp_path / "set" / "test-0.parquet", {"text": ["c 0"] * 4})
    return SourceConfig(kind="hub", path=str(tmp_path / "set"))


def texts(config: SourceConfig, run: Path) -> list[str]:
    return documents_of(prepare_data(text_config(config), run, None))


def test_a_split_is_its_files(config: SourceConfig, tmp_path: Path) -> None:
    assert texts(config, tmp_path / "run") == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert texts(replace(config, split="test"), tmp_path / "other") == ["c 0"] * 4
    with pytest.raises(ConfigError, match=r"split=nope\): there is no such split; must be one of"):
        hub_files("data.sources.a", replace(config, split="nope"))


def test_a_data_set_that_has_changed_is_another_text(config: SourceConfig, tmp_path: Path) -> None:
    """By what the hub calls it: a commit, or of a local directory the state of its files."""
    before = hub_files("a", config).to_json()
    assert hub_files("a", config).change("s", before) is None
    parquet(tmp_path / "set" / "train-1.parquet", {"text": ["b 0", "b 2"], "id": ["x", "y"]})
    os.utime(tmp_path / "set" / "train-1.parquet", ns=(1, 10**18))
    change = hub_files("a", config).change("s", before)
    assert change is not None and change.startswith("s: is ")


@pytest.mark.parametrize("path", ["no/such-data-set", "/no/such/directory"])
def test_what_cannot_be_reached_stops_in_one_line(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as error:
        hub_files("data.sources.a", SourceConfig(kind="hub", path=path))
    assert str(error.value).startswith(f"data.sources.a.path={path} (subset=None, split=train): ")
    assert "cannot load this data set" in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_the_cache_gets_the_suffix_that_says_how_it_is_read(tmp_path: Path) -> None:
    """Once, whichever of two processes is first; a name that says it is left."""
    file = json_lines(tmp_path / "0123abcd", {"text": "a"})
    for _ in range(2):
        link = hub._with_suffix(file, "hf://datasets/a/b@c/data/train.v1.jsonl")
        assert link.suffix == ".jsonl" and link.read_text() == file.read_text()
    assert hub._with_suffix(link, "train.jsonl") == link


def test_two_processes_may_name_a_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = json_lines(tmp_path / "0123abcd", {"text": "a"})
    hub._with_suffix(file, "x.jsonl")
    monkeypatch.setattr(Path, "exists", lambda path: False)  # the other one comes after our look
    assert hub._with_suffix(file, "x.jsonl").read_text() == file.read_text()
