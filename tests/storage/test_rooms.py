"""Memory that is used again holds nothing that is still in use: the twin is memory of one's own."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.storage.rooms import LEAST_BYTES, MOST, Rooms

SIZE = 2 * LEAST_BYTES


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@given(st.lists(st.one_of(st.integers(0, 12), st.none()), max_size=40))
def test_no_block_is_overwritten_while_anything_refers_to_it(steps: list[int | None]) -> None:
    """Blocks are taken (None) and dropped (a number) in any order; each is kept as a view only."""
    rooms = Rooms(SIZE)
    held: list[tuple[int, torch.Tensor]] = []
    for number, step in enumerate(steps):
        if step is None:
            block = rooms.take(LEAST_BYTES + number)
            block[:] = number
            held.append((number, torch.from_numpy(block).view(-1)[1:4]))
            del block
        elif held:
            held.pop(step % len(held))
        assert all(view.tolist() == [number] * 3 for number, view in held)


def test_memory_is_used_again_and_no_more_of_it_kept_than_that() -> None:
    rooms = Rooms(SIZE)
    first = address(rooms.take(SIZE))
    assert {address(rooms.take(LEAST_BYTES)) for _ in range(10)} == {first}
    held = [rooms.take(SIZE) for _ in range(MOST + 3)]
    assert len({address(block) for block in held}) == MOST + 3
    assert len(rooms._rooms) == MOST


def test_small_blocks_and_larger_ones_have_memory_of_their_own() -> None:
    """A norm that is kept for long must not keep a room from others."""
    rooms = Rooms(SIZE)
    for size in (0, 1, LEAST_BYTES - 1, SIZE + 1):
        block = rooms.take(size)
        assert block.shape == (size,) and block.dtype == np.uint8 and block.base is None
