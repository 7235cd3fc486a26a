"""No target is lost, none comes twice, and no document is cut that need not be.

Tokens of the drawn documents are different numbers, so that a target says which one it is.
"""

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from helpers.stores import Document, MemoryStore, numbered, parts_of
from hypothesis import given
from hypothesis import strategies as st

from elastic.config.data import PACKINGS
from elastic.data.batches import Row, Sequences
from elastic.data.packs import Packed, best_fit, joined, pack
from elastic.data.tokens import TokenStore

LENGTHS = st.integers(1, 30)
ALL = pytest.mark.parametrize("packing", PACKINGS)


def every(store: TokenStore) -> np.ndarray:
    return np.arange(store.documents)


def rows_of(store: TokenStore, packed: Packed, length: int) -> list[Row]:
    rows = Sequences([store], [packed], length)
    return [rows[number] for number in range(len(packed))]


def counted(rows: list[Row]) -> list[tuple[int, int]]:
    """Input and target of everything that counts."""
    return [
        (int(row.tokens[place]), int(row.tokens[place + 1]))
        for row in rows
        for place in np.flatnonzero(row.counted)
    ]


@ALL
@given(parts_of(), LENGTHS)
def test_every_target_is_one_once_after_the_token_before_it(
    packing: str, parts: list[list[Document]], length: int
) -> None:
    """All that a document can be asked for: its targets but the first token, each with its own
    neighbour as input, which is in the same document of the row."""
    store = MemoryStore(parts)
    rows = rows_of(store, pack(store, every(store), length, packing), length)
    wanted = [
        (each.ids[place - 1], each.ids[place])
        for each in chain(*parts)
        for place in range(1, len(each))
        if each.targets[place]
    ]
    assert sorted(counted(rows)) == sorted(wanted)
    for row in rows:
        inside = row.documents[1:] == row.documents[:-1]
        assert inside[row.counted[:-1]].all()


@ALL
@given(parts_of(marked=False), LENGTHS)
def test_a_row_is_pieces_of_documents_then_padding(
    packing: str, parts: list[list[Document]], length: int
) -> None:
    owner = {token: n for n, each in enumerate(chain(*parts)) for token in each.ids}
    store = MemoryStore(parts)
    packed = pack(store, every(store), length, packing)
    rows = rows_of(store, packed, length)
    assert (packed.tokens <= length + 1).all() and (packed.tokens >= 2).all()
    assert (packed.targets > 0).all() and (np.diff(packed.rows) > 0).all()
    for row, size in zip(rows, packed.tokens.tolist(), strict=True):
        assert row.tokens.shape == (length + 1,) and row.documents.shape == (length,)
        assert not row.tokens[size:].any() and not row.counted[max(size - 1, 0) :].any()
        inputs = row.tokens[: min(size, length)].tolist()
        owners = [owner[token] for token in inputs]
        change = np.diff(owners) != 0
        assert (np.diff(row.documents[: len(inputs)]) == change).all()
        if size < length:
            padding = set(row.documents[size:].tolist())
            assert len(padding) == 1 and padding.isdisjoint(row.documents[:size].tolist())
    if packing == "none":
        assert all(len(np.unique(row.documents[row.counted])) == 1 for row in rows)


