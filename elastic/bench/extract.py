"""bench extract: members cut out of a checkpoint of any size, beside copying as many bytes.

Each cut runs in a fresh process, whose own counters give memory and bytes read (`cutting`). Before
every copy and every cut the checkpoint is dropped from the page cache, and both end when their
files are on disk.
"""

import contextlib
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from elastic.bench.cutting import COUNTERS, Cut, in_child, in_process
from elastic.bench.result import Figures, Result, table
from elastic.bench.sorting import sort
from elastic.bench.subjects import shape_of
from elastic.bench.synthetic import (
    bytes_of,
    family,
    scaled_shape,
    scaled_space,
    shares_of,
    write_checkpoint,
)
from elastic.config import ConfigError, ExtractBenchConfig, ExtractConfig
from elastic.extract.slice import OpenMember, open_member
from elastic.members.cost import weight_bytes
from elastic.members.cut import member_cuts
from elastic.storage.files import require_space, sync
from elastic.storage.progress import Progress
from elastic.storage.seals import BLOCK_BYTES

CHUNK = 8 << 20
"""Bytes per system call of a copy, as in `shutil.copyfile`."""

GOALS = {
    "peak_rss_gib": 2.0,
    "bytes_read_over_needed": 1.1,
    "bytes_read_over_touched": 1.1,
    "time_over_copy": 1.2,
}


def measure(config: ExtractBenchConfig, device: torch.device) -> Result:
    """Figures of every member below the parent, and the worst of them."""
    if not COUNTERS.exists():
        raise ConfigError(f"bench extract: {COUNTERS} is missing; must run on Linux")
    whole = shape_of(config.parent)
    shares = shares_of(config.budgets, whole)
    shape, space = scaled_shape(whole, config.scale), scaled_space(config.space, config.scale)
    choices = family(space, shape, shares)
    smaller = [name for name, share in shares.items() if share < 1]
    outputs = [weight_bytes(shape, choices[name].architecture, 2) for name in smaller]
    place = Path(config.dir)
    largest = bytes_of(shape) if config.sort else max(outputs)
    require_space(place, round(1.02 * (bytes_of(shape) + largest)) + (64 << 20))
    with _directory(place, config.keep) as directory:
        checkpoint = directory / "checkpoint"
        start = time.perf_counter()
        total = write_checkpoint(checkpoint, shape, space, choices, config.shard_bytes, config.seed)
        spent = time.perf_counter() - start
        show(f"the checkpoint: {total / 1e9:.3g} GB in {spent:.0f} s")
        figures: Figures = {"checkpoint_gb": total / 1e9}
        if config.sort:
            figures["sort"] = _measure_sort(config, checkpoint, total)
        for name in smaller:
            figures[name] = _measure_member(config, checkpoint, name)
            params = figures[name]["parameters"]
            assert params == choices[name].params, (name, params, choices[name].params)
    for figure in GOALS:
        figures[figure] = max(figures[name][figure] for name in smaller)
    return Result(figures, _table(figures, smaller))


def _measure_member(config: ExtractBenchConfig, checkpoint: Path, name: str) -> Figures:
    """Copy and cut in turns; the last cut is verified, and held against stock transformers."""
    member = open_member(checkpoint, name)
    size = sum(tensor.bytes for tensor in member.tensors())
    output, copy = checkpoint.parent / name, checkpoint.parent / "copy"
    copies: list[float] = []
    cuts: list[Cut] = []
    rounds = config.warmup + config.repeats
    for number in range(1, rounds + 1):
        shutil.rmtree(output, ignore_errors=True)
        copies.append(_copy(checkpoint, copy, size))
        shutil.rmtree(copy)
        drop_cache(checkpoint)
        settings = ExtractConfig(
            checkpoint=str(checkpoint), budget=name, output=str(output), verify=False
        )
        cuts.append(in_child(settings, config.verify and number == rounds))
        show(
            f"{name}: round {number} of {rounds}, copied in {copies[-1]:.1f} s, "
            f"cut in {cuts[-1].seconds:.1f} s"
        )
    params = check_shapes(output)
    if not config.keep:
        shutil.rmtree(output)
    copies, timed, last = copies[config.warmup :], cuts[config.warmup :], cuts[-1]
    seconds = statistics.median(cut.seconds for cut in timed)
    ratio = statistics.median(
        cut.seconds / copied for cut, copied in zip(timed, copies, strict=True)
    )
    figures: Figures = {
        "parameters": params,
        "gb": size / 1e9,
        "seconds": seconds,
        "copy_seconds": statistics.median(copies),
        "time_over_copy": ratio,
        "gb_per_second": size / 1e9 / seconds,
        "bytes_read_over_needed": max(cut.bytes_read for cut in timed) / size,
        "bytes_read_over_touched": max(cut.bytes_read for cut in timed) / touched_bytes(member),
        "cut_peak_rss_gib": max(cut.peak for cut in timed) / 2**30,
        "peak_rss_gib": max(max(cut.peak, cut.verify_peak) for cut in timed) / 2**30,
    }
    if last.disk_bytes:
        figures["disk_bytes_over_needed"] = last.disk_bytes / size
    if last.verify_seconds is not None:
        figures["verify_seconds"] = last.verify_seconds
    return figures


