"""bench loss: distillation through the LM heads in chunks, beside its dense twin."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from elastic.bench.measure import Work, interleave, peak_memories
from elastic.bench.result import Figures, Result, table
from elastic.config import ConfigError, LossBenchConfig, ObjectiveConfig
from elastic.losses import distillation_dense, token_terms

CHUNKED, DENSE = "chunked", "dense"

DENSE_COPIES = {"forward_kl": 7, "reverse_kl": 7, "jsd": 9}
"""Tensors of [tokens, vocabulary] that the dense twin holds at its peak, as measured."""


def measure(config: LossBenchConfig, device: torch.device) -> Result:
    """Forward and backward, to hidden states and head, of both in turns."""
    if device.type == "cpu":
        _check_memory(config)
    memory: dict[str, float] = {}
    variants = {name: (config, name, device) for name in (CHUNKED, DENSE)}
    if config.memory:  # first, while this process holds nothing
        memory = peak_memories("loss", variants, prepare, device)
    works = {name: prepare(*arguments) for name, arguments in variants.items()}
    times = interleave(works, config.repeats, config.warmup, "loss", device)
    figures: Figures = {"time_ratio": times.ratio(CHUNKED, DENSE), "seconds": times.medians()}
    if config.memory:
        figures["peak_memory_ratio"] = memory[CHUNKED] / memory[DENSE]
        figures["peak_memory_mib"] = memory
    rows = [
        (name, times.median(name), times.ratio(name, DENSE), memory.get(name)) for name in works
    ]
    header = (f"loss, {config.divergence}", "seconds", "over dense", "peak MiB")
    return Result(figures, table(header, rows))


def prepare(config: LossBenchConfig, name: str, device: torch.device) -> Work:
    """Forward and backward of one of the two."""
    few = LossBenchConfig(**{**vars(config), "tokens": 2, "vocabulary": 8})
    _forward_backward(few, name, device)()  # what is loaded at the first call is no memory of it
    return _forward_backward(config, name, device)


def _forward_backward(config: LossBenchConfig, name: str, device: torch.device) -> Work:
    generator = torch.Generator().manual_seed(config.seed)
    tokens, vocabulary, hidden = config.tokens, config.vocabulary, config.hidden
    scale = hidden**-0.5  # logits of about 1
    sizes = {"x": (tokens, hidden), "weight": (vocabulary, hidden)}
    student, teacher = (
        tuple(
            (torch.randn(size, generator=generator) * (scale if part == "weight" else 1)).to(device)
            for part, size in sizes.items()
        )
        for _ in range(2)
    )
    for part in student:
        part.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    objective = ObjectiveConfig(divergence=config.divergence, chunk_tokens=config.chunk_tokens)
    heads = (student[0], student[1]), (teacher[0], teacher[1])

    def chunked() -> torch.Tensor:
        return token_terms(*heads, targets, objective)["total"]

    def dense() -> torch.Tensor:
        logits = F.linear(*heads[0]), F.linear(*heads[1])
        return distillation_dense(*logits, config.divergence, objective.temperature)

    return partial(_run, chunked if name == CHUNKED else dense, student)


def _run(loss: Work, weights: tuple[torch.Tensor, ...]) -> None:
    torch.autograd.grad(loss(), weights)


def _check_memory(config: LossBenchConfig) -> None:
    """Refuse what would have the machine swap, or the process killed."""
    information = Path("/proc/meminfo")
    if not information.is_file():
        return
    lines = information.read_text().splitlines()
    free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}["MemAvailable"]
    needed = DENSE_COPIES[config.divergence] * config.tokens * config.vocabulary * 4
    if needed > free:
        raise ConfigError(
            f"tokens={config.tokens}: the dense twin needs {needed / 1e9:.0f} GB of memory, "
            f"and {free / 1e9:.0f} GB are free; lower tokens or vocabulary"
        )
