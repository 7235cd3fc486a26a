"""Waiting for what must happen, however slow the machine: the one limit of time in the tests."""

import time
from collections.abc import Callable

LIMIT = 600.0
"""Seconds after which a test that waits has failed: a safety net that no busy machine reaches. No
test asks for less, nor compares how long anything took. Of our own code's limits of time, those
that a test does not want to expire are set to this."""


def until(condition: Callable[[], object], what: Callable[[], object] = str) -> None:
    """Return once a condition holds; `what` says what is there instead.

    Raises:
        AssertionError: after LIMIT.
    """
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.01)
