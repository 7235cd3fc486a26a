"""members.safetensors: a cut has the norms of its own, and nothing else is accepted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import assert_near, random_tokens, tiny_shape
from safetensors.torch import load_file, save_file
from torch import Tensor

import elastic
from elastic.config import ParentShape
from elastic.extract.export import extract
from elastic.members.architecture import Architecture
from elastic.members.cut import kept_shape, norm_cuts, tensor_shapes
from elastic.storage.manifest import MEMBERS

Checkpoint = Any
Write = Callable[..., Checkpoint]
SHAPE = tiny_shape(vocab_size=40)


def drawn(shape: ParentShape, budget: str, member: Architecture) -> dict[str, Tensor]:
    """Random norms for a member."""
    generator, sizes = torch.Generator().manual_seed(len(budget)), tensor_shapes(shape)
    return {
        f"{budget}/{cut.source}": 0.5
        + torch.rand(kept_shape(cut.cut, sizes[cut.source]), generator=generator)
        for cut in norm_cuts(shape, member)
    }


@pytest.fixture
def owning(checkpoint: Checkpoint, write: Write, tmp_path: Path) -> Checkpoint:
    """Medium and small have their own norms, full has none."""
    members = {name: checkpoint.member(name) for name in ("full", "medium", "small")}
    own = {
        key: value
        for name in ("medium", "small")
        for key, value in drawn(SHAPE, name, members[name]).items()
    }
    return write(tmp_path / "elastic", SHAPE, members, own=own)


def expected(checkpoint: Checkpoint, budget: str, tokens: Tensor) -> Tensor:
    """Logits of the parent sliced to a member, whose norms are put into the parent's."""
    member = checkpoint.member(budget)
    own = load_file(checkpoint.path / MEMBERS)
    with torch.no_grad():
        for cut in norm_cuts(checkpoint.parent.shape, member):
            weight, at = checkpoint.parent.get_parameter(cut.source), 0
            value = own[f"{budget}/{cut.source}"]
            for start, stop in cut.cut[0] or ((0, len(weight)),):
                weight[start:stop] = value[at : at + stop - start]
                at += stop - start
        return checkpoint.parent.logits(tokens, member)


@pytest.mark.parametrize("budget", ["medium", "small"])
def test_an_export_has_them_and_is_verified(
    owning: Checkpoint, tmp_path: Path, budget: str
) -> None:
    extract(owning.config(tmp_path / "out", budget))
    tokens = random_tokens(SHAPE)
    wanted = expected(owning, budget, tokens)
    with torch.no_grad():
        for model in (elastic.load(owning.path, budget), elastic.load(tmp_path / "out")):
            assert_near(model(tokens, use_cache=False).logits, wanted)


def test_the_full_member_keeps_the_parents(owning: Checkpoint) -> None:
    tokens = random_tokens(SHAPE)
    with torch.no_grad():
        found = elastic.load(owning.path, "full")(tokens, use_cache=False).logits
        assert_near(found, owning.parent.logits(tokens))


@pytest.mark.parametrize("export", ["padded", "per_layer"])
def test_members_of_several_sizes_have_them_too(
    mixed: Checkpoint, write: Write, tmp_path: Path, export: str
) -> None:
    shape, member = mixed.parent.shape, mixed.member("mixed")
    own = drawn(shape, "mixed", member)
    checkpoint = write(tmp_path / "elastic", shape, {"mixed": member}, own=own)
    extract(checkpoint.config(tmp_path / "out", "mixed", export=export))
    tokens = random_tokens(shape)
    with torch.no_grad():
        found = elastic.load(tmp_path / "out")(tokens, use_cache=False).logits
    assert_near(found, expected(checkpoint, "mixed", tokens))


def test_blocks_of_a_large_member_are_verified_with_them(
    owning: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.extract.verify.MEMORY_BYTES", 0)
    monkeypatch.setattr("elastic.extract.verify.whole_model_bytes", lambda member: 1 << 62)
    extract(owning.config(tmp_path / "out", "small"))


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


NORM = "small/backbone.norm_f.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "members.safetensors: not found"),
    "not safetensors": (lambda path: path.write_bytes(b"once"), "members.safetensors: damaged"),
    "a norm missing": (edited(lambda t: t.pop(NORM)), "norm_f.weight has shape None, but must"),
    "a wrong shape": (edited(lambda t: t.update({NORM: torch.ones(9)})), r"shape \(9,\), but must"),
    "a norm too many": (
        edited(lambda t: t.update({"small/x.norm": torch.ones(9)})),
        r"x.norm has shape \(9,\), but must have None",
    ),
    "not finite": (edited(lambda t: t[NORM].fill_(torch.nan)), "norm_f.weight is not finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_anything_else_is_refused_in_one_line(
    owning: Checkpoint, tmp_path: Path, damage: str
) -> None:
    change, line = DAMAGE[damage]
    change(owning.path / MEMBERS)
    with pytest.raises(ValueError, match=line) as caught:
        extract(owning.config(tmp_path / "out", "small"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
