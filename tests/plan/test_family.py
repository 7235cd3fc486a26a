"""Which members a plan shows, and what it says of them."""

from helpers.goals import in_params
from helpers.spaces import SHAPE, selection, space_of

from elastic.config import AXES, ImportanceConfig, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import conv_state_bytes, kv_cache_bytes, parameters, ssm_state_bytes
from elastic.members.goals import PARAMS, Measure
from elastic.members.targets import stand_in_drop_order
from elastic.plan.family import (
    Candidate,
    candidates,
    describe_member,
    ranges_of,
    sizes_of,
    within_tolerance,
)

AXES_OF = {
    "hidden": [16, 14, 12, 10, 8],
    "ffn": [32, 24, 16],
    "mamba_heads": [6, 4, 2],
    "depth": [5, 4],
}
SPACE = space_of(**AXES_OF)
ORDER = stand_in_drop_order(SPACE, ImportanceConfig())


def member_of(space: Space, candidate: Candidate) -> Architecture:
    """The member of a candidate, every layer of a kind alike."""
    taken = {
        axis: space.choices[axis].index(size)
        for axis, size in zip(AXES, candidate.sizes, strict=True)
    }
    chosen = {axis: (index,) * space.decisions(axis) for axis, index in taken.items()}
    return space.architecture(chosen, ORDER)


def test_every_candidate_has_the_size_of_its_member() -> None:
    found = candidates(SPACE, ORDER)
    assert len(found) == 5 * 3 * 3 * 2
    for candidate in found:
        member = member_of(SPACE, candidate)
        member.check(SHAPE)
        assert PARAMS.of(SHAPE, candidate.hidden, candidate.layers) == parameters(SHAPE, member)
        cache = Measure("cache_bytes", context=9)
        assert cache.of(SHAPE, candidate.hidden, candidate.layers) == cache.exact(SHAPE, member)


def test_heterogeneous_axes_are_counted_alike_in_all_layers() -> None:
    layered = space_of(heterogeneous=["ffn"], **AXES_OF)
    assert candidates(layered, ORDER) == candidates(SPACE, ORDER)


def test_within_tolerance_is_what_a_filter_leaves() -> None:
    full = parameters(SHAPE, Architecture.full(SHAPE))
    targets = {"full": full, "half": full // 2}
    found = within_tolerance(SPACE, ORDER, in_params(SHAPE, targets), 0.03)
    assert [PARAMS.of(SHAPE, c.hidden, c.layers) for c in found["full"]] == [full]
    near = [
        c
        for c in candidates(SPACE, ORDER)
        if abs(PARAMS.of(SHAPE, c.hidden, c.layers) - full // 2) <= 0.03 * (full // 2)
    ]
    assert near and set(found["half"]) == set(near)


def test_sizes_that_differ_between_layers_are_a_range() -> None:
    space = space_of(heterogeneous=["mamba_heads"], mamba_heads=[6, 4, 2])
    member = space.architecture(selection(space) | {"mamba_heads": (1, 2)}, ())
    sizes = sizes_of(space, member)
    assert sizes["mamba_heads"] == (2, 4) and sizes["hidden"] == (16, 16)
    assert sizes["layers"] == {"mamba": 2, "mlp": 2, "attention": 1}


def test_ranges_span_all_members() -> None:
    full = parameters(SHAPE, Architecture.full(SHAPE))
    (found,) = within_tolerance(SPACE, ORDER, in_params(SHAPE, {"half": full // 2}), 0.03).values()
    ranges = ranges_of(SPACE, found)
    assert set(ranges) == set(SPACE.elastic_axes)
    for axis, span in ranges.items():
        sizes = [candidate.sizes[AXES.index(axis)] for candidate in found]
        assert span == (min(sizes), max(sizes))


def test_unreachable_targets_have_no_member() -> None:
    assert within_tolerance(SPACE, ORDER, in_params(SHAPE, {"tiny": 10}), 0.01) == {"tiny": []}


def test_speeds_are_ratios_to_the_parent() -> None:
    whole = Architecture.full(SHAPE)
    entry = describe_member(SHAPE, whole, [64], batch=3)
    assert entry["contexts"]["64"]["prefill_speed"] == entry["contexts"]["64"]["decode_speed"] == 1
    assert entry["share"] == 1
    small = member_of(SPACE, candidates(SPACE, ORDER)[-1])
    figures = describe_member(SHAPE, small, [64], batch=3)["contexts"]["64"]
    assert figures["prefill_speed"] > 1 and figures["decode_speed"] > 1
    assert figures["kv_cache_bytes"] == kv_cache_bytes(SHAPE, small, 64, 3)
    moved = 2 * (parameters(SHAPE, small) - (SHAPE.vocab_size - 3) * small.hidden_size)
    moved += figures["kv_cache_bytes"]
    moved += 2 * (ssm_state_bytes(SHAPE, small, 3) + conv_state_bytes(SHAPE, small, 3))
    assert figures["decode_bytes"] == moved


def test_a_space_without_choices_has_one_member() -> None:
    space = space_of()
    assert space.elastic_axes == () and SpaceConfig().depth is None
    assert [c.sizes for c in candidates(space, ())] == [tuple(space.choices[a][0] for a in AXES)]
