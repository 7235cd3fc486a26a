"""The measuring core: interleaved rounds, medians, ratios within one run, and peak memory.

A machine's speed drifts, from minute to minute and from run to run. So all variants of a bench take
turns, and what is reported is the median over the rounds of a ratio inside one round.
"""

import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from elastic.config import ConfigError
from elastic.console import Bar

T = TypeVar("T")
Work = Callable[[], Any]


class Timings:
    """Seconds of every variant, one entry per round."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = {name: list(values) for name, values in seconds.items()}

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def medians(self) -> dict[str, float]:
        """Seconds by variant."""
        return {name: self.median(name) for name in self.seconds}

    def ratio(self, name: str, over: str) -> float:
        """Median over the rounds of one variant's seconds over another's."""
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def fastest(self, names: Iterable[str]) -> str:
        return min(names, key=self.median)

    def mean_of(self, name: str, parts: Iterable[str]) -> None:
        """Add a variant that takes the mean of others' seconds, round by round."""
        rounds = zip(*(self.seconds[part] for part in parts), strict=True)
        self.seconds[name] = [statistics.fmean(seconds) for seconds in rounds]


def rounds(variants: Mapping[str, Callable[[], T]], repeats: int, title: str) -> dict[str, list[T]]:
    """Call all variants in turn, `repeats` times; results by variant. The time left is on
    stderr."""
    results: dict[str, list[T]] = {name: [] for name in variants}
    turns = [name for _ in range(repeats) for name in variants]
    for name in progress(turns, title):
        results[name].append(variants[name]())
    return results


def progress(turns: list[str], title: str) -> Iterator[str]:
    """The turns one by one, with a bar; a line now and then without a terminal."""
    with Bar(total=len(turns), desc=title, unit="turns") as bar:
        for name in turns:
            bar.set_postfix_str(name, refresh=False)
            yield name
            bar.update()


def interleave(
    variants: Mapping[str, Work],
    repeats: int,
    warmup: int,
    title: str,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time variants in turns, A B C A B C, after `warmup` rounds that do not count."""

    def timed(work: Work) -> float:
        synchronise(device)
        start = clock()
        work()
        synchronise(device)
        return clock() - start

    calls = {name: (lambda work=work: timed(work)) for name, work in variants.items()}
    seconds = rounds(calls, warmup + repeats, title)
    return Timings({name: values[warmup:] for name, values in seconds.items()})


def synchronise(device: torch.device | None) -> None:
    """Wait until the device has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(
    prepare: Callable[..., Work], *arguments: Any, device: torch.device | None = None
) -> int:
    """Bytes that a piece of work needs at its peak, beyond what was there when it began.

    `prepare(*arguments)` sets up and returns the work. On a CPU both happen in a fresh process, so
    that nothing which another variant left behind is taken for free memory; on a GPU the allocator
    knows.

    Raises:
        ConfigError: the process was killed, which is what a lack of memory looks like.
    """
    if device is not None and device.type == "cuda":
        work = prepare(*arguments)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            return pool.submit(_peak_here, prepare, arguments, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "memory=true: a measuring process was killed, probably for lack of memory; "
                "choose smaller sizes, or memory=false"
            ) from error


def peak_memories(
    title: str,
    variants: Mapping[str, tuple[Any, ...]],
    prepare: Callable[..., Work],
    device: torch.device,
) -> dict[str, float]:
    """MiB by variant: the peak of `prepare(*arguments)`'s work, one after the other."""
    return {
        name: peak_memory(prepare, *variants[name], device=device) / 2**20
        for name in progress(list(variants), f"{title} memory")
    }


def _peak_here(prepare: Callable[..., Work], arguments: tuple, threads: int) -> int:
    """Peak of resident memory over the work, in this process."""
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    before = _resident()
    work()
    return resident_peak() - before


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident() -> int:
    """Bytes of resident memory now; the peak starts anew from here, where the system lets it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return resident_peak()
    return _status("VmRSS")


def resident_peak() -> int:
    """Largest number of bytes resident so far.

    Linux hands ru_maxrss down to the processes that one starts, so that it may be the parent's; the
    kernel's high-water mark is of this program alone.
    """
    if _STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{_STATUS} has no {field}"
    return int(found[1]) * 1024
