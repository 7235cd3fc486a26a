"""Files of others, deep, mistyped, huge or cut: one line that names the file, never a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import reconfigure, refused, saved
from helpers.forked import Forked
from helpers.gate import SHAPE

from elastic.config import ParentShape
from elastic.storage import foreign
from elastic.storage.foreign import parse_yaml, read_json, read_object, read_yaml
from elastic.training.loggers import MetricsFile

DEEP = "[" * 100_000

JSON = {
    "empty": b"",
    "cut": b'{"a": ',
    "deep": DEEP.encode(),
    "deep and whole": b"[" * 70 + b"]" * 70,
    "no text": b"\xff\xfe\x00\x80",
    "a NUL": b'{"a": 1}\0',
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_json_is_read_within_limits(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: damaged") and "\n" not in line and len(line) < 400


def test_what_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MOST_BYTES", 10)
    (tmp_path / "x.json").write_text('"0123456789"')
    with pytest.raises(ValueError, match="12 bytes"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("value", [[], "text", 1, None, True])
def test_an_object_is_an_object(value: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="must be a JSON object"):
        read_object(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: &x [1]\nb: *x", DEEP[:5000], "!!python/object:os.system {}", "a: \0", "a: 1\n\tb"],
)
def test_yaml_is_read_within_limits(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value) and "x.yaml" in str(caught.value)


def test_plain_yaml_is_read() -> None:
    assert parse_yaml("a: {b: [1, 2.5, x, null]}") == {"a": {"b": [1, 2.5, "x", None]}}


FIELDS = "hidden_size vocab_size intermediate_size num_attention_heads head_dim n_groups chunk_size"


@pytest.mark.parametrize("name", [*FIELDS.split(), "hybrid_override_pattern", "norm_eps"])
@pytest.mark.parametrize(
    "value", ["8", 8.5, True, [8], {"a": 1}, -8, 0, 2**64, 1e300], ids=lambda value: str(value)[:8]
)
def test_a_config_of_another_type_or_range_is_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    if name == "norm_eps":
        name = "layer_norm_epsilon"
    saved(tmp_path, ParentShape(**SHAPE))
    reconfigure(tmp_path, **{name: value})
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "", ".", "a/b", 3, None])
def test_a_shard_lies_beside_its_index(file: Any, tmp_path: Path) -> None:
    saved(tmp_path, ParentShape(**SHAPE), max_shard_bytes=2000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["backbone.embeddings.weight"] = file
    path.write_text(json.dumps(index))
    refused(tmp_path, "must be the name of a file beside it")


@pytest.mark.parametrize(
    "text",
    ["loss\n1\n", "step,stage\nx,0\n", "step,stage\n1,\n", "step,stage\n1,0,5\n", "step,stage\n1\n",
     "step,stage,a\n1,0,\0\n", "\0\n1\n"],
)  # fmt: skip
def test_damaged_metrics_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match="metrics.csv: damaged"):
        MetricsFile(tmp_path / "metrics.csv")


# Whole commands

RUN_FILES = {
    "settings that are a list": ("config.yaml", b"[1]"),
    "settings that are deep": ("config.yaml", DEEP[:5000].encode()),
    "settings of another kind": ("config.yaml", b"name: x\n1: 2\n"),
    "a manifest that is deep": ("elastic/elastic.json", DEEP.encode()),
    "no index": ("elastic/model.safetensors.index.json", b'{"weight_map": 3}'),
    "a config that is a list": ("elastic/config.json", b"[]"),
}


@pytest.mark.parametrize(("name", "content"), RUN_FILES.values(), ids=RUN_FILES)
@pytest.mark.parametrize("command", ["train", "evaluate", "extract"])
def test_a_damaged_run_gets_a_line(
    command: str, name: str, content: bytes, forked: Forked, finished: Path, tmp_path: Path
) -> None:
    """Or goes on without the file, where the command has no need of it."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / name).write_bytes(content)
    (run_dir / "elastic" / "seals.json").unlink()  # they would see it first
    words = {
        "train": ["train", f"run_dir='{run_dir}'"],
        "evaluate": ["evaluate", f"run_dir='{run_dir}'", "sequences=2", "sequence_length=32"],
        "extract": ["extract", f"checkpoint='{run_dir / 'elastic'}'", "budget=small"]
        + [f"output='{tmp_path / 'small'}'", "verify=false"],
    }
    code, said = forked.run(["elastic", *words[command]], {})
    assert "Traceback" not in said, said[-3000:]
    assert code in (0, 1, 2)
    if code:
        assert said.count("error: ") == 1 and not (tmp_path / "small").exists()