@given(parts_of(), LENGTHS)
def test_best_fit_cuts_no_document_that_fits(parts: list[list[Document]], length: int) -> None:
    """And of a longer one it makes as few pieces as can be."""
    store = MemoryStore(parts)
    packed = pack(store, every(store), length, "best_fit")
    pieces = Counter(store.document_of(packed.starts).tolist())
    _, lengths = store.places(every(store))
    for number, each in enumerate(chain(*parts)):
        most = -(-(len(each) - 1) // length)
        assert pieces[number] <= most
        if all(each.targets):
            assert pieces[number] == most
    assert (packed.lengths <= length + 1).all()


def first_fit(lengths: list[int], capacity: int) -> int:
    """Rows of pieces in the order of the text, each in the first that has room."""
    rooms: list[int] = []
    for length in lengths:
        place = next((n for n, room in enumerate(rooms) if room >= length), len(rooms))
        rooms += [capacity] if place == len(rooms) else []
        rooms[place] -= length
    return len(rooms)


@given(st.lists(st.integers(2, 50), max_size=200), st.integers(49, 80))
def test_best_fit_opens_no_row_while_another_has_room(lengths: list[int], capacity: int) -> None:
    """So that no two rows could be one, and all but one are more than half full."""
    order, rows = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[n] for n in order[a:b]) for a, b in pairwise(rows)]
    assert all(0 < size <= capacity for size in sizes)
    least = sorted(sizes)[:2]
    assert len(least) < 2 or sum(least) > capacity


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_wastes_no_more_than_first_fit_in_the_order_of_the_text(seed: int) -> None:
    """Of documents as they are: most are short, a few are long."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(3.5, 1.2, 400).astype(np.int64), 2, 257)
    _, rows = best_fit(lengths, 257)
    assert len(rows) - 1 <= first_fit(lengths.tolist(), 257)
    assert lengths.sum() / ((len(rows) - 1) * 257) > 0.97


def test_best_fit_takes_the_row_where_least_room_is_left() -> None:
    order, rows = best_fit(np.array([3, 7, 5, 2, 8]), 10)
    assert rows.tolist() == [0, 2, 4, 5]
    assert [order[a:b].tolist() for a, b in ((0, 2), (2, 4), (4, 5))] == [[4, 3], [1, 0], [2]]
    order, rows = best_fit(np.array([], np.int64), 10)
    assert len(order) == 0 and rows.tolist() == [0]


@ALL
def test_packing_is_a_function_of_the_text(packing: str) -> None:
    random = np.random.default_rng(0)
    parts = [numbered(random.integers(1, 30, 50).tolist()) for _ in range(2)]
    one, two = MemoryStore(parts), MemoryStore(parts)
    for name in ("rows", "starts", "lengths", "targets"):
        first, second = (getattr(pack(s, every(s), 16, packing), name) for s in (one, two))
        assert (first == second).all() and first.dtype == second.dtype


@ALL
@given(parts_of(), LENGTHS)
def test_targets_are_those_that_a_row_counts(
    packing: str, parts: list[list[Document]], length: int
) -> None:
    store = MemoryStore(parts)
    packed = pack(store, every(store), length, packing)
    rows = Sequences([store], [packed], length)
    found = [int(rows[number].counted.sum()) for number in range(len(packed))]
    assert packed.targets.tolist() == found
    keys = np.arange(len(packed))[::2]
    assert rows.targets(keys) == sum(found[::2])


@ALL
@given(parts_of(), LENGTHS)
def test_a_row_knows_its_documents(packing: str, parts: list[list[Document]], length: int) -> None:
    """By their numbers in the source, -1 where no target counts."""
    owner = {token: n for n, each in enumerate(chain(*parts)) for token in each.ids}
    store = MemoryStore(parts)
    packed = pack(store, every(store), length, packing)
    rows = Sequences([store], [packed], length)
    for number in range(len(packed)):
        row, found = rows[number], rows.documents(number)
        assert ((found >= 0) == row.counted).all()
        wanted = [owner[token] for token in row.tokens[1:][row.counted].tolist()]
        assert found[row.counted].tolist() == wanted


def test_what_is_no_target_is_read_and_not_learned() -> None:
    """A prompt is input to its answer; a piece without any target is left out, and so is a
    document of one token."""
    prompt = Document((5, 6, 7, 8), (False, False, True, True))
    silent = Document((1, 2, 3), (False,) * 3)
    alone = Document((4,), (True,))
    first_only = Document((9, 10), (True, False))
    store = MemoryStore([[silent, prompt, alone, first_only]])
    for packing in ("best_fit", "none"):
        (row,) = rows_of(store, pack(store, every(store), 6, packing), 6)
        assert row.tokens.tolist() == [5, 6, 7, 8, 0, 0, 0]
        assert row.counted.tolist() == [False, True, True, False, False, False]
        assert row.documents.tolist() == [0, 0, 0, 0, 1, 1]
    (row,) = rows_of(store, pack(store, every(store), 9, "concat"), 9)
    assert row.tokens.tolist() == [1, 2, 3, 5, 6, 7, 8, 4, 9, 10]
    assert np.flatnonzero(row.counted).tolist() == [4, 5]
    assert row.documents.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 3]


def test_pieces_share_the_token_between_them() -> None:
    store = MemoryStore([numbered([9, 5])])
    rows = rows_of(store, pack(store, every(store), 4, "none"), 4)
    assert [row.tokens.tolist() for row in rows] == [
        [0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [9, 10, 11, 12, 13],
    ]  # fmt: skip
    rows = rows_of(store, pack(store, every(store), 4, "concat"), 4)
    assert [row.tokens.tolist() for row in rows] == [
        [0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12], [12, 13, 0, 0, 0],
    ]  # fmt: skip
    assert [row.counted.tolist() for row in rows][2] == [False, True, True, True]


@ALL
def test_some_documents_alone_are_packed(packing: str) -> None:
    parts = [numbered([3, 6, 2]), numbered([7, 1, 4], 11)]
    store = MemoryStore(parts)
    rows = rows_of(store, pack(store, np.array([1, 3, 5]), 5, packing), 5)
    found = sorted(target for _, target in counted(rows))
    assert found == [*range(4, 9), *range(12, 18), *range(20, 23)]
    nothing = pack(store, np.empty(0, np.int64), 5, packing)
    assert len(nothing) == 0 and len(joined([nothing, nothing])) == 0
    assert len(pack(store, np.array([4]), 5, packing)) == 0, "a document of one token"


@ALL
@given(parts_of(), LENGTHS)
def test_rows_of_slices_are_joined_and_chosen(
    packing: str, parts: list[list[Document]], length: int
) -> None:
    store = MemoryStore(parts)
    slices = np.array_split(every(store), 3)
    packs = [pack(store, each, length, packing) for each in slices]
    whole = joined(packs)
    apart = [row for each in packs for row in rows_of(store, each, length)]
    together = rows_of(store, whole, length)
    kept = np.arange(len(whole)) % 3 == 1
    some = rows_of(store, whole.only(kept), length)
    full = rows_of(store, whole.full(length), length)
    assert [row.tokens.tolist() for row in together] == [row.tokens.tolist() for row in apart]
    assert whole.targets.tolist() == [int(row.counted.sum()) for row in together]
    wanted = [row for row, keep in zip(together, kept, strict=True) if keep]
    assert [row.tokens.tolist() for row in some] == [row.tokens.tolist() for row in wanted]
    sizes = whole.tokens.tolist()
    wanted = [row for row, size in zip(together, sizes, strict=True) if size == length + 1]
    assert [row.tokens.tolist() for row in full] == [row.tokens.tolist() for row in wanted]
