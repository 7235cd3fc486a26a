"""Do the work of an iterator in a thread, so that reading overlaps with writing."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2
"""Items that are made before they are taken."""


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order, made by a thread up to `DEPTH` ahead of the consumer.

    An error is raised where its item would have come. The thread ends with this iterator, also when
    that is left half-way: at the latest after the item that it is at.
    """
    made: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(DEPTH)
    stop = threading.Event()

    def put(there: bool, value: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                made.put((there, value), timeout=0.1)
                return
            except queue.Full:
                pass

    def make() -> None:
        try:
            for item in items:
                put(True, item)
                if stop.is_set():
                    return
        except BaseException as error:  # raised again in the consumer
            put(False, error)
        else:
            put(False, None)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            there, value = made.get()
            if not there:
                break
            yield value  # type: ignore[misc]
        if isinstance(value, BaseException):
            raise value
    finally:
        stop.set()
        thread.join()
