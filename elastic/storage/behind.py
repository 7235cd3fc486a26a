"""Hand work to a thread that is behind, so that writing overlaps with making what is written."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_BYTES = 16 << 20
"""What the thread may have before it, that which it is at included; or one piece of any size."""


@contextmanager
def behind(
    take: Callable[[memoryview], object], most_bytes: int = MOST_BYTES
) -> Iterator[Callable[[memoryview], None]]:
    """Yield a function that has `take` called with what it is given, in order, by a thread.

    It waits while the thread has too much before it. When the block ends well everything has been
    taken; when it ends by an error or Ctrl-C, the thread stops after the piece that it is at. What
    `take` raises is raised by the function or at the end of the block.
    """
    line = _Line(take, most_bytes)
    thread = threading.Thread(target=line.work, name="behind", daemon=True)
    thread.start()
    try:
        yield line.give
        line.end(abandon=False)
        thread.join()
    finally:
        line.end(abandon=True)
        thread.join()
    if line.error is not None:
        raise line.error


class _Line:
    """Pieces that wait for their turn."""

    def __init__(self, take: Callable[[memoryview], object], most_bytes: int) -> None:
        self._take, self._most = take, most_bytes
        self._pieces: deque[memoryview] = deque()
        self._held = 0
        self._ended = False
        self._changed = threading.Condition()
        self.error: BaseException | None = None

    def give(self, piece: memoryview) -> None:
        """Add a piece once there is room for it."""
        with self._changed:
            while self.error is None and self._held and self._held + len(piece) > self._most:
                self._changed.wait()
            if self.error is not None:
                raise self.error
            self._pieces.append(piece)
            self._held += len(piece)
            self._changed.notify_all()

    def end(self, abandon: bool) -> None:
        """Nothing more comes; with `abandon` what waits is forgotten."""
        with self._changed:
            self._ended = True
            if abandon:
                self._pieces.clear()
            self._changed.notify_all()

    def work(self) -> None:
        """What the thread does."""
        while True:
            with self._changed:
                while not self._pieces and not self._ended:
                    self._changed.wait()
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
            size = len(piece)
            try:
                self._take(piece)
            except BaseException as error:  # raised again where pieces are given
                with self._changed:
                    self.error = error
                    self._changed.notify_all()
                return
            del piece  # its memory, before the next is waited for
            with self._changed:
                self._held -= size
                self._changed.notify_all()
