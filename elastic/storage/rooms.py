"""Memory for blocks that is used again once a block is gone.

New memory comes from the system a page at a time, each of them zeroed, and goes back to it when a
block is freed: a fifth of what a cut computes. The plain twin is `np.empty`.
"""

import sys
import threading

import numpy as np

LEAST_BYTES = 256 << 10
"""Smaller blocks get memory of their own: nobody must keep a room for the sake of a norm."""

MOST = 6
"""Rooms that are kept: one block is made, some wait, one is written."""


def _references(rooms: list[np.ndarray], number: int) -> int:
    return sys.getrefcount(rooms[number])


_ALONE = _references([np.empty(0, np.uint8)], 0)
"""References to a room that only its list has, as this interpreter counts them."""


class Rooms:
    """Hands out memory of up to `size` bytes each; several threads may ask.

    A room is free again when no array or tensor refers to it: what refers to a part of it counts.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rooms: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """(size,) uint8 with any contents, which nothing else refers to."""
        if not LEAST_BYTES <= size <= self.size:
            return np.empty(size, np.uint8)
        with self._lock:
            for number in range(len(self._rooms)):
                if _references(self._rooms, number) == _ALONE:
                    return self._rooms[number][:size]
            room = np.empty(self.size, np.uint8)
            if len(self._rooms) < MOST:
                self._rooms.append(room)
            return room[:size]
