"""A small random elastic checkpoint on disk, and a way to count what is read from it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import random_parent, tiny_shape
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from elastic.config import ExtractConfig, ParentShape
from elastic.members import cost
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.parent import HybridParent
from elastic.parent.weights import save_parent
from elastic.storage import reading
from elastic.storage.manifest import MEMBERS, Manifest, Member
from elastic.storage.reading import StoredTensor

SHAPE = tiny_shape(vocab_size=40)
SMALL = Architecture(8, (MambaLayer(0, 4, 5), MLPLayer(1, 3), AttentionLayer(2, 4), MLPLayer(4, 3)))
MEDIUM = Architecture(
    11,
    (
        MambaLayer(0, 4, 6),
        MLPLayer(1, 9),
        AttentionLayer(2, 4),
        MambaLayer(3, 4, 6),
        MLPLayer(4, 9),
    ),
)
MIXED = Architecture(  # MLP widths and query heads that differ from layer to layer
    9,
    (
        MLPLayer(1, 3),
        AttentionLayer(2, 2),
        MambaLayer(4, 4, 7),
        MLPLayer(5, 8),
        AttentionLayer(6, 4),
    ),
)
UNEVEN = Architecture(
    11, (MambaLayer(0, 4, 6), MLPLayer(1, 5), AttentionLayer(2, 4), MambaLayer(3, 2, 7))
)
"""Mamba layers of two sizes: no stock checkpoint can hold it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An elastic checkpoint and the parent that was written into it."""

    path: Path
    parent: HybridParent

    def member(self, budget: str) -> Architecture:
        return Manifest.read(self.path).member(budget).architecture

    def config(self, output: Path, budget: str = "small", **settings: Any) -> ExtractConfig:
        return ExtractConfig(
            checkpoint=str(self.path), budget=budget, output=str(output), **settings
        )


def write_checkpoint(
    directory: Path,
    shape: ParentShape,
    members: Mapping[str, Architecture],
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 4_000_000_000,
    fill: Callable[[HybridParent], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    own: Mapping[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Weights, router and elastic.json; `fill` may overwrite the random weights. With `own` norms,
    by their keys in members.safetensors, of format version 2, else of 1."""
    directory.mkdir(parents=True, exist_ok=True)
    parent = random_parent(shape).to(dtype)
    if fill is not None:
        fill(parent)
    save_parent(parent, directory, max_shard_bytes=max_shard_bytes)
    save_file({"weight": torch.ones(3)}, directory / "router.safetensors")
    budgets = {
        name: Member({"params": 0.5}, cost.parameters(shape, architecture), architecture)
        for name, architecture in members.items()
    }
    said = {"tokens_seen": 7} if provenance is None else dict(provenance)
    if own is not None:
        save_file(dict(own), directory / MEMBERS)
    version = 1 if own is None else 2
    Manifest(budgets, {"choices": {}}, {"depth": [3]}, said, {}, version).write(directory)
    return Checkpoint(directory, parent)


def _write_small_files(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["a member is a cut", "a cut is a prefix"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    wrapped.save_pretrained(directory)
    (directory / "LICENSE").write_text("as is\n")
    (directory / "generation_config.json").write_text('{"max_new_tokens": 5, "eos_token_id": 2}\n')
    (directory / "notes.txt").write_text("not for members\n")


@pytest.fixture(scope="session")
def write() -> Callable[..., Checkpoint]:
    """Write a checkpoint of one's own."""
    return write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Homogeneous members, several shards, tokenizer; tests must not change it."""
    directory = tmp_path_factory.mktemp("elastic")
    members = {"full": Architecture.full(SHAPE), "medium": MEDIUM, "small": SMALL, "uneven": UNEVEN}
    written = write_checkpoint(directory, SHAPE, members, max_shard_bytes=4000)
    _write_small_files(directory)
    return written


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A member that can be stored padded or per layer; tests must not change it."""
    shape = tiny_shape(pattern="M-*MM-*")
    return write_checkpoint(tmp_path_factory.mktemp("mixed"), shape, {"mixed": MIXED})


class Reads:
    """What was read of every tensor, and how many elements in all (of float32)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.bytes = 0

    @property
    def elements(self) -> int:
        return self.bytes // 4


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """Counts everything that is read of any stored tensor; what costs less to read than to leave
    out (gaps, short rows: tests/storage/test_reading.py has their bound) is left out all the same.
    """
    counted = Reads()
    read_into, blocks = reading.OpenFile.read_into, StoredTensor.blocks

    def counting(self: Any, buffer: memoryview, offset: int, what: str) -> None:
        if what != "the header":
            counted.bytes += len(buffer)
        read_into(self, buffer, offset, what)

    def naming(self: StoredTensor, *arguments: Any) -> Iterator[torch.Tensor]:
        counted.names.append(self.name)
        return blocks(self, *arguments)

    monkeypatch.setattr(reading.OpenFile, "read_into", counting)
    monkeypatch.setattr(StoredTensor, "blocks", naming)
    for name in ("GAP_BYTES", "PAGE_BYTES", "SPARE"):
        monkeypatch.setattr(reading, name, 0)
    yield counted
