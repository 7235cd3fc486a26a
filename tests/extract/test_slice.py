"""Only a member's bytes are read, they are the right ones, and padding is in its place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import kept_regions, tiny_shape

from elastic.extract.slice import open_member, padded, stored_shape
from elastic.members.architecture import Architecture, MLPLayer
from elastic.members.cut import member_cuts, tensor_shapes
from elastic.parent import HybridParent


@pytest.mark.parametrize("budget", ["full", "medium", "small"])
def test_a_member_is_the_kept_region_of_every_tensor(checkpoint: Any, budget: str) -> None:
    """Against the plain list of kept elements, in order."""
    member = open_member(checkpoint.path, budget)
    architecture, weights = member.member.architecture, checkpoint.parent.state_dict()
    regions = kept_regions(member.parent, architecture)
    found = {tensor.name: tensor for tensor in member.tensors()}
    assert found.keys() == tensor_shapes(member.shape).keys()
    for name, tensor in found.items():
        source = name
        if ".layers." in name:
            position, rest = name.removeprefix("backbone.layers.").split(".", 1)
            source = f"backbone.layers.{architecture.layers[int(position)].index}.{rest}"
        value = tensor.read()
        assert tuple(value.shape) == tensor_shapes(member.shape)[name]
        assert tensor.bytes == value.numel() * value.element_size()
        torch.testing.assert_close(
            value.flatten(), weights[source][regions[source]], rtol=0, atol=0
        )


@pytest.mark.parametrize("budget", ["full", "medium", "small"])
def test_exactly_the_members_elements_are_read(checkpoint: Any, reads: Any, budget: str) -> None:
    """Several ranges are read one by one; nothing that the member drops is touched."""
    member = open_member(checkpoint.path, budget)
    assert reads.elements == 0, "checking a checkpoint must read headers only"
    for tensor in member.tensors():
        tensor.read()
    assert reads.elements == member.parameters
    dropped = {"backbone.layers.3"} if budget == "small" else set()
    assert not dropped & {key.rsplit(".mixer", 1)[0] for key in reads.names}


def test_padding_is_not_read(mixed: Any, reads: Any) -> None:
    """A padded member costs its own bytes to read, not the padding's."""
    member = open_member(mixed.path, "mixed", export="padded")
    stored = sum(tensor.read().numel() for tensor in member.tensors())
    assert reads.elements == member.parameters < stored == member.stored_parameters


@pytest.mark.parametrize("block_bytes", [1, 12, 1000])
def test_padding_puts_zeros_behind_the_units_of_every_group(block_bytes: int) -> None:
    """Two groups of two rows become two groups of three, whatever the blocks."""
    compact = torch.arange(1.0, 9).view(4, 2)
    for size in (1, 3, 4):
        blocks = compact.split(size)
        place = (((0, 2), (3, 5)), ((0, 1), (2, 3)))
        out = torch.cat(list(padded(blocks, place, (6, 3), block_bytes)))
        assert torch.equal(out[[0, 1, 3, 4]][:, [0, 2]], compact)
        assert out.count_nonzero() == compact.numel() and out.shape == (6, 3)


def test_padded_query_heads_sit_inside_their_kv_group(mixed: Any) -> None:
    """The layer with 2 of 4 stored query heads keeps one per KV group, zeros after each."""
    member = open_member(mixed.path, "mixed", export="padded")
    tensors = {tensor.name: tensor.read() for tensor in member.tensors()}
    rows = tensors["backbone.layers.1.mixer.q_proj.weight"].unflatten(0, (4, 5))
    source = mixed.parent.state_dict()["backbone.layers.2.mixer.q_proj.weight"].unflatten(0, (6, 5))
    assert torch.equal(rows[[0, 2]], source[[0, 3], :, :9])
    assert rows[[1, 3]].abs().sum() == 0
    columns = tensors["backbone.layers.1.mixer.o_proj.weight"].unflatten(1, (4, 5))
    assert columns[:, [1, 3]].abs().sum() == 0 < columns[:, [0, 2]].abs().min()


def test_a_smaller_member_is_made_of_the_larger_ones_weights(
    write: Callable[..., Any], checkpoint: Any, tmp_path: Path
) -> None:
    """Every weight of the parent is a number of its own, so that inclusion can be seen."""

    def number(parent: HybridParent) -> None:
        start = 1
        for weight in parent.parameters():
            values = torch.arange(start, start + weight.numel()).view(weight.shape)
            weight.data.copy_(values)
            start += weight.numel()
        assert start < 2**24, "float32 counts exactly up to here"

    members = {name: checkpoint.member(name) for name in ("full", "medium", "small")}
    written = write(tmp_path / "elastic", checkpoint.parent.shape, members, fill=number)
    for inner, outer in (("small", "medium"), ("medium", "full"), ("small", "full")):
        assert members[inner].is_within(members[outer])
        outer_tensors = by_source(open_member(written.path, outer))
        for source, value in by_source(open_member(written.path, inner)).items():
            larger = outer_tensors[source]
            assert torch.isin(value, larger).all(), source
            assert all(a <= b for a, b in zip(value.shape, larger.shape, strict=True))
    assert not members["medium"].is_within(members["small"])


def by_source(member: Any) -> dict[str, torch.Tensor]:
    """A member's tensors, by the parent's names."""
    cuts = member_cuts(member.parent, member.member.architecture)
    return {cut.source: tensor.read() for cut, tensor in zip(cuts, member.tensors(), strict=True)}


def test_kinds_without_a_kept_layer_keep_the_parents_sizes() -> None:
    """config.json must stay legal for them."""
    shape = tiny_shape(tied_head=True)
    stored = stored_shape(shape, Architecture(5, (MLPLayer(1, 3),)))
    expected = replace(shape, pattern="-", hidden_size=5, intermediate_size=3, tied_head=False)
    assert stored == expected


@pytest.mark.parametrize("budget", ["mixed", "uneven"])
def test_at_true_size_exactly_the_members_elements_are_read_and_stored(
    checkpoint: Any, mixed: Any, reads: Any, budget: str
) -> None:
    """Mamba widths included; config.json says every layer's sizes, and the widest once."""
    written = mixed if budget == "mixed" else checkpoint
    member = open_member(written.path, budget, export="per_layer")
    stored = sum(tensor.read().numel() for tensor in member.tensors())
    assert reads.elements == stored == member.parameters == member.stored_parameters
    assert member.config["model_type"] == "nemotron_h_elastic"
    layers = member.config["per_layer_config"]
    if budget == "uneven":
        assert layers == {
            "0": {"mamba_num_heads": 4, "mamba_head_dim": 6},
            "1": {"intermediate_size": 5},
            "2": {"num_attention_heads": 4},
            "3": {"mamba_num_heads": 2, "mamba_head_dim": 7},
        }
    assert member.config["mamba_num_heads"] == 4 and member.config["mamba_head_dim"] == 7
