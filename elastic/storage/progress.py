"""How far a long write has come: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from elastic.console import Bar

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress in bytes: how many are written, how fast, and how long the rest may take."""

    def __init__(self, total: int, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.what = what
        self.done = 0
        self._clock = clock
        self._start = self._said = clock()
        terminal = sys.stderr.isatty()
        self._bar = Bar(
            total=total, desc=what, unit="B", unit_scale=True, disable=not terminal, leave=False
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def __call__(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        self._bar.update(count)
        now = self._clock()
        if self._bar.disable and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            print(self._line(now - self._start), flush=True)

    def _line(self, seconds: float) -> str:
        speed = self.done / seconds
        return (
            f"{self.what}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB "
            f"({self.done / self.total:.0%}), {speed / 1e6:.0f} MB/s, "
            f"{(self.total - self.done) / speed:.0f} s left"
        )
