"""A sealed elastic checkpoint: a cut compares what it touches, and is never written into one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic
from elastic.extract.export import extract
from elastic.storage import seals
from elastic.storage.opened import OpenFile
from elastic.storage.seals import SealBroken, Seals


@pytest.fixture
def sealed(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy with seals, in blocks of 256 bytes."""
    monkeypatch.setattr(seals, "BLOCK_BYTES", 256)
    directory = tmp_path / "run" / "elastic"
    shutil.copytree(checkpoint.path, directory)
    Seals.of(directory).write()
    return directory


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_sealed_checkpoint_gives_the_same_member(checkpoint: Any, sealed: Path) -> None:
    for budget in ("full", "small"):
        plain = elastic.load(checkpoint.path, budget).state_dict()
        for name, weight in elastic.load(sealed, budget).state_dict().items():
            assert torch.equal(weight, plain[name]), name


def test_a_cut_reads_and_compares_only_the_blocks_that_it_touches(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage in every other block leaves the small member as it is."""
    checked: set[tuple[Path, int]] = set()
    original = OpenFile._check

    def noting(self: OpenFile, block: memoryview, number: int, what: str) -> None:
        checked.add((self.path, number))
        original(self, block, number, what)

    monkeypatch.setattr(OpenFile, "_check", noting)
    before = elastic.load(sealed, "small").state_dict()
    spared = 0
    for path in sealed.glob("model-*.safetensors"):
        for number in range(-(-path.stat().st_size // 256)):
            if (path, number) not in checked:
                flip(path, 256 * number)
                spared += 1
    assert spared > 3
    for name, weight in elastic.load(sealed, "small").state_dict().items():
        assert torch.equal(weight, before[name])
    with pytest.raises(SealBroken):
        elastic.load(sealed, "full")


@pytest.mark.parametrize(
    "name",
    ["elastic.json", "config.json", "model.safetensors.index.json", "tokenizer.json", "seals.json"],
)
def test_a_flipped_bit_in_a_small_file_is_named_before_anything_is_written(
    checkpoint: Any, sealed: Path, tmp_path: Path, name: str
) -> None:
    path = sealed / name
    flip(path, path.stat().st_size // 2)
    config = checkpoint.config(tmp_path / "out", verify=False)
    config.checkpoint = str(sealed)
    with pytest.raises(ValueError, match=rf"{name}: (block 0|block 1|block \d+|damaged) .*restore"):
        extract(config)
    assert not (tmp_path / "out").exists()


def test_an_export_into_an_elastic_checkpoint_is_refused(
    checkpoint: Any, sealed: Path, tmp_path: Path
) -> None:
    """Its run replaces it whole at the next stage: the export would be gone."""
    (tmp_path / "link").symlink_to(sealed)
    names = [*sealed.iterdir()]
    for output in (sealed / "out", sealed / "deeper" / "out", tmp_path / "link" / "out"):
        for source in (sealed, checkpoint.path):
            config = checkpoint.config(output, verify=False)
            config.checkpoint = str(source)
            with pytest.raises(ValueError, match="^output=.*: lies in .* must be elsewhere"):
                extract(config)
    assert [*sealed.iterdir()] == names
