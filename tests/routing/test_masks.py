"""Distributions -> masks: survival functions, groups and gates, and what they mean to the parent.

Compared: soft masks with probabilities counted by hand, one-hot distributions with hard masks, and
a batch of several members with each member alone.
"""

import pytest
import torch
from helpers.strategies import (
    assert_near,
    difference,
    probe,
    random_parent,
    random_tokens,
    selections,
    shapes,
    spaces,
    tiny_member,
    tiny_shape,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import elastic.routing.masks
from elastic.config import AXES, ParentShape, SpaceConfig
from elastic.members.architecture import Architecture, Selection, Space
from elastic.parent import Keep
from elastic.routing.masks import constant, hard_keep, layer_gates, prefix_masks, soft_keep

DROP_ORDER = (3, 1)


def tiny_space(heterogeneous: list[str] | None = None) -> Space:
    """Every axis of `tiny_shape()`, two or three choices each."""
    config = SpaceConfig(
        hidden=[13, 8],
        ffn=[17, 9, 3],
        mamba_heads=[6, 4, 2],
        mamba_head_dim=[7, 5],
        attention_heads=[6, 4],
        depth=[5, 4, 3],
        heterogeneous=heterogeneous or [],
    )
    return Space.build(config, tiny_shape())


def one_hot(space: Space, chosen: list[Selection]) -> dict[str, Tensor]:
    """Distributions that are certain: one row per selection."""
    return {
        axis: torch.stack(
            [torch.eye(len(space.choices[axis]))[list(selection[axis])] for selection in chosen]
        )
        for axis in AXES
    }


def uniform(space: Space, batch: int = 1) -> dict[str, Tensor]:
    """Every choice alike."""
    return {
        axis: torch.full(
            (batch, space.decisions(axis), len(space.choices[axis])), 1 / len(space.choices[axis])
        )
        for axis in AXES
    }


def random_distributions(space: Space, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        axis: torch.randn(value.shape, generator=generator).softmax(-1).requires_grad_()
        for axis, value in uniform(space, batch).items()
    }


# Prefixes and staircases


def test_prefix_masks_written_out() -> None:
    assert prefix_masks([4, 2, 1], 4).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_every_group_keeps_the_same_number_of_its_own_first_units() -> None:
    expected = [[1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0]]
    assert prefix_masks([4, 2], 6, groups=2).tolist() == expected


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_a_grouped_mask_repeats_one_group(groups: int, units: int, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.integers(1, units), min_size=1, max_size=3))
    masks = prefix_masks([groups * count for count in kept], groups * units, groups)
    assert torch.equal(masks, prefix_masks(kept, units).repeat(1, groups))
    assert masks.sum(-1).tolist() == [groups * count for count in kept]


def test_expected_mask_is_the_survival_function() -> None:
    """Unit i stays with the probability that the kept prefix is longer than i."""
    space = tiny_space()
    distributions = uniform(space) | {"ffn": torch.tensor([[[0.5, 0.3, 0.2]]])}
    width = soft_keep(space, DROP_ORDER, distributions).layers[1].width[0]
    expected = [1.0] * 3 + [0.8] * 6 + [0.5] * 8  # kept by all; by 17 and 9; by 17 alone
    assert torch.allclose(width, torch.tensor(expected))


def test_the_expected_mask_sums_to_the_expected_size() -> None:
    space = tiny_space(["ffn", "mamba_heads", "attention_heads"])
    distributions = random_distributions(space, batch=3)
    keep = soft_keep(space, DROP_ORDER, distributions)
    mean = {
        axis: value @ torch.tensor(space.choices[axis], dtype=torch.float32)
        for axis, value in distributions.items()
    }
    assert torch.allclose(keep.hidden.sum(-1), mean["hidden"][:, 0])
    for axis in ("ffn", "mamba_heads", "attention_heads"):
        for decision, index in enumerate(space.layers_of(axis)):
            assert torch.allclose(keep.layers[index].width.sum(-1), mean[axis][:, decision])
    assert torch.allclose(keep.layers[0].channels.sum(-1), mean["mamba_head_dim"][:, 0])
    gates = torch.stack([layer.gate for layer in keep.layers], dim=-1)
    assert torch.allclose(gates.sum(-1), mean["depth"][:, 0])


