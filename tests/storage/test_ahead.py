"""Items made by a thread are the items: the plain twin is the iterator itself."""

import threading
import time
from collections.abc import Iterator

import pytest
from helpers.waiting import LIMIT, until

from elastic.storage.ahead import ahead


def threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_the_same_items_in_the_same_order(count: int) -> None:
    assert list(ahead(iter(range(count)))) == list(range(count))
    assert threads() == 0


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError(5, "Input/output error")

    taken = []
    with pytest.raises(OSError, match="Input/output"):
        for item in ahead(failing()):
            taken.append(item)
    assert taken == [1, 2] and threads() == 0


def test_the_next_items_are_made_while_one_is_in_use_and_no_more_than_those() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            made.append(item)
            yield item

    iterator = ahead(items())
    assert next(iterator) == 0
    until(lambda: len(made) == 4)
    time.sleep(0.2)  # in which more would be made, if any were
    assert made == [0, 1, 2, 3], "one taken, two waiting, one in hand"
    assert list(iterator) == list(range(1, 20))


def test_an_iterator_that_is_left_ends_its_thread() -> None:
    """And that of the work, which may hold a file."""
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    iterator = ahead(items())
    next(iterator)
    assert threads() == 1
    iterator.close()  # type: ignore[attr-defined]
    assert closed.wait(LIMIT) and threads() == 0
