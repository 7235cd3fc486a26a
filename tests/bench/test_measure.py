"""The measuring core on work whose time and memory are known."""

import os
from collections.abc import Callable

import pytest
import torch

from elastic.bench.measure import Timings, interleave, peak_memory, rounds
from elastic.config import ConfigError

MIB = 2**20


class Clock:
    """Time passes only when work says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: list[float]) -> Callable[[], None]:
        """Takes each of these in turn."""
        left = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(left)

        return run


def test_variants_take_turns_and_warm_up_rounds_do_not_count() -> None:
    clock = Clock()
    works = {"a": clock.work("a", [50, 1, 5, 3]), "b": clock.work("b", [70, 2, 4, 9])}
    times = interleave(works, repeats=3, warmup=1, title="test", clock=clock)
    assert clock.calls == ["a", "b"] * 4
    assert times.seconds == {"a": [1, 5, 3], "b": [2, 4, 9]}
    assert times.medians() == {"a": 3, "b": 4}
    assert times.fastest(["b", "a"]) == "a"


def test_a_ratio_is_the_median_of_those_inside_a_round() -> None:
    """A machine that slows down slows both: round by round it does not matter."""
    times = Timings({"a": [2.0, 10.0, 6.0], "b": [1.0, 2.0, 6.0]})
    assert times.ratio("a", "b") == 2
    assert times.median("a") / times.median("b") == 3


def test_a_mean_of_variants_is_taken_round_by_round() -> None:
    times = Timings({"a": [1.0, 2.0], "b": [3.0, 8.0]})
    times.mean_of("both", ["a", "b"])
    assert times.seconds["both"] == [2, 5]


def test_rounds_keep_what_each_variant_returns() -> None:
    count = iter(range(4))
    assert rounds({"a": lambda: next(count), "b": lambda: -next(count)}, 2, "test") == {
        "a": [0, 2],
        "b": [-1, -3],
    }


def touch(mebibytes: int) -> torch.Tensor:
    """Memory that is there and not only promised."""
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


def large_then_small(before: int, kept: int, during: int) -> Callable[[], None]:
    """`before` MiB come and go and `kept` stay while this is set up; the work takes `during`."""
    touch(before)
    held = touch(kept)

    def work() -> None:
        assert touch(during)[-1] == held[-1]

    return work


def test_peak_memory_is_that_of_the_work_alone() -> None:
    """Neither what came before it counts, nor what the process that asks once held: Linux hands the
    largest resident size of a process down to those that it starts."""
    touch(500)
    found = peak_memory(large_then_small, 300, 50, 200)
    assert found == pytest.approx(200 * MIB, rel=0.2)


def killed() -> Callable[[], None]:
    """As the kernel does it when memory is short."""
    return lambda: os._exit(9)


def test_a_killed_process_is_reported_in_one_line() -> None:
    with pytest.raises(ConfigError, match="lack of memory") as caught:
        peak_memory(killed)
    assert "\n" not in str(caught.value)
