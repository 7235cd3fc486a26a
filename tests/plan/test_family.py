"""Which members a plan shows: all that a brute force finds, and the most even of them."""

from collections.abc import Sequence

import pytest
from helpers.spaces import SHAPE, space_of

from elastic.config import AXES, ImportanceConfig, SpaceConfig
from elastic.members.architecture import Architecture
from elastic.members.cost import conv_state_bytes, kv_cache_bytes, parameters, ssm_state_bytes
from elastic.plan.family import (
    architecture_of,
    assumed_drop_order,
    candidates,
    describe_member,
    reachable,
)

AXES_OF = {
    "hidden": [16, 14, 12, 10, 8],
    "ffn": [32, 24, 16],
    "mamba_heads": [6, 4, 2],
    "depth": [5, 4],
}
SPACE = space_of(**AXES_OF)
ORDER = assumed_drop_order(SPACE, ImportanceConfig())


def test_every_candidate_has_the_size_of_its_member() -> None:
    found = candidates(SPACE, ORDER)
    assert len(found) == 5 * 3 * 3 * 2
    for candidate in found:
        member = architecture_of(SPACE, ORDER, candidate)
        member.check(SHAPE)
        assert candidate.params == parameters(SHAPE, member)


def test_heterogeneous_axes_are_planned_alike_in_all_layers() -> None:
    layered = space_of(heterogeneous=["ffn"], **AXES_OF)
    assert candidates(layered, ORDER) == candidates(SPACE, ORDER)
    member = architecture_of(layered, ORDER, candidates(layered, ORDER)[5])
    assert member == architecture_of(SPACE, ORDER, candidates(SPACE, ORDER)[5])


def test_kinds_are_dropped_in_turns_and_only_where_allowed() -> None:
    space = space_of(depth=[5, 4, 3])
    assert [SHAPE.kinds[layer] for layer in assumed_drop_order(space, ImportanceConfig())] == [
        "mamba",
        "mlp",
    ]
    free = ImportanceConfig(drop_attention=True, drop_ends=True)
    assert sorted(
        SHAPE.kinds[layer] for layer in assumed_drop_order(space_of(depth=[5, 2]), free)
    ) == [
        "attention",
        "mamba",
        "mlp",
    ]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shares", [(1.0, 0.75, 0.5), (0.8, 0.6), (0.8, 0.5)])
def test_the_family_is_the_most_even_one(shares: Sequence[float], nested: bool) -> None:
    """Against every combination of members within tolerance."""
    full = parameters(SHAPE, Architecture.full(SHAPE))
    targets = {f"{share:g}": round(share * full) for share in shares}
    reach = reachable(SPACE, ORDER, targets, 0.03, nested)
    groups = [
        [c for c in candidates(SPACE, ORDER) if abs(c.params - target) <= 0.03 * target]
        if target != full
        else [candidates(SPACE, ORDER)[0]]
        for target in targets.values()
    ]
    for found, group in zip(reach.values(), groups, strict=True):
        assert set(found.candidates) == set(group)

    def best(position: int, outer: object) -> float:
        if position == len(groups):
            return 0.0
        sums = [
            c.unevenness + best(position + 1, c)
            for c in groups[position]
            if not nested or outer is None or c.is_within(outer)  # type: ignore[arg-type]
        ]
        return min(sums, default=float("inf"))

    chosen = [found.balanced for found in reach.values()]
    assert all(chosen) == any(chosen) == (best(0, None) < float("inf"))
    if not all(chosen):
        return
    assert sum(c.unevenness for c in chosen if c) == pytest.approx(best(0, None))
    if nested:
        for outer, inner in zip(chosen, chosen[1:], strict=False):
            assert outer and inner and inner.is_within(outer)


def test_ranges_span_all_members() -> None:
    full = parameters(SHAPE, Architecture.full(SHAPE))
    (found,) = reachable(SPACE, ORDER, {"half": full // 2}, 0.03, True).values()
    for axis in SPACE.elastic_axes:
        sizes = [candidate.sizes[AXES.index(axis)] for candidate in found.candidates]
        assert found.range_of(axis) == (min(sizes), max(sizes))


def test_unreachable_targets_have_no_member() -> None:
    (found,) = reachable(SPACE, ORDER, {"tiny": 10}, 0.01, True).values()
    assert found.candidates == () and found.balanced is None


def test_speeds_are_ratios_to_the_parent() -> None:
    whole = Architecture.full(SHAPE)
    entry = describe_member(SHAPE, whole, [64], batch=3)
    assert entry["contexts"]["64"]["prefill_speed"] == entry["contexts"]["64"]["decode_speed"] == 1
    assert entry["share"] == 1
    small = architecture_of(SPACE, ORDER, candidates(SPACE, ORDER)[-1])
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
