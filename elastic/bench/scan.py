"""bench scan: the chunked scan, forward and backward, beside that of stock transformers."""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from elastic.bench.measure import Work, interleave, peak_memories
from elastic.bench.result import Figures, Result, table
from elastic.config import ScanBenchConfig, ScanShape
from elastic.parent.ssd import kernels_installed, scan
from elastic.parent.ssd_ref import CHUNK, ssd_chunked

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""x (b, t, h, p), raw step sizes (b, t, h), a (h,), b and c (b, t, g, n), d (h,)."""

OURS, THEIRS, KERNELS = "ours", "transformers", "mamba_ssm"

_stock = inspect.unwrap(mamba2_chunk_scan)
"""The plain twin, whatever kernels are installed."""


def measure(config: ScanBenchConfig, device: torch.device) -> Result:
    """Ours at its default chunk against theirs at its best, for every shape."""
    figures: Figures = {"default_chunk": CHUNK}
    rows: list[list[str | float | None]] = []
    for name, shape in config.shapes.items():
        found, lines = _measure_shape(config, name, shape, device)
        figures |= found
        rows += lines
    header = ("scan", "chunk", "ms", "over default", "peak MiB")
    return Result(figures, table(header, rows))


def _measure_shape(
    config: ScanBenchConfig, name: str, shape: ScanShape, device: torch.device
) -> tuple[Figures, list[list[str | float | None]]]:
    """Figures and lines of one shape."""
    chunks = sorted({*config.chunks, CHUNK})
    variants = {(who, chunk): f"{who} {chunk}" for who in (OURS, THEIRS) for chunk in chunks}
    if device.type == "cuda" and kernels_installed():
        variants[KERNELS, 0] = KERNELS
    works = {
        label: prepare(config, shape, who, chunk, device)
        for (who, chunk), label in variants.items()
    }
    times = interleave(works, config.repeats, config.warmup, f"scan {name}", device)
    default = variants[OURS, CHUNK]
    best = {
        who: min(chunks, key=lambda chunk: times.median(variants[who, chunk]))
        for who in (OURS, THEIRS)
    }
    rival = variants[THEIRS, best[THEIRS]]
    milliseconds = {
        who: {str(c): 1000 * times.median(variants[who, c]) for c in chunks}
        for who in (OURS, THEIRS)
    }
    figures: Figures = {
        f"speedup_{name}": times.ratio(rival, default),
        f"best_chunk_{name}": best,
        f"milliseconds_{name}": milliseconds,
    }
    if (KERNELS, 0) in variants:
        figures[f"kernels_over_ours_{name}"] = times.ratio(KERNELS, default)
    memory: dict[str, float] = {}
    if config.memory:
        works.clear()  # and with them their inputs
        chosen = {default: (OURS, CHUNK), rival: (THEIRS, best[THEIRS])}
        arguments = {
            label: (config, shape, who, chunk, device) for label, (who, chunk) in chosen.items()
        }
        memory = peak_memories(f"scan {name}", arguments, prepare, device)
        figures[f"memory_{name}"] = memory[default] / memory[rival]
        figures[f"peak_memory_mib_{name}"] = {OURS: memory[default], THEIRS: memory[rival]}
    rows: list[list[str | float | None]] = [
        [
            f"{name} {who}",
            str(chunk or ""),
            1000 * times.median(label),
            times.ratio(label, default),
            memory.get(label),
        ]
        for (who, chunk), label in variants.items()
    ]
    return figures, rows


def prepare(
    config: ScanBenchConfig, shape: ScanShape, who: str, chunk: int, device: torch.device
) -> Work:
    """Forward and backward of one scan."""
    function = _function(who, chunk)
    short = ScanShape(**{**vars(shape), "batch": 1, "time": 2})
    _forward_backward(function, short, config, device)()  # loads what the first call loads
    return _forward_backward(function, shape, config, device)


def _forward_backward(
    function: Callable[..., Tensor], shape: ScanShape, config: ScanBenchConfig, device: torch.device
) -> Work:
    inputs = random_inputs(shape, config.seed, getattr(torch, config.dtype), device)
    weight = torch.randn(inputs[0].shape, device=device, dtype=inputs[0].dtype)

    def work() -> None:
        torch.autograd.grad(function(*inputs), inputs, weight)

    return work


def _function(who: str, chunk: int) -> Callable[..., Tensor]:
    """A scan from raw step sizes, so that all do the same work."""
    if who == KERNELS:
        return _scan_by_kernels

    def ours(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ssd_chunked(x, F.softplus(dt), a, b, c, d, chunk=chunk)

    def theirs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        y: Tensor = _stock(x, F.softplus(dt), a, b, c, chunk, D=d)
        return y

    return theirs if who == THEIRS else ours


def _scan_by_kernels(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return scan(x, dt, torch.zeros_like(d), (0.0, math.inf), a, b, c, d, KERNELS)


def random_inputs(shape: ScanShape, seed: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Inputs as a model has them: step sizes of about 0.1 and float32, decays of about -1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    batch, time = shape.batch, shape.time
    x = normal(batch, time, shape.heads, shape.channels).to(dtype)
    dt = normal(batch, time, shape.heads) - 2
    a = -torch.exp(normal(shape.heads) / 2)
    b = normal(batch, time, shape.groups, shape.state).to(dtype)
    c = normal(batch, time, shape.groups, shape.state).to(dtype)
    d = normal(shape.heads)
    x, dt, a, b, c, d = (value.to(device).requires_grad_() for value in (x, dt, a, b, c, d))
    return x, dt, a, b, c, d
