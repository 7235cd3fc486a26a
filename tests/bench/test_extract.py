"""bench extract: what it makes, what it counts, and that it leaves nothing behind."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.strategies import NANO_12B, tiny_shape
from safetensors.torch import load_file, save_file

from elastic.bench import extract as bench
from elastic.bench.synthetic import bytes_of, family, scaled_shape, shares_of, write_checkpoint
from elastic.config import (
    BudgetConfig,
    ConfigError,
    ExtractBenchConfig,
    ExtractConfig,
    ParentConfig,
    SpaceConfig,
)
from elastic.extract.export import extract
from elastic.extract.slice import open_member
from elastic.members.architecture import Architecture
from elastic.members.cost import parameters
from elastic.members.cut import member_cuts
from elastic.storage.manifest import Manifest

SHAPE = tiny_shape(hidden_size=32, intermediate_size=64, vocab_size=50)
SPACE = SpaceConfig(hidden=[32, 28, 24], ffn=[64, 48, 32], tolerance=0.1)
SHARES = {"whole": 1.0, "large": 0.85, "small": 0.7}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    directory = tmp_path_factory.mktemp("bench") / "checkpoint"
    written = write_checkpoint(directory, SHAPE, SPACE, family(SPACE, SHAPE, SHARES), 9000, 0)
    assert written == bytes_of(SHAPE)
    return directory


@pytest.fixture
def cut(checkpoint: Path, tmp_path: Path) -> Path:
    settings = ExtractConfig(
        checkpoint=str(checkpoint), budget="small", output=str(tmp_path / "cut"), verify=False
    )
    return extract(settings)


def test_the_checkpoint_is_an_elastic_one_of_nested_members(checkpoint: Path) -> None:
    members = {n: m.architecture for n, m in Manifest.read(checkpoint).budgets.items()}
    assert members["whole"] == Architecture.full(SHAPE)
    assert members["small"].is_within(members["large"])
    for name, share in SHARES.items():
        target = share * parameters(SHAPE, Architecture.full(SHAPE))
        assert parameters(SHAPE, members[name]) == pytest.approx(target, rel=0.1)
    assert len(list(checkpoint.glob("*.safetensors"))) > 1


def test_types_and_ranges_are_those_of_published_checkpoints(checkpoint: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    assert tensors["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    kinds = {name.rsplit(".", 1)[-1] for name, t in tensors.items() if t.dtype == torch.float32}
    assert kinds == {"A_log", "D"}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert json.loads((checkpoint / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_same_seed_draws_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "again", SHAPE, SPACE, family(SPACE, SHAPE, SHARES), 9000, 0)
    for path in checkpoint.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_true_shape_is_24_6_gb_and_a_scaled_one_is_legal() -> None:
    assert scaled_shape(NANO_12B, 1.0) == NANO_12B
    heads = 28 * 128 * 2 * 2  # A_log and D of 28 Mamba layers, two more bytes each
    assert bytes_of(NANO_12B) == 2 * 12_310_001_152 + heads
    for scale in (0.5, 0.05, 0.001):
        shape = scaled_shape(NANO_12B, scale)
        assert shape.pattern == NANO_12B.pattern and bytes_of(shape) < scale * bytes_of(NANO_12B)


def test_budgets_are_shares_of_the_full_size_parent() -> None:
    budgets = {"9b": BudgetConfig(params=9e9), "12b": BudgetConfig(params=1.0)}
    assert shares_of(budgets, NANO_12B) == {"12b": 1.0, "9b": 9e9 / 12_310_001_152}


def test_a_child_counts_what_a_cut_reads_and_holds(checkpoint: Path, tmp_path: Path) -> None:
    """The one test that starts a process as the bench does."""
    settings = ExtractConfig(
        checkpoint=str(checkpoint), budget="small", output=str(tmp_path / "cut"), verify=False
    )
    cost = bench.in_child(settings, verified=True)
    size = sum(path.stat().st_size for path in (tmp_path / "cut").glob("*.safetensors"))
    assert size < cost.bytes_read < bytes_of(SHAPE) + 100_000  # headers and JSON come to that
    assert cost.seconds > 0 and cost.verify_seconds is not None and cost.verify_seconds > 0
    assert 100 << 20 < cost.peak <= cost.verify_peak < 2 << 30


def test_blocks_that_a_member_touches_are_counted_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against marking every kept byte; the whole model touches every block of data."""
    monkeypatch.setattr(bench, "BLOCK_BYTES", 128)
    for budget in ("whole", "small"):
        member = open_member(checkpoint, budget)
        marked = {path: np.zeros(path.stat().st_size, bool) for path in checkpoint.glob("model-*")}
        for cut in member_cuts(member.parent, member.member.architecture):
            stored = member.store[cut.source]
            row = stored.dtype.itemsize * int(np.prod(stored.shape[1:]))
            for start, stop in cut.cut[0] or ((0, stored.shape[0]),):
                place = slice(stored.offset + start * row, stored.offset + stop * row)
                marked[stored.file.path][place] = True
        blocks = [
            kept[at : at + 128] for kept in marked.values() for at in range(0, len(kept), 128)
        ]
        expected = sum(len(block) for block in blocks if block.any())
        assert bench.touched_bytes(member) == expected
    total = sum(len(kept) for kept in marked.values())
    assert bench.touched_bytes(member) < 0.95 * total


