"""Shards written block by block are what safetensors itself reads."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from elastic.storage import writing
from elastic.storage.index import INDEX
from elastic.storage.writing import Pending, write_shards


def pending(values: dict[str, torch.Tensor], rows: int = 3) -> list[Pending]:
    """In blocks of so many rows."""

    def blocks(value: torch.Tensor) -> list[torch.Tensor]:
        return list(value.split(rows))

    return [
        Pending(name, tuple(value.shape), value.dtype, lambda value=value: blocks(value))
        for name, value in values.items()
    ]


def mixed_types() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(7, 3, generator=generator).bfloat16()  # 42 bytes: the next is not aligned
    return {
        "half": half,
        "single": torch.randn(5, 4, generator=generator),
        "double": torch.randn(4, generator=generator).double(),
        "taps": torch.randn(6, 1, 4, generator=generator),
        "transposed": torch.randn(4, 9, generator=generator).t(),
    }


def test_one_file(tmp_path: Path) -> None:
    values, counts = mixed_types(), []
    write_shards(tmp_path, pending(values), 10**6, counts.append)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert sum(counts) == sum(value.numel() * value.element_size() for value in values.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_of_bounded_size_with_an_index(tmp_path: Path) -> None:
    values = mixed_types()
    write_shards(tmp_path, pending(values), 100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert list(index["weight_map"]) == list(values)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    for name, file in index["weight_map"].items():
        tensors = load_file(tmp_path / file)
        assert torch.equal(tensors[name], values[name])
        assert sum(t.nbytes for t in tensors.values()) <= 100 or len(tensors) == 1


def test_blocks_are_converted(tmp_path: Path) -> None:
    value = torch.linspace(0, 1, 12).view(4, 3)
    write_shards(tmp_path, [Pending("a", (4, 3), torch.float16, lambda: value.split(3))], 10**6)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], value.half())


@pytest.mark.parametrize("blocks", [((3, 3),), ((4, 2),), ((4, 3), (1, 3))])
def test_blocks_of_another_size_are_an_error(
    tmp_path: Path, blocks: tuple[tuple[int, int], ...]
) -> None:
    tensor = Pending("a", (4, 3), torch.float32, lambda: [torch.zeros(size) for size in blocks])
    with pytest.raises(AssertionError):
        write_shards(tmp_path, [tensor], 10**6)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="not Linux")
def test_what_is_written_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is sent to the disk once it is written, and forgotten some parts later."""
    monkeypatch.setattr(writing, "WRITE_BYTES", 96)
    monkeypatch.setattr(writing, "BEHIND_BYTES", 64)
    monkeypatch.setattr(writing, "LAG", 2)
    told: list[tuple[int, int]] = []

    def forget(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED and os.fstat(descriptor).st_size >= start + size
        told.append((start, size))

    monkeypatch.setattr(os, "posix_fadvise", forget)
    values = mixed_types()
    write_shards(tmp_path, pending(values), 10**6)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in values.items())
    parts = range(0, (tmp_path / "model.safetensors").stat().st_size - 63, 64)
    assert [told.count((part, 64)) for part in parts] == [2] * (len(parts) - 2) + [1] * 2
    assert len(told) == 2 * len(parts) - 2
