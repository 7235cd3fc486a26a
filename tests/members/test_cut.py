"""The table of prefixes: ranges against enumeration, shapes against a parent of that size."""

import pytest
import torch
from helpers.strategies import (
    architectures,
    cut_shape,
    indices,
    kept_regions,
    members,
    shapes,
    tiny_member,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ParentShape
from elastic.members.architecture import Architecture, MambaLayer
from elastic.members.cut import (
    grouped,
    kept_shape,
    layer_cut,
    member_cuts,
    prefix,
    size_of,
    tensor_shapes,
)
from elastic.parent import HybridParent
from elastic.parent.layers import narrow

Drawn = tuple[ParentShape, Architecture]


def test_prefix_keeps_the_first() -> None:
    assert prefix(3, 5) == ((0, 3),)
    assert prefix(5, 5) is None
    assert size_of(prefix(3, 5), 5) == 3
    assert size_of(None, 5) == 5


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_grouped_is_the_corner_of_every_group(
    groups: int, units: int, width: int, data: st.DataObject
) -> None:
    """Against slicing a (groups, units, width) array of indices."""
    kept, kept_width = data.draw(st.integers(1, units)), data.draw(st.integers(1, width))
    grid = torch.arange(groups * units * width).view(groups, units, width)
    expected = grid[:, :kept, :kept_width].flatten().tolist()
    ranges = grouped(groups, units, kept, width, kept_width)
    assert indices(ranges, grid.numel()) == expected
    assert size_of(ranges, grid.numel()) == len(expected)


@given(members())
def test_ranges_are_ascending_disjoint_joined_and_inside(drawn: Drawn) -> None:
    """What a reader of bytes relies on: each range once, none empty, no two that touch."""
    shape, member = drawn
    sizes = tensor_shapes(shape)
    for cut in member_cuts(shape, member):
        for ranges, size in zip(cut.cut, sizes[cut.source], strict=True):
            if ranges is None:
                continue
            assert ranges != ((0, size),), "a whole dimension is None"
            borders = [border for pair in ranges for border in pair]
            assert borders == sorted(set(borders))
            assert 0 <= borders[0] and borders[-1] <= size


@given(members(homogeneous=True))
def test_a_member_has_the_tensors_of_a_parent_of_its_size(drawn: Drawn) -> None:
    """Names numbered anew, shapes as if it had been built so, in stored order."""
    shape, member = drawn
    sizes = tensor_shapes(shape)
    found = {
        cut.target: kept_shape(cut.cut, sizes[cut.source]) for cut in member_cuts(shape, member)
    }
    expected = tensor_shapes(cut_shape(shape, member))
    assert found == expected
    assert list(found) == list(expected)


@given(shapes())
def test_the_parent_is_the_cut_that_cuts_nothing(shape: ParentShape) -> None:
    for cut in member_cuts(shape, Architecture.full(shape)):
        assert cut.source == cut.target
        assert all(ranges is None for ranges in cut.cut)


@given(shapes())
def test_tensor_shapes_are_those_of_the_parent(shape: ParentShape) -> None:
    state = HybridParent(shape).state_dict()
    assert {name: tuple(weight.shape) for name, weight in state.items()} == tensor_shapes(shape)


@given(shapes(), st.data())
def test_a_nested_member_reads_only_what_the_outer_one_reads(
    shape: ParentShape, data: st.DataObject
) -> None:
    outer, other = data.draw(architectures(shape)), data.draw(architectures(shape))
    theirs = {layer.index: layer for layer in other.layers}
    layers = tuple(
        type(layer)(
            **{
                name: min(value, getattr(theirs.get(layer.index, layer), name))
                for name, value in vars(layer).items()
            }
        )
        for layer in outer.layers
    )
    inner = Architecture(min(outer.hidden_size, other.hidden_size), layers)
    assert inner.is_within(outer)
    inside, outside = kept_regions(shape, inner), kept_regions(shape, outer)
    for name in inside:
        assert not (inside[name] & ~outside[name]).any(), name


def test_a_mamba_cut_written_out() -> None:
    """Two groups of three heads of seven channels; two heads of five stay in each group."""
    shape = tiny_shape()
    cuts = layer_cut(shape, 8, MambaLayer(0, 4, 5))
    heads = [0, 1, 3, 4]
    inner = [head * 7 + channel for head in heads for channel in range(5)]
    state = list(range(42, 42 + 12))  # B and C follow x, whole
    assert indices(cuts["mixer.A_log"][0], 6) == heads
    assert cuts["mixer.D"] == cuts["mixer.dt_bias"] == cuts["mixer.A_log"]
    assert indices(cuts["mixer.norm.weight"][0], 42) == inner
    assert indices(cuts["mixer.out_proj.weight"][0], 13) == list(range(8))
    assert indices(cuts["mixer.out_proj.weight"][1], 42) == inner
    assert indices(cuts["mixer.conv1d.weight"][0], 54) == inner + state
    assert cuts["mixer.conv1d.weight"][1:] == (None, None)
    assert cuts["mixer.conv1d.bias"] == (cuts["mixer.conv1d.weight"][0],)
    rows = inner + [42 + i for i in inner + state] + [96 + head for head in heads]  # z, x B C, dt
    assert indices(cuts["mixer.in_proj.weight"][0], 102) == rows
    assert indices(cuts["mixer.in_proj.weight"][1], 13) == list(range(8))


def test_an_attention_cut_keeps_the_first_queries_of_every_kv_group() -> None:
    cuts = layer_cut(tiny_shape(), 8, tiny_member().layers[2])
    rows = [*range(10), *range(15, 25)]  # two of three heads of five, in both groups
    assert indices(cuts["mixer.q_proj.weight"][0], 30) == rows
    assert cuts["mixer.o_proj.weight"] == (((0, 8),), cuts["mixer.q_proj.weight"][0])
    assert cuts["mixer.k_proj.weight"] == cuts["mixer.v_proj.weight"] == (None, ((0, 8),))


def test_dropped_layers_are_not_read_and_the_rest_is_numbered_anew() -> None:
    cuts = member_cuts(tiny_shape(), tiny_member())
    sources = {cut.source.split(".")[2] for cut in cuts if ".layers." in cut.source}
    targets = {cut.target.split(".")[2] for cut in cuts if ".layers." in cut.target}
    assert sources == {"0", "1", "2", "4"}
    assert targets == {"0", "1", "2", "3"}


def test_no_convolution_bias_no_cut_of_it() -> None:
    shape = tiny_shape(conv_bias=False)
    assert not any("conv1d.bias" in name for name in tensor_shapes(shape))


@given(members())
def test_narrowing_picks_exactly_the_kept_region(drawn: Drawn) -> None:
    """The executing side of the table, against a boolean mask."""
    shape, member = drawn
    regions = kept_regions(shape, member)
    for cut in member_cuts(shape, member):
        weight = torch.arange(regions[cut.source].numel()).view(regions[cut.source].shape)
        narrowed = narrow(weight, cut.cut)
        assert torch.equal(narrowed.flatten(), weight[regions[cut.source]])


@pytest.mark.parametrize("rows", [((0, 2),), ((0, 1), (3, 5))], ids=["one_range", "two_ranges"])
def test_gradients_flow_through_a_narrowed_weight(rows: tuple[tuple[int, int], ...]) -> None:
    weight = torch.zeros(5, 4, requires_grad=True)
    narrow(weight, (rows, ((0, 3),))).sum().backward()
    expected = torch.zeros(5, 4)
    for start, stop in rows:
        expected[start:stop, :3] = 1
    assert torch.equal(weight.grad, expected)
