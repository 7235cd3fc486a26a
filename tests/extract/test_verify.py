"""Verification fails when it should: other weights, other keys, other sizes, not finite."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import assert_near, random_tokens
from safetensors.torch import load_file, save_file
from transformers.models.nemotron_h import modeling_nemotron_h

import elastic.extract.export as export
from elastic.extract.compare import TOLERANCE, VerificationError, Verified, plain_transformers
from elastic.extract.export import extract
from elastic.extract.slice import open_member
from elastic.extract.verify import parent_logits, verify
from elastic.parent import HybridParent
from elastic.routing.masks import hard_keep
from elastic.storage.reading import converted


@pytest.fixture
def extracted(checkpoint: Any, tmp_path: Path) -> Path:
    return extract(checkpoint.config(tmp_path / "out", verify=False))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("budget", ["full", "medium", "small"])
def test_a_true_extraction_passes(checkpoint: Any, tmp_path: Path, budget: str) -> None:
    output = extract(checkpoint.config(tmp_path / "out", budget, verify=False))
    verified = verify(output, open_member(checkpoint.path, budget))
    assert verified.check == "logits" and verified.share <= TOLERANCE / 10
    assert "tensors are those of the cut, logits are within" in str(verified)


@pytest.mark.parametrize("export", ["padded", "per_layer"])
def test_an_extraction_of_many_widths_passes(mixed: Any, tmp_path: Path, export: str) -> None:
    output = extract(mixed.config(tmp_path / "out", "mixed", verify=False, export=export))
    verified = verify(output, open_member(mixed.path, "mixed", export=export))
    assert verified.check == "logits" and verified.share <= TOLERANCE / 10


NAMES = [
    "backbone.embeddings.weight",
    "backbone.layers.0.mixer.in_proj.weight",
    "backbone.layers.0.mixer.A_log",
    "backbone.layers.0.mixer.dt_bias",
    "backbone.layers.0.mixer.norm.weight",
    "backbone.layers.1.mixer.down_proj.weight",
    "backbone.layers.2.mixer.q_proj.weight",
    "backbone.layers.3.norm.weight",
    "backbone.norm_f.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_in_another_order_is_noticed(checkpoint: Any, extracted: Path, name: str) -> None:
    """The units of one tensor shifted by one: the mistake that a wrong cut makes."""
    edit(extracted, lambda tensors: tensors.update({name: tensors[name].roll(1, 0).clone()}))
    with pytest.raises(VerificationError, match="logits .* differ by .* of the largest, more than"):
        verify(extracted, open_member(checkpoint.path, "small"))


PROBLEMS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("backbone.layers.0.mixer.D"), "missing_keys"),
    "unexpected": (lambda t: t.update(extra=torch.ones(1)), "unexpected_keys"),
    "mismatched": (
        lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}),
        "cannot load|mismatch",
    ),
    "not a number": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * torch.nan}),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_checkpoint_that_does_not_load_cleanly_fails(
    checkpoint: Any, extracted: Path, name: str
) -> None:
    change, message = PROBLEMS[name]
    edit(extracted, change)
    with pytest.raises(VerificationError, match=message) as caught:
        verify(extracted, open_member(checkpoint.path, "small"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_difference_leaves_no_output(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check runs on the temporary directory, before it gets its name."""
    seen = []

    def spoil(directory: Path, member: Any) -> Verified:
        seen.append(directory.name)
        edit(directory, lambda tensors: tensors["backbone.norm_f.weight"].mul_(1.01))
        return verify(directory, member)

    monkeypatch.setattr(export, "verify", spoil)
    with pytest.raises(VerificationError, match="nothing was written"):
        extract(checkpoint.config(tmp_path / "new" / "out"))
    assert seen[0].startswith(".out.tmp") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_streamed_parent_is_the_parent(checkpoint: Any, dtype: torch.dtype | None) -> None:
    """A block in memory at a time computes what all of them do; weights are rounded first."""
    member = open_member(checkpoint.path, "small", dtype)
    tokens = random_tokens(member.parent)
    whole = HybridParent(member.parent)
    for name, weight in whole.state_dict().items():
        source = checkpoint.parent.state_dict()[name]
        weight.copy_(source.to(converted(name, source.dtype, dtype)))
    with torch.no_grad():
        expected = whole.logits(tokens, hard_keep(member.parent, member.member.architecture))
        assert_near(parent_logits(member, tokens), expected)


def test_the_streamed_parent_holds_one_block_at_a_time(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    plain = HybridParent.forward

    def forward(self: HybridParent, *arguments: Any) -> torch.Tensor:
        def count(*_: Any) -> None:
            blocks = self.backbone.layers
            held.append(sum(not next(block.parameters()).is_meta for block in blocks))

        for block in self.backbone.layers:
            block.norm.register_forward_hook(count)
        return plain(self, *arguments)

    monkeypatch.setattr(HybridParent, "forward", forward)
    member = open_member(checkpoint.path, "small")
    parent_logits(member, random_tokens(member.parent))
    assert held == [1] * 5


def test_installed_gpu_kernels_are_not_asked(
    checkpoint: Any, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They refuse CPU tensors; transformers would call them wherever mamba_ssm is installed."""
    plain = modeling_nemotron_h.mamba2_chunk_scan

    @functools.wraps(plain.__wrapped__)
    def kernel(*arguments: Any, **options: Any) -> torch.Tensor:
        raise ValueError("cpu tensor?")

    kernel.__module__ = modeling_nemotron_h.__name__
    monkeypatch.setattr(modeling_nemotron_h, "mamba2_chunk_scan", kernel)
    assert verify(extracted, open_member(checkpoint.path, "small")).share <= TOLERANCE
    assert modeling_nemotron_h.mamba2_chunk_scan is kernel, "put back afterwards"
    with plain_transformers():
        assert modeling_nemotron_h.mamba2_chunk_scan is plain.__wrapped__
