"""Columns picked by strided copies: the plain twin is indexing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.members.cut import Ranges, grouped
from elastic.storage.picking import Picker, Run, merged, pick, runs_of, within

WIDTH = 37


def picked(rows: np.ndarray, columns: Ranges, item: int) -> np.ndarray:
    """The twin: (rows, WIDTH * item) -> (rows, kept * item)."""
    kept = [index for start, stop in columns for index in range(start * item, stop * item)]
    return rows[:, kept]


def columns_of(width: int = WIDTH) -> st.SearchStrategy[Ranges]:
    """Ascending ranges, also such as touch."""
    ends = st.lists(st.integers(0, width), min_size=2, max_size=12, unique=True).map(sorted)
    loose = ends.map(lambda e: tuple(zip(e[::2], e[1::2], strict=False)))
    heads = st.sampled_from([grouped(3, 3, k, 4, w) for k in (1, 2, 3) for w in (1, 3)])
    return st.one_of(loose, heads.filter(lambda ranges: ranges is not None))


@given(columns_of(), st.sampled_from([1, 2, 4]), st.data())
def test_rows_in_pieces_of_any_size(columns: Ranges, item: int, data: st.DataObject) -> None:
    """As the blocks of a file end, within rows and within values."""
    row, rows = WIDTH * item, data.draw(st.integers(1, 6))
    stored = np.arange(rows * row).astype(np.uint8).reshape(rows, row)
    out = np.full(picked(stored, columns, item).shape, 255, np.uint8)
    picker = Picker(out, row, runs_of(columns, item))
    left = memoryview(stored.tobytes())
    while len(left):
        assert not picker.done
        size = data.draw(st.integers(1, len(left)))
        picker.take(left[:size])
        left = left[size:]
    assert picker.done and np.array_equal(out, picked(stored, columns, item))


@given(columns_of(), st.integers(0, 6))
def test_picking_out_of_spans_that_were_read(columns: Ranges, gap: int) -> None:
    """Gaps that were read with them fall away again."""
    spans = merged(columns, gap)
    rows = np.arange(3 * WIDTH, dtype=np.uint8).reshape(3, WIDTH)
    read = picked(rows, spans, 1)
    out = np.empty(picked(rows, columns, 1).shape, np.uint8)
    pick(out, read, runs_of(within(columns, spans), 1))
    assert np.array_equal(out, picked(rows, columns, 1))
    assert all(b[0] - a[1] > gap for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(
    ("columns", "runs"),
    [
        (((0, 5),), [Run(0, 10, 0, 1)]),
        (grouped(2, 4, 3, 8, 5), [Run(0, 10, 16, 3), Run(64, 10, 16, 3)]),
        (grouped(2, 4, 4, 8, 5), [Run(0, 10, 16, 8)]),
        (((0, 2), (3, 5), (7, 9), (10, 11)), [Run(0, 4, 6, 2), Run(14, 4, 0, 1), Run(20, 2, 0, 1)]),
    ],
    ids=["prefix", "heads of groups", "channels of all heads", "uneven"],
)
def test_ranges_at_equal_steps_are_one_run(columns: Ranges, runs: list[Run]) -> None:
    """Otherwise a cut would copy every head of every block for itself."""
    assert runs_of(columns, 2) == runs
