"""The order of the sequences is a function of the place: it can be entered anywhere, every source
has its share, and nothing comes twice before all has come once."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.order import BLOCK, SOURCE_BITS, SourceOrder, StageOrder, generator

SLICES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)
"""Rows of each slice of a source; some have none."""


def stage_order(
    slices: Sequence[Sequence[int]],
    shares: Sequence[float],
    seed: int = 0,
    stage: str = "short",
    begun: Sequence[int] | None = None,
) -> StageOrder:
    """Sources a, b, ... with these slices; one without rows is None."""
    names = [chr(97 + n) for n in range(len(slices))]
    begins = begun or [0] * len(slices)
    sources = {
        name: SourceOrder(name, rows, seed, stage, begin) if sum(rows) else None
        for name, rows, begin in zip(names, slices, begins, strict=True)
    }
    total = sum(shares)
    weights = {name: share / total for name, share in zip(names, shares, strict=True)}
    return StageOrder(sources, weights, seed, stage)


def split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sources and rows."""
    return keys >> SOURCE_BITS, keys & ((1 << SOURCE_BITS) - 1)


@given(st.lists(SLICES, min_size=1, max_size=3), st.data())
def test_the_order_can_be_entered_anywhere_and_in_any_steps(
    slices: list[list[int]], data: st.DataObject
) -> None:
    """By objects that have not seen what was before, too."""
    shares = [data.draw(st.floats(0.01, 1.0)) for _ in slices]
    whole = stage_order(slices, shares).keys(0, 900)
    asked = stage_order(slices, shares)
    for _ in range(4):
        first = data.draw(st.integers(0, 899))
        count = data.draw(st.integers(0, 900 - first))
        for order in (asked, stage_order(slices, shares)):
            assert (order.keys(first, count) == whole[first : first + count]).all()
    cuts = sorted({0, 900, *data.draw(st.lists(st.integers(0, 900), max_size=6))})
    parts = [asked.keys(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert (np.concatenate(parts) == whole).all()


def test_no_sequence_is_an_order_too() -> None:
    order = stage_order([[5]], [1.0])
    for first in (0, 1, BLOCK):
        assert order.keys(first, 0).tolist() == [] and order.keys(first, 0).dtype == np.int64
    assert order.begun(0) == {"a": 0}


@given(SLICES, st.integers(0, 20), st.integers(0, 3))
def test_every_row_comes_once_in_an_epoch(slices: list[int], begin: int, seed: int) -> None:
    """Of a stage that begins with its first slice; one that begins later has the rest first."""
    source = SourceOrder("a", slices, seed, "short", begin)
    rows = sum(slices)
    left = (-begin) % len(slices)  # slices of the epoch that has begun
    first = sum(slices[source._slice(number)] for number in range(left))
    drawn = source.rows(0, first + 3 * rows)
    assert len(set(drawn[:first].tolist())) == first
    for epoch in range(3):
        part = drawn[first + epoch * rows : first + (epoch + 1) * rows]
        assert sorted(part.tolist()) == list(range(rows))


def test_slices_and_rows_come_in_another_order_each_epoch() -> None:
    source = SourceOrder("a", [7] * 9, 0, "short", 0)
    epochs = source.rows(0, 3 * 63).reshape(3, 63)
    slices = epochs // 7
    for epoch in slices:
        assert (epoch.reshape(9, 7) == epoch.reshape(9, 7)[:, :1]).all(), "one after the other"
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert len({tuple(epoch[::7]) for epoch in slices.tolist()}) == 3
    assert sorted(epochs[0]) != epochs[0].tolist()


@pytest.mark.parametrize("change", ["seed", "stage", "begin"])
def test_seed_stage_and_place_choose_the_order(change: str) -> None:
    def keys(seed: int = 0, stage: str = "short", begin: int = 0) -> list[int]:
        return stage_order([[30, 20], [40]], [1, 2], seed, stage, [begin, 0]).keys(0, 300).tolist()

    other = {"seed": {"seed": 1}, "stage": {"stage": "long"}, "begin": {"begin": 1}}[change]
    assert keys() == keys() != keys(**other)  # type: ignore[arg-type]


def test_the_name_of_a_source_orders_its_rows() -> None:
    """Two sources of the same size are not read in step."""
    one, two = (SourceOrder(name, [50], 0, "short", 0).rows(0, 50) for name in "ab")
    assert one.tolist() != two.tolist()


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda shares: sum(shares) > 1e-3),
    st.integers(0, 2000),
    st.integers(1, 2000),
)
def test_every_source_has_its_share(shares: list[float], first: int, count: int) -> None:
    """At every border of blocks to within one sequence of what is owed, so that blocks have their
    shares to within two, and any other window what its ends do not show of two blocks besides."""
    order = stage_order([[300, 400]] * len(shares), shares)
    window, _ = split(order.keys(first, count))
    from_start, _ = split(order.keys(0, 5 * BLOCK))
    for source, share in enumerate(order.shares.tolist()):
        for block in range(1, 6):
            drawn = from_start[: block * BLOCK]
            assert abs((drawn == source).sum() - share * block * BLOCK) < 1 + 1e-6
        ends = sum(min(edge, BLOCK - edge) for edge in (first % BLOCK, (first + count) % BLOCK))
        assert abs((window == source).sum() - share * count) < 2 + ends
        assert share or not (window == source).any()