def test_layers_of_a_heterogeneous_axis_have_their_own_masks() -> None:
    space = tiny_space(["ffn"])
    chosen = {axis: (0,) * space.decisions(axis) for axis in AXES} | {"ffn": (1, 2)}
    keep = soft_keep(space, DROP_ORDER, one_hot(space, [chosen]))
    assert keep.layers[1].width.sum() == 9
    assert keep.layers[4].width.sum() == 3
    assert keep.layers[0].width is not None and keep.layers[0].channels is not None
    assert keep.layers[1].channels is None and keep.layers[2].channels is None


def test_axes_without_a_distribution_have_no_mask() -> None:
    keep = soft_keep(tiny_space(), DROP_ORDER, {})
    assert keep.hidden is None
    for layer in keep.layers:
        assert layer.gate is None and layer.width is None and layer.channels is None


# Gates


def test_layer_gates_written_out() -> None:
    """Dropping 0, 1 or 2 layers with probability .5, .3, .2, first layer 3, then layer 1."""
    probabilities = torch.tensor([[[0.5, 0.3, 0.2]]])
    gates = layer_gates(probabilities, tiny_space(), DROP_ORDER)
    assert torch.allclose(gates, torch.tensor([[1, 0.8, 1, 0.5, 1]]))


def test_layers_that_are_never_dropped_have_gate_one() -> None:
    space = tiny_space()
    always_most = torch.tensor([[[0.0, 0.0, 1.0]]])
    assert layer_gates(always_most, space, (3, 1)).tolist() == [[1, 0, 1, 0, 1]]
    assert layer_gates(always_most, space, (3, 1, 2, 4)).tolist() == [[1, 0, 1, 0, 1]]
    assert layer_gates(always_most, space, (0, 4)).tolist() == [[0, 1, 1, 1, 0]]


# One-hot distributions are hard masks


def assert_same_function(shape: ParentShape, soft: Keep, member: Architecture) -> None:
    parent, tokens = random_parent(shape), random_tokens(shape)
    expected = parent.logits(tokens, member)
    assert_near(parent.logits(tokens, soft), expected)


@settings(max_examples=40)  # few draws set an axis layer by layer
@given(shapes(), st.data())
def test_certain_distributions_compute_the_member_they_select(
    shape: ParentShape, data: st.DataObject
) -> None:
    space = data.draw(spaces(shape))
    selection = data.draw(selections(space))
    drop_order = tuple(data.draw(st.permutations(range(len(shape.pattern)))))
    member = space.architecture(selection, drop_order)
    soft = soft_keep(space, drop_order, one_hot(space, [selection]))
    assert_same_function(shape, soft, member)
    hard = hard_keep(shape, member)
    assert torch.equal(soft.hidden, hard.hidden)
    for mine, theirs in zip(soft.layers, hard.layers, strict=True):
        assert torch.equal(mine.gate, theirs.gate)
        if theirs.gate.item() == 1:
            assert torch.equal(mine.width, theirs.width)
            if theirs.channels is not None:
                assert torch.equal(mine.channels, theirs.channels)


def test_elastic_axes_alone_give_the_same_masks_as_all_axes() -> None:
    """The router speaks only for axes with more than one choice; the rest is left out."""
    shape = tiny_shape()
    space = Space.build(SpaceConfig(ffn=[17, 9], hidden=[13]), shape)
    selection = {axis: (0,) for axis in AXES} | {"ffn": (1,)}
    all_axes = one_hot(space, [selection])
    some = {axis: all_axes[axis] for axis in space.elastic_axes}
    assert set(some) == {"ffn"}
    parent, tokens = random_parent(shape), random_tokens(shape)
    with_all = parent.logits(tokens, soft_keep(space, (), all_axes))
    with_some = parent.logits(tokens, soft_keep(space, (), some))
    assert_near(with_some, with_all)


def test_hard_masks_of_a_dropped_layer_are_a_closed_gate() -> None:
    keep = hard_keep(tiny_shape(), tiny_member())
    assert [layer.gate.item() for layer in keep.layers] == [1, 1, 1, 0, 1]
    assert keep.layers[0].width.tolist() == [[1, 1, 0, 1, 1, 0]]
    assert keep.layers[0].channels.tolist() == [[1, 1, 1, 1, 1, 0, 0]]
    assert keep.layers[2].width.tolist() == [[1, 1, 0, 1, 1, 0]]


# Batches and gradients


