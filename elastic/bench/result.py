"""What a bench hands back: figures for a file, a table for a reader, and the machine they are
of."""

import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elastic import console
from elastic.config import BenchConfig, ConfigError
from elastic.storage.files import write_json

Figures = dict[str, Any]
"""Names to numbers, or to further figures."""


@dataclass(frozen=True)
class Result:
    """Of one bench."""

    figures: Figures
    table: str


def report(name: str, config: BenchConfig, measure: Callable[[Any, torch.device], Result]) -> None:
    """Run a bench, print its table, and write its figures to `json`."""
    output = None if config.json is None else Path(config.json)
    if output is not None and output.is_dir():
        raise ConfigError(f"json={output}: must be a file, and is a directory")
    device = device_of(config.device)
    torch.manual_seed(config.seed)
    described = machine(device)
    print(", ".join(f"{key} {value}" for key, value in described.items()), flush=True)
    result = measure(config, device)
    _check(result.figures, "figures")
    print(result.table)
    if output is not None:
        content = {"name": name, "machine": described, "settings": asdict(config)}
        write_json(output, content | {"figures": result.figures})
        print(f"written to {output}")


def device_of(name: str) -> torch.device:
    """The device of a setting; `ConfigError` for a GPU that is not there."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("device=cuda: no GPU is visible; must be cpu or auto here")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures are from: CPU, threads, memory, versions; the GPU only if it is used."""
    described: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _cpu() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _check(value: Any, key: str) -> None:
    """A figure that is not a finite number is our mistake."""
    if isinstance(value, dict):
        for name, entry in value.items():
            _check(entry, f"{key}.{name}")
    else:
        assert isinstance(value, (int, float)) and math.isfinite(value), f"{key} is {value}"


def table(header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """Columns of text: names to the left, numbers to the right, nothing where there is None."""
    cells = [[_cell(value) for value in row] for row in rows]
    return "\n".join(console.table(header, cells))


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