def _measure_sort(config: ExtractBenchConfig, checkpoint: Path, size: int) -> Figures:
    """Sort the whole checkpoint by random legal orders, beside copying it."""
    copy, output = checkpoint.parent / "copy", checkpoint.parent / "sorted"
    copied = _copy(checkpoint, copy, size)
    shutil.rmtree(copy)
    drop_cache(checkpoint)
    seconds, peak = in_process(sort, checkpoint, output, config.seed)
    shutil.rmtree(output)
    show(f"the checkpoint: copied in {copied:.1f} s, sorted in {seconds:.1f} s")
    return {
        "gb": size / 1e9,
        "seconds": seconds,
        "copy_seconds": copied,
        "time_over_copy": seconds / copied,
        "peak_rss_gib": peak / 2**30,
    }


def _copy(checkpoint: Path, target: Path, size: int) -> float:
    """Seconds in which the first `size` bytes of the shards are copied to disk."""
    drop_cache(checkpoint)
    target.mkdir()
    left = size
    start = time.perf_counter()
    with Progress(size, "copying") as progress, contextlib.redirect_stdout(sys.stderr):
        for shard in sorted(checkpoint.glob("*.safetensors")):
            with shard.open("rb") as source, (target / shard.name).open("wb") as copy:
                while left:
                    count = os.sendfile(copy.fileno(), source.fileno(), None, min(left, CHUNK))
                    if not count:
                        break
                    left -= count
                    progress(count)
                os.fsync(copy.fileno())
        sync(target)
    assert left == 0, "members are smaller than the checkpoint"
    return time.perf_counter() - start


def drop_cache(directory: Path) -> None:
    """Let the system forget what it has read of these shards."""
    for shard in directory.glob("*.safetensors"):
        descriptor = os.open(shard, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def touched_bytes(member: OpenMember) -> int:
    """Bytes of the sealed blocks that hold anything of a member: what must be read to compare
    them. Norms of its own lie elsewhere, and weigh nothing."""
    touched: dict[tuple[Path, int], int] = {}
    for cut in member_cuts(member.parent, member.member.architecture):
        stored = member.store[cut.source]
        row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        for start, stop in cut.cut[0] or ((0, stored.shape[0]),):
            first, last = stored.offset + start * row, stored.offset + stop * row - 1
            for number in range(first // BLOCK_BYTES, last // BLOCK_BYTES + 1):
                rest = stored.file.bytes - number * BLOCK_BYTES
                touched[stored.file.path, number] = min(BLOCK_BYTES, rest)
    return sum(touched.values())


def check_shapes(directory: Path) -> int:
    """Parameters of a checkpoint, whose headers must be what stock transformers builds of its
    config.json; by safetensors and transformers alone.

    Raises:
        ValueError: they are not.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    built = {
        name.replace("model.", "backbone.", 1): tuple(weight.shape)
        for name, weight in model.named_parameters()
    }
    stored = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                stored[name] = tuple(file.get_slice(name).get_shape())
    if built != stored:
        wrong = sorted(n for n in built.keys() | stored.keys() if built.get(n) != stored.get(n))
        raise ValueError(
            f"{directory}: {wrong[0]} is stored as {stored.get(wrong[0])}, transformers builds "
            f"{built.get(wrong[0])}"
        )
    return sum(weight.numel() for weight in model.parameters())


@contextlib.contextmanager
def _directory(place: Path, keep: bool) -> Iterator[Path]:
    """A directory of our own, gone however this ends unless it is to be kept."""
    place.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-extract-", dir=place))
    try:
        yield directory
    finally:
        if keep:
            show(f"left in {directory}")
        else:
            shutil.rmtree(directory)


def show(line: str) -> None:
    """Progress, beside the table on stdout."""
    print(line, file=sys.stderr, flush=True)


def _table(figures: Figures, names: list[str]) -> str:
    times = ("member", "GB", "seconds", "copy", "over copy")
    header = (*times, "read over needed", "over touched", "peak GiB", "verify s")
    rows: list[list[str | float | None]] = [
        [
            name,
            *(
                figures[name][figure]
                for figure in ("gb", "seconds", "copy_seconds", "time_over_copy")
            ),
            figures[name]["bytes_read_over_needed"],
            figures[name]["bytes_read_over_touched"],
            figures[name]["peak_rss_gib"],
            figures[name].get("verify_seconds"),
        ]
        for name in names
    ]
    goals = ", ".join(
        f"{figure} {figures[figure]:.3g} (goal {goal:g})" for figure, goal in GOALS.items()
    )
    text = f"{table(header, rows)}\n{goals}"
    if "sort" in figures:
        text += (
            "\nsorting the whole checkpoint: {seconds:.1f} s, copying it {copy_seconds:.1f} s "
            "({time_over_copy:.2f} x), peak {peak_rss_gib:.2f} GiB".format(**figures["sort"])
        )
    return text
