"""What a thread is given it takes, all and in order: the plain twin calls `take` itself."""

import threading
import time

import pytest
from helpers.waiting import LIMIT, until

from elastic.storage.behind import behind


def threads() -> int:
    return sum(thread.name == "behind" for thread in threading.enumerate())


@pytest.mark.parametrize("count", [0, 1, 50])
def test_everything_is_taken_in_order_before_the_block_ends(count: int) -> None:
    taken: list[bytes] = []
    with behind(lambda piece: taken.append(bytes(piece)), 3) as give:
        for number in range(count):
            give(memoryview(bytes([number])))
    assert taken == [bytes([number]) for number in range(count)] and threads() == 0


def test_no_more_waits_than_is_allowed_but_one_piece_of_any_size() -> None:
    """Memory is bounded by it, the piece that is being taken included."""
    going, held, most = threading.Event(), [0], [0]

    def take(piece: memoryview) -> None:
        assert going.wait(LIMIT)
        held[0] -= len(piece)

    def give_all() -> None:
        with behind(take, 10) as give:
            for size in (4, 4, 4, 25, 4):
                given.append(size)
                give(memoryview(bytes(size)))
                held[0] += size
                most[0] = max(most[0], held[0])

    given: list[int] = []
    giver = threading.Thread(target=give_all, daemon=True)
    giver.start()
    until(lambda: len(given) >= 3)
    time.sleep(0.1)  # in which more would be given, if there were room
    assert given == [4, 4, 4] and held[0] == 8, "the third waits"
    going.set()
    giver.join(LIMIT)
    assert not giver.is_alive() and held[0] == 0 and most[0] <= 25 and threads() == 0


def test_an_error_of_the_thread_is_raised_where_pieces_are_given() -> None:
    """By the next call that must wait, or at the end of the block; what waits is not taken."""
    taken: list[int] = []

    def take(piece: memoryview) -> None:
        taken.append(len(piece))
        if len(piece) == 2:
            raise OSError(28, "No space left on device")

    given = 0
    with pytest.raises(OSError, match="No space left"), behind(take, 4) as give:
        for _ in range(1000):
            give(memoryview(bytes(2)))
            given += 1
    assert taken == [2] and given < 1000 and threads() == 0
    with pytest.raises(OSError, match="No space left"), behind(take, 4) as give:
        give(memoryview(bytes(2)))
    assert threads() == 0


def test_an_error_or_ctrl_c_in_the_block_ends_the_thread() -> None:
    """What waits is forgotten, and the error is that of the block."""
    begun, going = threading.Event(), threading.Event()
    taken: list[int] = []

    def take(piece: memoryview) -> None:
        begun.set()
        assert going.wait(LIMIT)
        taken.append(len(piece))

    with pytest.raises(KeyboardInterrupt), behind(take, 100) as give:
        for size in (1, 2, 3):
            give(memoryview(bytes(size)))
        assert begun.wait(LIMIT)
        threading.Timer(0.1, going.set).start()
        raise KeyboardInterrupt
    assert taken == [1] and threads() == 0
