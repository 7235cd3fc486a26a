"""One cut in a process of its own, and that process' own counters.

It imports no more than an extraction does, since what is imported counts as its memory.
"""

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from elastic.bench.measure import resident_peak
from elastic.config import ExtractConfig
from elastic.extract.export import extract
from elastic.extract.slice import open_member
from elastic.extract.verify import verify

T = TypeVar("T")

COUNTERS = Path("/proc/self/io")
"""Where Linux counts what a process reads."""


@dataclass(frozen=True)
class Cut:
    """What one extraction cost."""

    seconds: float
    bytes_read: int
    disk_bytes: int
    """Those that came from the disk: whole pages, and what the system read ahead."""
    peak: int
    """Bytes resident at most, from the start of the process."""
    verify_seconds: float | None
    verify_peak: int
    """The same once the result was verified in the same process."""


def in_child(settings: ExtractConfig, verified: bool) -> Cut:
    """Cut in a process of its own: what another has left resident is not taken for its memory."""
    return in_process(cut, asdict(settings), verified, torch.get_num_threads())


def in_process(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(work, *arguments).result()


def cut(settings: dict[str, Any], verified: bool, threads: int) -> Cut:
    """Cut, and verify the result, in this process."""
    torch.set_num_threads(threads)
    config = ExtractConfig(**settings)
    with contextlib.redirect_stdout(sys.stderr):
        before, start = _counters(), time.perf_counter()
        output = extract(config)
        seconds = time.perf_counter() - start
        after, peak = _counters(), resident_peak()
        spent = None
        if verified:
            start = time.perf_counter()
            print(
                f"verified: {verify(output, open_member(Path(config.checkpoint), config.budget))}"
            )
            spent = time.perf_counter() - start
    read, disk = (after[name] - before[name] for name in ("rchar", "read_bytes"))
    return Cut(seconds, read, disk, peak, spent, resident_peak())


def _counters() -> dict[str, int]:
    """What this process has read so far: `rchar` by system calls, `read_bytes` from the disk."""
    lines = (line.split(": ") for line in COUNTERS.read_text().splitlines())
    return {name: int(value) for name, value in lines}