def test_the_copy_is_of_so_many_bytes(checkpoint: Path, tmp_path: Path) -> None:
    size = bytes_of(SHAPE) - 5000
    assert bench._copy(checkpoint, tmp_path / "copy", size) > 0
    shards = sorted(checkpoint.glob("*.safetensors"))
    whole = b"".join(path.read_bytes() for path in shards)
    copied = b"".join(path.read_bytes() for path in sorted((tmp_path / "copy").iterdir()))
    assert len(copied) == size and whole.startswith(copied)


def test_headers_must_be_what_transformers_builds(cut: Path) -> None:
    assert bench.check_shapes(cut) == sum(
        tensor.numel() for tensor in load_file(cut / "model.safetensors").values()
    )
    tensors = load_file(cut / "model.safetensors")
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"][:-1].clone()
    save_file(tensors, cut / "model.safetensors")
    with pytest.raises(ValueError, match=r"backbone.norm_f.weight is stored as \(27,\)|\(23,\)"):
        bench.check_shapes(cut)


class Stopped(BaseException):
    """As KeyboardInterrupt is."""


def config(directory: Path, **settings: Any) -> ExtractBenchConfig:
    budgets = {name: BudgetConfig(params=share) for name, share in SHARES.items()}
    return ExtractBenchConfig(
        parent=ParentConfig(shape=SHAPE),
        space=SPACE,
        budgets=budgets,
        dir=str(directory),
        **settings,
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_leaves_nothing_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """Ctrl-C in the middle of a cut."""
    seen: list[Path] = []

    def stop(settings: ExtractConfig, verified: bool) -> Iterator[None]:
        seen.extend(tmp_path.rglob("config.json"))
        raise Stopped

    monkeypatch.setattr(bench, "in_child", stop)
    with pytest.raises(Stopped):
        bench.measure(config(tmp_path, keep=keep), torch.device("cpu"))
    assert [path.parent.name for path in seen] == ["checkpoint"]
    assert seen[0].exists() == keep and any(tmp_path.iterdir()) == keep


def test_a_full_disk_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match="1,000 bytes are free"):
        bench.measure(config(tmp_path), torch.device("cpu"))
    assert not any(tmp_path.iterdir())


def test_only_members_below_the_parent_can_be_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one below the parent"):
        dataclasses.replace(config(tmp_path), budgets={"whole": BudgetConfig(params=1.0)})
