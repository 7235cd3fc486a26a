"""The check of a member too large to run: every tensor re-read, blocks compared one at a time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import NANO_12B
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import NemotronHForCausalLM

from elastic.extract import compare
from elastic.extract import verify_blocks as blocks
from elastic.extract.compare import TOLERANCE, VerificationError, model_class
from elastic.extract.export import extract
from elastic.extract.slice import OpenMember, open_member
from elastic.extract.verify import MEMORY_BYTES, verify, whole_model_bytes
from elastic.members.architecture import Architecture
from elastic.storage.store import TensorStore


def verify_in_blocks(output: Path, member: OpenMember) -> compare.Verified:
    """As if the model did not fit."""
    return verify(output, member, memory_bytes=0)


@pytest.fixture
def small(checkpoint: Any, tmp_path: Path) -> tuple[Path, OpenMember]:
    output = extract(checkpoint.config(tmp_path / "out", verify=False))
    return output, open_member(checkpoint.path, "small")


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FORMS = [
    ("checkpoint", "full", "native"),
    ("checkpoint", "small", "native"),
    ("checkpoint", "uneven", "per_layer"),
    ("mixed", "mixed", "padded"),
    ("mixed", "mixed", "per_layer"),
]


@pytest.mark.parametrize("dtype", ["source", "bfloat16"])
@pytest.mark.parametrize(("fixture", "budget", "export"), FORMS)
def test_a_true_extraction_passes(
    fixture: str, budget: str, export: str, dtype: str, request: Any, tmp_path: Path
) -> None:
    written = request.getfixturevalue(fixture)
    settings = {"verify": False, "export": export, "dtype": dtype, "max_shard_bytes": 3000}
    output = extract(written.config(tmp_path / "out", budget, **settings))
    kind = None if dtype == "source" else torch.bfloat16
    member = open_member(written.path, budget, kind, export)
    verified = verify_in_blocks(output, member)
    count = len(member.member.architecture.layers)
    assert verified.check == "blocks" and verified.share <= TOLERANCE / 10
    assert f"{count} of {count} blocks" in str(verified)


def swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    """The two MLP layers of `small`, which are of one size."""
    for name in ("norm.weight", "mixer.up_proj.weight", "mixer.down_proj.weight"):
        one, other = (f"backbone.layers.{index}.{name}" for index in (1, 3))
        tensors[one], tensors[other] = tensors[other], tensors[one]


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a word that no test would say": (
        lambda out: edit(out, lambda t: t["backbone.embeddings.weight"][37, 5].mul_(1.001)),
        "embeddings.weight differs from the cut of the checkpoint in rows 0 to 39",
    ),
    "two layers swapped": (
        lambda out: edit(out, swap_layers),
        "layers.1.norm.weight differs from the cut",
    ),
    "eps": (
        lambda out: edit_config(out, layer_norm_epsilon=1e-6),
        "config.json has layer_norm_epsilon=1e-06 instead of 1e-05",
    ),
    "a head size": (
        lambda out: edit_config(out, mamba_head_dim=6),
        "mamba_head_dim=6 instead of 5",
    ),
    "one more setting": (lambda out: edit_config(out, extra=1), "extra=1 instead of None"),
    "a type": (
        lambda out: edit(out, lambda t: t.update({k: v.double() for k, v in t.items()})),
        "is stored as torch.float64 instead of torch.float32",
    ),
    "a tensor gone": (lambda out: edit(out, lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "a file cut short": (
        lambda out: (out / "model.safetensors").open("r+b").truncate(5000),
        "truncated or damaged",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_the_member_is_noticed(small: tuple[Path, OpenMember], name: str) -> None:
    output, member = small
    change, message = SPOILT[name]
    change(output)
    with pytest.raises(VerificationError, match=message) as caught:
        verify_in_blocks(output, member)
    assert len(str(caught.value).splitlines()) == 1


def test_the_check_of_the_whole_model_reads_everything_again_too(
    small: tuple[Path, OpenMember],
) -> None:
    """Its logits say nothing of words that are not in the text, nor of small differences."""
    edit(small[0], lambda tensors: tensors["backbone.embeddings.weight"][37, 5].mul_(1 + 1e-6))
    with pytest.raises(VerificationError, match="differs from the cut"):
        verify(*small)
    edit_config(small[0], layer_norm_epsilon=1.001e-5)
    with pytest.raises(VerificationError, match="1.001e-05 instead of 1e-05"):
        verify(*small)


@pytest.mark.parametrize(
    "change", [{"mamba_head_dim": 6}, {"num_attention_heads": 6}, {"layers_block_type": ["mlp"]}]
)
def test_transformers_must_build_what_is_stored(
    small: tuple[Path, OpenMember], change: dict[str, Any]
) -> None:
    """Even if the configuration is the one that we wanted."""
    output, member = small
    edit_config(output, **change)
    with pytest.raises(VerificationError, match="transformers has tensor .* of shape"):
        verify_in_blocks(output, replace(member, config=member.config | change))


def test_padding_is_zero(mixed: Any, tmp_path: Path) -> None:
    output = extract(mixed.config(tmp_path / "out", "mixed", verify=False, export="padded"))
    name = "backbone.layers.0.mixer.up_proj.weight"  # 3 of 8 units are the member's
    edit(output, lambda tensors: tensors[name][7, 2].fill_(1e-30))
    with pytest.raises(VerificationError, match=f"{name} differs from the cut"):
        verify_in_blocks(output, open_member(mixed.path, "mixed", export="padded"))


def test_values_that_a_narrow_type_cannot_hold(write: Any, checkpoint: Any, tmp_path: Path) -> None:
    def fill(parent: nn.Module) -> None:
        parent.state_dict()["backbone.embeddings.weight"][5, 2] = 1e6

    members = {"small": checkpoint.member("small")}
    written = write(tmp_path / "e", checkpoint.parent.shape, members, fill=fill)
    output = extract(written.config(tmp_path / "out", dtype="float16", verify=False))
    with pytest.raises(VerificationError, match="embeddings.weight are not finite; a wider dtype"):
        verify_in_blocks(output, open_member(written.path, "small", torch.float16))


# The forward of blocks alone: what equal tensors cannot know is whether the cut itself is right.


def compare_blocks(output: Path, member: OpenMember, attention: str = "sdpa") -> tuple[float, int]:
    stored = TensorStore(output, {tensor.name: tensor.shape for tensor in member.tensors()})
    kind: Any = model_class(member)
    config = kind.config_class.from_pretrained(output, attn_implementation=attention)
    with torch.device("meta"):
        model: NemotronHForCausalLM = kind(config).eval()
    with torch.no_grad():
        return blocks.check_blocks(model, stored, member)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_causal_whatever_computes_it(
    small: tuple[Path, OpenMember], attention: str
) -> None:
    """One of them asks for a mask."""
    assert compare_blocks(*small, attention)[0] <= TOLERANCE / 10


NAMES = {
    "backbone.embeddings.weight": "embeddings",
    "backbone.layers.0.mixer.in_proj.weight": r"block 0 \(mamba\)",
    "backbone.layers.0.mixer.conv1d.bias": r"block 0 \(mamba\)",
    "backbone.layers.0.mixer.A_log": r"block 0 \(mamba\)",
    "backbone.layers.0.mixer.D": r"block 0 \(mamba\)",
    "backbone.layers.0.mixer.dt_bias": r"block 0 \(mamba\)",
    "backbone.layers.0.mixer.norm.weight": r"block 0 \(mamba\)",
    "backbone.layers.1.mixer.down_proj.weight": r"block 1 \(mlp\)",
    "backbone.layers.2.mixer.q_proj.weight": r"block 2 \(attention\)",
    "backbone.layers.3.norm.weight": r"block 3 \(mlp\)",
    "backbone.norm_f.weight": "logits of random states",
    "lm_head.weight": "logits of random states",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_in_another_order_is_noticed_by_its_block(
    small: tuple[Path, OpenMember], name: str
) -> None:
    """The units of one tensor shifted by one: the mistake that a wrong cut makes."""
    edit(small[0], lambda tensors: tensors.update({name: tensors[name].roll(1, 0).clone()}))
    with pytest.raises(VerificationError, match=f"{NAMES[name]}.* differ by .* of the largest"):
        compare_blocks(*small)


def test_an_eps_ten_times_smaller_is_noticed_by_every_block(
    small: tuple[Path, OpenMember], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(small[0], layer_norm_epsilon=1e-6)
    with pytest.raises(VerificationError, match="logits of random states"):
        compare_blocks(*small)
    monkeypatch.setattr(blocks, "_ends", lambda *_: 0.0)
    for position in range(4):
        monkeypatch.setattr(blocks, "sampled", lambda *_, position=position: [position])
        with pytest.raises(VerificationError, match=f"block {position} "):
            compare_blocks(*small)


def test_one_block_is_in_memory_at_a_time(
    small: tuple[Path, OpenMember], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[nn.Module] = []
    most = []
    fill = compare.fill

    def counting(module: nn.Module, *arguments: Any) -> None:
        fill(module, *arguments)
        if not isinstance(module, nn.Module) or len(list(module.parameters())) > 1:  # no norms
            filled.append(module)
            most.append(sum(not next(m.parameters()).is_meta for m in filled))

    monkeypatch.setattr(blocks, "fill", counting)
    compare_blocks(*small)
    assert most == [1] * 8, "four of the parent, four of the member"


def test_a_sample_has_both_ends_and_every_size(mixed: Any, checkpoint: Any) -> None:
    """In `mixed` every layer is of a size of its own; `full` has two of a kind."""
    drawn = blocks.sampled(open_member(mixed.path, "mixed", export="padded"), all_below=0)
    assert drawn == [0, 1, 2, 3, 4]
    member = open_member(checkpoint.path, "full")
    drawn = blocks.sampled(member, all_below=0)
    assert {0, 2, 4} <= set(drawn) <= set(range(5)), "M-*M-"
    assert drawn == blocks.sampled(member, all_below=0), "the same every time"
    assert blocks.sampled(member) == [0, 1, 2, 3, 4], "all of a small one"


def test_a_member_of_9b_is_compared_by_blocks(checkpoint: Any) -> None:
    """And a member of a hundred million parameters still as a whole."""

    class Large:
        parent = shape = NANO_12B
        stored_parameters = 8_900_000_000

        def tensors(self) -> list[Any]:
            return []

    large: Any = Large()
    assert whole_model_bytes(large) > MEMORY_BYTES
    member = open_member(checkpoint.path, "full")
    assert whole_model_bytes(member) < MEMORY_BYTES
    assert Architecture.full(member.parent) == member.member.architecture