def test_one_batch_may_mix_members() -> None:
    space = tiny_space(["mamba_heads"])
    chosen = [
        {axis: (0,) * space.decisions(axis) for axis in AXES},
        {axis: (len(space.choices[axis]) - 1,) * space.decisions(axis) for axis in AXES},
        {axis: (1,) * space.decisions(axis) for axis in AXES}
        | {"mamba_heads": (2, 0), "depth": (0,)},
    ]
    shape, tokens = tiny_shape(), random_tokens(tiny_shape(), batch=3)
    parent = random_parent(shape)
    mixed = parent.logits(tokens, soft_keep(space, DROP_ORDER, one_hot(space, chosen)))
    for row, selection in enumerate(chosen):
        alone = parent.logits(tokens[row : row + 1], space.architecture(selection, DROP_ORDER))
        assert_near(mixed[row : row + 1], alone)
    assert difference(mixed[:1], mixed[1:2]) > 0.1


def test_rows_of_soft_masks_do_not_see_each_other() -> None:
    space, tokens = tiny_space(), random_tokens(tiny_shape(), batch=3)
    distributions, parent = random_distributions(space, batch=3), random_parent(tiny_shape())
    mixed = parent.logits(tokens, soft_keep(space, DROP_ORDER, distributions))
    for row in range(3):
        own = {axis: value[row : row + 1] for axis, value in distributions.items()}
        alone = parent.logits(tokens[row : row + 1], soft_keep(space, DROP_ORDER, own))
        assert_near(mixed[row : row + 1], alone)


def test_one_distribution_serves_a_whole_batch() -> None:
    space, tokens = tiny_space(), random_tokens(tiny_shape(), batch=3)
    parent, one = random_parent(tiny_shape()), random_distributions(space, batch=1)
    three = {axis: value.expand(3, -1, -1) for axis, value in one.items()}
    shared = parent.logits(tokens, soft_keep(space, DROP_ORDER, one))
    assert_near(shared, parent.logits(tokens, soft_keep(space, DROP_ORDER, three)))


@pytest.mark.parametrize("layered", [[], ["ffn", "mamba_heads", "attention_heads"]])
def test_gradients_reach_every_probability(layered: list[str]) -> None:
    space = tiny_space(layered)
    distributions = random_distributions(space, batch=2)
    keep = soft_keep(space, DROP_ORDER, distributions)
    probe(random_parent(tiny_shape()).logits(random_tokens(tiny_shape()), keep)).backward()
    for axis, value in distributions.items():
        assert value.grad.isfinite().all(), axis
        assert (value.grad != 0).all(), axis


def test_gradients_of_probabilities_are_those_of_finite_differences() -> None:
    space, shape = tiny_space(), tiny_shape()
    parent, tokens = random_parent(shape), random_tokens(shape)
    distributions = random_distributions(space, batch=1)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return probe(parent.logits(tokens, soft_keep(space, DROP_ORDER, values)))

    loss(distributions).backward()
    fixed = {axis: value.detach() for axis, value in distributions.items()}
    step = 1e-2
    for axis, value in distributions.items():
        direction = torch.zeros_like(fixed[axis])
        direction[..., 0], direction[..., -1] = step, -step
        up = loss(fixed | {axis: fixed[axis] + direction})
        down = loss(fixed | {axis: fixed[axis] - direction})
        slope = (value.grad * direction).sum().item()
        assert ((up - down) / 2).item() == pytest.approx(slope, rel=0.05, abs=1e-3), axis


def test_masks_have_the_type_of_the_probabilities() -> None:
    space = tiny_space()
    double = {axis: value.double() for axis, value in uniform(space).items()}
    keep = soft_keep(space, DROP_ORDER, double)
    assert keep.hidden.dtype == keep.layers[0].gate.dtype == torch.float64
    assert keep.layers[0].width.dtype == keep.layers[0].channels.dtype == torch.float64


def test_a_constant_table_is_made_once_for_each_type_and_argument() -> None:
    """Made again in every step, it would be copied to the device in every step."""
    made = []

    def build(size: int) -> Tensor:
        made.append(size)
        return torch.ones(size)

    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    tables = [constant(build, (size,), like) for size in (2, 3, 2) for like in (single, double)]
    assert made == [2, 2, 3, 3]
    assert [len(table) for table in tables] == [2, 2, 3, 3, 2, 2]
    assert [table.dtype for table in tables] == [torch.float32, torch.float64] * 3
    soft_keep(tiny_space(), DROP_ORDER, uniform(tiny_space()))
    before = elastic.routing.masks._constant.cache_info().misses
    soft_keep(tiny_space(), DROP_ORDER, uniform(tiny_space()))
    assert elastic.routing.masks._constant.cache_info().misses == before