def test_thousands_of_shares_are_kept() -> None:
    """Hundreds of sources, many of them tiny: no one is ahead of its share by a sequence, or
    behind by two."""
    random = np.random.default_rng(0)
    for trial in range(2000):
        count = int(random.integers(1, 300 if trial % 10 == 0 else 20))
        tiny = np.full(int(random.integers(0, count + 1)), 1e-4)
        weights = np.concatenate([random.lognormal(0, trial % 5, count), tiny])
        weights *= random.random(len(weights)) < 0.9
        weights[0] += 1e-3
        shares = dict(enumerate((weights / weights.sum()).tolist()))
        order = StageOrder(dict.fromkeys(map(str, shares)), {str(n): s for n, s in shares.items()},
                           0, "short")  # fmt: skip
        for block in range(1, 7):
            drawn = order._before(block)
            assert drawn.sum() == block * BLOCK and not drawn[weights == 0].any()
            ahead = drawn - order.shares * block * BLOCK
            assert -2 < ahead.min() and ahead.max() < 1 + 1e-6


def test_a_source_of_a_tiny_share_comes_at_last() -> None:
    order = stage_order([[500], [5]], [1, 1e-3])
    drawn = split(order.keys(0, 8000))[0]
    assert (drawn == 1).sum() in (7, 8)
    assert (split(order.keys(0, 1024))[0] == 1).sum() <= 2


def test_sources_are_mixed_within_a_block() -> None:
    """Not one after the other."""
    sources, _ = split(stage_order([[500], [500]], [1, 1]).keys(0, BLOCK))
    assert (sources == 0).sum() == BLOCK // 2
    assert 90 < (np.diff(sources) != 0).sum() < 165


@given(
    st.lists(st.integers(1, 6), min_size=4, max_size=30),
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.integers(0, 3),
)
def test_a_later_stage_reads_what_no_earlier_one_has_begun(
    slices: list[int], lengths: list[int], seed: int
) -> None:
    """Until all slices have been begun once, no slice is read by two stages; the stages pack them
    to rows of another length each."""
    begun, owner = 0, dict[int, int]()
    for number, draws in enumerate(lengths):
        rows = [(each + number) * (number + 1) for each in slices]
        source = SourceOrder("a", rows, seed, str(number), begun)
        order = StageOrder({"a": source}, {"a": 1.0}, seed, str(number))
        drawn = source.rows(0, draws)
        which = np.searchsorted(source.first_rows, drawn, "right") - 1
        after = order.begun(draws)["a"]
        new = set(which.tolist())
        assert after == begun + len(new) if after <= len(slices) else after > begun
        if after > len(slices):
            return
        assert not new & owner.keys()
        owner |= dict.fromkeys(new, number)
        begun = after
    assert len(owner) == begun


def test_slices_that_are_begun_are_counted_by_source() -> None:
    order = stage_order([[4, 4, 4], [2, 2, 2], [0, 5]], [1, 1, 0], begun=[1, 0, 2])
    for count in (1, 7, 64, 255, 256, 257, 700):
        sources, rows = split(order.keys(0, count))
        for name, number, size, begin in (("a", 0, 4, 1), ("b", 1, 2, 0)):
            mine = -(-(sources == number).sum() // size)
            assert order.begun(count)[name] == begin + mine
        assert order.begun(count)["c"] == 2
    assert stage_order([[4], [0, 0]], [1, 0]).begun(9) == {"a": 3, "b": 0}


def test_first_uses_number_what_comes_by_its_first_time() -> None:
    order = stage_order([[5, 3], [6]], [2, 1])
    keys = order.keys(0, 60).tolist()
    first, which = order.first_uses(60)
    distinct = [keys[place] for place in first.tolist()]
    assert distinct == list(dict.fromkeys(keys)) and len(distinct) == 14
    assert [distinct[number] for number in which.tolist()] == keys
    shorter, part = order.first_uses(20)
    assert shorter.tolist() == first[: len(shorter)].tolist() and (part == which[:20]).all()


@given(SLICES)
def test_a_source_smaller_than_a_batch_comes_again(slices: list[int]) -> None:
    order = stage_order([slices], [1.0])
    counts = Counter(order.keys(0, 5 * sum(slices)).tolist())
    assert set(counts.values()) == {5} and len(counts) == sum(slices)


def test_what_the_order_depends_on_is_known() -> None:
    base = stage_order([[4, 4], [3]], [1, 2]).known()
    assert base == stage_order([[4, 4], [3]], [2, 4]).known()
    others = [
        stage_order([[4, 5], [3]], [1, 2]),
        stage_order([[4, 4], [3]], [1, 1]),
        stage_order([[4, 4], [3]], [1, 2], begun=[1, 0]),
        stage_order([[4, 4], [0]], [1, 0]),
    ]
    assert base not in [each.known() for each in others]


def test_the_order_does_not_touch_or_follow_the_global_generators() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = stage_order([[50]], [1.0]).keys(0, 50).tolist()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    torch.manual_seed(1)
    np.random.seed(1)
    assert stage_order([[50]], [1.0]).keys(0, 50).tolist() == first
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]


def test_the_order_is_pinned() -> None:
    """A run must resume into the order that it left, in later versions too."""
    assert generator(0, "rows", "a", "elastic", 0).permutation(8).tolist() == [
        4, 6, 2, 1, 3, 0, 7, 5,
    ]  # fmt: skip
    keys = stage_order([[3, 2], [4]], [1, 1], stage="elastic").keys(0, 12)
    assert list(zip(*map(np.ndarray.tolist, split(keys)), strict=True)) == [
        (1, 3), (0, 0), (0, 2), (0, 1), (0, 3), (0, 4),
        (1, 2), (1, 0), (0, 4), (0, 3), (0, 2), (1, 1),
    ]  # fmt: skip
