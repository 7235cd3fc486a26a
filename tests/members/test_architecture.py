"""Members and spaces: what is legal, what is nested in what, and what a selection selects."""

import dataclasses
import json
from typing import Any

import pytest
from helpers.strategies import (
    architectures,
    members,
    selections,
    shapes,
    spaces,
    tiny_member,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import AXES, ConfigError, ParentShape, SpaceConfig
from elastic.members.architecture import (
    Architecture,
    AttentionLayer,
    MambaLayer,
    MLPLayer,
    Space,
    droppable_layers,
)

# Architecture.check


@given(members())
def test_every_drawn_member_is_legal(drawn: tuple[ParentShape, Architecture]) -> None:
    shape, member = drawn
    member.check(shape)
    Architecture.full(shape).check(shape)


@pytest.mark.parametrize(
    ("hidden", "layers", "message"),
    [
        (0, (MLPLayer(1, 3),), "architecture: hidden_size=0 must be in 1..13"),
        (14, (MLPLayer(1, 3),), "architecture: hidden_size=14 must be in 1..13"),
        (8, (), "architecture: layers=[] must be at least one kept layer"),
        (8, (MLPLayer(4, 3), MLPLayer(1, 3)), "layers=[4, 1] must be ascending, each index once"),
        (8, (MLPLayer(1, 3), MLPLayer(1, 3)), "layers=[1, 1] must be ascending, each index once"),
        (8, (MLPLayer(5, 3),), "layers[index=5]=5 must be in 0..4"),
        (8, (MLPLayer(-1, 3),), "layers[index=-1]=-1 must be in 0..4"),
        (8, (MLPLayer(0, 3),), "layers[index=0].kind=mlp must be mamba, as in the parent"),
        (8, (MLPLayer(1, 0),), "layers[index=1].intermediate_size=0 must be a multiple of 1 in"),
        (8, (MLPLayer(1, 18),), "intermediate_size=18 must be a multiple of 1 in 1..17"),
        (8, (MambaLayer(0, 3, 5),), "num_heads=3 must be a multiple of 2 in 2..6"),
        (8, (MambaLayer(0, 8, 5),), "num_heads=8 must be a multiple of 2 in 2..6"),
        (8, (MambaLayer(0, 4, 8),), "head_dim=8 must be a multiple of 1 in 1..7"),
        (8, (MambaLayer(0, 4, 0),), "head_dim=0 must be a multiple of 1 in 1..7"),
        (8, (AttentionLayer(2, 5),), "num_heads=5 must be a multiple of 2 in 2..6"),
        (8, (AttentionLayer(2, 0),), "num_heads=0 must be a multiple of 2 in 2..6"),
    ],
)
def test_illegal_member_is_refused_in_one_line(
    hidden: int, layers: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        Architecture(hidden, layers).check(tiny_shape())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# is_within is a partial order


@given(shapes(), st.data())
def test_nesting_is_a_partial_order(shape: ParentShape, data: st.DataObject) -> None:
    a, b, c = (data.draw(architectures(shape)) for _ in range(3))
    assert a.is_within(a)
    assert a.is_within(Architecture.full(shape))
    if a.is_within(b) and b.is_within(a):
        assert a == b
    if a.is_within(b) and b.is_within(c):
        assert a.is_within(c)


@given(members(), st.data())
def test_shrinking_any_one_size_nests_strictly(
    drawn: tuple[ParentShape, Architecture], data: st.DataObject
) -> None:
    """The chains that random pairs rarely form."""
    shape, outer = drawn
    inner = Architecture(data.draw(st.integers(1, outer.hidden_size)), outer.layers)
    if len(inner.layers) > 1:
        inner = inner.without({data.draw(st.sampled_from(inner.layers)).index})
    assert inner.is_within(outer) and inner.is_within(Architecture.full(shape))
    assert outer.is_within(inner) == (inner == outer)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_one_larger_size_in_one_layer_breaks_nesting(layer: int) -> None:
    small = tiny_member()
    for name in vars(small.layers[layer]):
        if name != "index":
            grown = dataclasses.replace(
                small.layers[layer], **{name: getattr(small.layers[layer], name) + 2}
            )
            layers = (*small.layers[:layer], grown, *small.layers[layer + 1 :])
            assert small.is_within(Architecture(8, layers))
            assert not Architecture(8, layers).is_within(small)
    assert not Architecture(9, small.layers).is_within(small)
    assert not small.is_within(small.without({small.layers[layer].index}))


def test_without_drops_by_parent_index() -> None:
    assert [layer.index for layer in tiny_member().without({1, 4, 3}).layers] == [0, 2]
    assert tiny_member().pattern == "M-*-"
    assert tiny_member().without({1}).pattern == "M*-"


# JSON


@given(members())
def test_json_round_trip_is_exact(drawn: tuple[ParentShape, Architecture]) -> None:
    member = drawn[1]
    assert Architecture.from_json(json.loads(json.dumps(member.to_json()))) == member


def test_json_has_the_documented_form() -> None:
    assert tiny_member().to_json() == {
        "hidden_size": 8,
        "layers": [
            {"index": 0, "kind": "mamba", "num_heads": 4, "head_dim": 5},
            {"index": 1, "kind": "mlp", "intermediate_size": 9},
            {"index": 2, "kind": "attention", "num_heads": 4},
            {"index": 4, "kind": "mlp", "intermediate_size": 3},
        ],
    }


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"hidden_size": 8},
        {"hidden_size": 8, "layers": [{"index": 0, "kind": "moe", "num_heads": 2}]},
        {"hidden_size": 8, "layers": [{"index": 0, "kind": "mamba", "num_heads": 2}]},
        {"hidden_size": 8, "layers": [{"index": 0, "kind": "mlp", "width": 2}]},
        {"hidden_size": None, "layers": []},
        {"hidden_size": "wide", "layers": []},
        {"hidden_size": 8, "layers": 3},
    ],
)
def test_malformed_entry_is_a_value_error(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Architecture.from_json(entry)


# Space.build


def build(shape: ParentShape | None = None, **axes: Any) -> Space:
    return Space.build(SpaceConfig(**axes), shape or tiny_shape())


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"hidden": [14, 13]}, r"space.hidden=[14, 13]: 14 is larger than the parent's 13"),
        ({"hidden": [12, 8]}, r"space.hidden=[12, 8]: must start with the parent's 13"),
        ({"ffn": [16]}, r"space.ffn=[16]: must start with the parent's 17"),
        ({"mamba_heads": [6, 3]}, r"space.mamba_heads=[6, 3]: 3 must be a multiple of n_groups=2"),
        ({"mamba_heads": [8, 6]}, r"space.mamba_heads=[8, 6]: 8 is larger than the parent's 6"),
        ({"mamba_head_dim": [6]}, r"space.mamba_head_dim=[6]: must start with the parent's 7"),
        (
            {"attention_heads": [6, 5]},
            r"space.attention_heads=[6, 5]: 5 must be a multiple of num_key_value_heads=2",
        ),
        ({"depth": [6, 5]}, r"space.depth=[6, 5]: 6 is larger than the parent's 5"),
        ({"depth": [4, 3]}, r"space.depth=[4, 3]: must start with the parent's 5"),
    ],
)
def test_choices_that_do_not_fit_the_parent_are_refused(
    axes: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**axes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("pattern", "axis", "kind"),
    [
        ("M*", "ffn", "mlp"),
        ("-*", "mamba_heads", "mamba"),
        ("-*", "mamba_head_dim", "mamba"),
        ("M-", "attention_heads", "attention"),
    ],
)
def test_an_axis_without_layers_is_refused(pattern: str, axis: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^space\.{axis}=.*must be null.*has no {kind} layer"):
        build(tiny_shape(pattern=pattern), **{axis: [6, 4]})


def test_a_space_left_alone_has_the_parent_only() -> None:
    space = build()
    assert space.elastic_axes == ()
    assert space.max_dropped == 0
    only = {axis: (0,) * space.decisions(axis) for axis in AXES}
    assert space.architecture(only, ()) == Architecture.full(tiny_shape())


def test_one_choice_is_not_elastic() -> None:
    space = build(hidden=[13], ffn=[17, 9], depth=[5, 4, 2])
    assert space.elastic_axes == ("ffn", "depth")
    assert space.max_dropped == 3


def test_heterogeneous_axes_decide_layer_by_layer() -> None:
    space = build(ffn=[17, 9], mamba_heads=[6, 4], heterogeneous=["ffn"])
    assert space.layers_of("ffn") == (1, 4)
    assert space.layers_of("mamba_heads") == space.layers_of("mamba_head_dim") == (0, 3)
    assert space.layers_of("hidden") == space.layers_of("depth") == ()
    assert [space.decisions(axis) for axis in AXES] == [1, 2, 1, 1, 1, 1]
    assert space.to_json()["heterogeneous"] == ["ffn"]
    assert space.to_json()["choices"]["ffn"] == [17, 9]
    json.dumps(space.to_json())


# Space.architecture


def test_architecture_of_a_selection_written_out() -> None:
    space = build(
        hidden=[13, 8],
        ffn=[17, 9, 3],
        mamba_heads=[6, 4],
        mamba_head_dim=[7, 5],
        attention_heads=[6, 4],
        depth=[5, 4],
        heterogeneous=["ffn"],
    )
    selection = {
        "hidden": (1,),
        "ffn": (1, 2),
        "mamba_heads": (1,),
        "mamba_head_dim": (1,),
        "attention_heads": (1,),
        "depth": (1,),
    }
    assert space.architecture(selection, (3, 1)) == tiny_member()
    whole = space.architecture(selection | {"depth": (0,)}, (3, 1))
    assert [layer.index for layer in whole.layers] == [0, 1, 2, 3, 4]
    assert whole.layers[3] == MambaLayer(3, 4, 5)


@given(shapes(), st.data())
def test_every_selection_is_a_legal_member(shape: ParentShape, data: st.DataObject) -> None:
    space = data.draw(spaces(shape))
    selection = data.draw(selections(space))
    drop_order = tuple(data.draw(st.permutations(range(len(shape.pattern)))))
    member = space.architecture(selection, drop_order)
    member.check(shape)
    assert len(member.layers) == space.choices["depth"][selection["depth"][0]]
    kept = {layer.index for layer in member.layers}
    assert kept.isdisjoint(drop_order[: len(shape.pattern) - len(kept)])


@given(shapes(), st.data())
def test_a_choice_further_down_on_every_axis_is_nested(
    shape: ParentShape, data: st.DataObject
) -> None:
    """Choices are descending and drop orders are shared: larger indices, smaller member."""
    space = data.draw(spaces(shape))
    one, two = data.draw(selections(space)), data.draw(selections(space))
    inner = {
        axis: tuple(max(pair) for pair in zip(one[axis], two[axis], strict=True)) for axis in AXES
    }
    drop_order = tuple(data.draw(st.permutations(range(len(shape.pattern)))))
    assert space.architecture(inner, drop_order).is_within(space.architecture(one, drop_order))


def test_too_short_a_ranking_is_our_own_mistake() -> None:
    space = build(depth=[5, 3])
    selection = {axis: (0,) for axis in AXES} | {"depth": (1,)}
    with pytest.raises(AssertionError, match="ranking is too short"):
        space.architecture(selection, (3,))


# Layers that may be dropped


@pytest.mark.parametrize(
    ("attention", "ends", "expected"),
    [
        (False, False, (1, 3)),
        (True, False, (1, 2, 3)),
        (False, True, (0, 1, 3, 4)),
        (True, True, (0, 1, 2, 3, 4)),
    ],
)
def test_droppable_layers_spare_attention_and_ends(
    attention: bool, ends: bool, expected: tuple[int, ...]
) -> None:
    assert droppable_layers(tiny_shape(), attention, ends, 2) == expected


def test_dropping_more_layers_than_may_be_dropped_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^space\.depth: drops up to 3 layers, but only 2 of"):
        droppable_layers(tiny_shape(), False, False, 3)
