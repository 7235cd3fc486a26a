"""bench step: one training step of the whole parent, of sliced and of masked members, and of stock
transformers, in seconds and in memory."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from elastic.bench.measure import Work, interleave, peak_memories
from elastic.bench.result import Figures, Result, table
from elastic.bench.subjects import (
    StockStep,
    TrainingStep,
    balanced_members,
    random_parent,
    random_tokens,
    shape_of,
)
from elastic.config import BudgetConfig, StepBenchConfig
from elastic.extract.compare import plain_transformers
from elastic.members.architecture import Architecture
from elastic.members.cost import flops_per_token, parameters
from elastic.members.targets import target_of
from elastic.parent import Member
from elastic.routing.masks import hard_keep
from elastic.routing.table import describe

STOCK = "transformers"


def measure(config: StepBenchConfig, device: torch.device) -> Result:
    """All variants in turns; a step is forward, chunked cross-entropy, backward, clip and AdamW."""
    shape = shape_of(config.parent)
    choices = balanced_members(config.space, shape, config.shares)
    variants: dict[str, tuple[str, Architecture | None]] = {"full": ("full", None)}
    for kind in ("sliced", "masked"):
        for name, choice in choices.items():
            variants[f"{kind} {name}"] = (kind, choice.architecture)
    chunks = {f"{STOCK}, chunk {chunk}": chunk for chunk in config.stock_chunks}
    memory: dict[str, float] = {}
    with _stock_kernels(device):
        if config.memory:
            alone = variants | {STOCK: (STOCK, None)}
            arguments = {name: (config, *variant, device) for name, variant in alone.items()}
            memory = peak_memories("step", arguments, first_steps, device)
        ours = _our_step(config, device)
        stock = _stock_step(config, device)
        stock.copy_weights(ours.module.parent)
        works: dict[str, Work] = {
            name: partial(ours, _execution(config, *variant, device))
            for name, variant in variants.items()
        }
        works |= {name: partial(stock, chunk) for name, chunk in chunks.items()}
        times = interleave(works, config.repeats, config.warmup, "step", device)

    fastest = times.fastest(chunks)
    architectures = {"full": Architecture.full(shape)}
    architectures |= {name: choice.architecture for name, choice in choices.items()}
    flops = {
        name: flops_per_token(shape, member, config.sequence_length)
        for name, member in architectures.items()
    }
    ratios = {name: flops[name] / flops["full"] for name in choices}
    sliced = {name: times.ratio(f"sliced {name}", "full") for name in choices}
    tokens = config.sequences * config.sequence_length
    figures: Figures = {
        "sliced_over_full": sliced,
        "flops_ratio": ratios,
        "sliced_over_flops": {name: sliced[name] / ratios[name] for name in choices},
        "masked_over_full": {name: times.ratio(f"masked {name}", "full") for name in choices},
        "full_over_transformers": times.ratio("full", fastest),
        "transformers_chunk": chunks[fastest],
        "parameters": {name: parameters(shape, member) for name, member in architectures.items()},
        "seconds": times.medians(),
        "tokens_per_second": {name: tokens / times.median(name) for name in works},
    }
    if config.memory:
        figures["peak_memory_mib"] = memory
    rows = [
        (
            name,
            1000 * times.median(name),
            tokens / times.median(name),
            times.ratio(name, "full"),
            ratios.get(name.removeprefix("sliced ")),
            memory.get(STOCK if name == fastest else name),
        )
        for name in works
    ]
    header = ("step", "ms", "tokens/s", "over full", "FLOPs over full", "peak MiB")
    shares = {name: BudgetConfig(params=float(name)) for name in choices}
    targets = {name: target_of(name, budget, shape) for name, budget in shares.items()}
    return Result(figures, f"{describe(targets, choices)}\n\n{table(header, rows)}")


def first_steps(
    config: StepBenchConfig, kind: str, member: Architecture | None, device: torch.device
) -> Work:
    """Work whose memory is that of training: weights, gradients, optimizer state, activations."""
    _train(_smallest(config), kind, None, device)  # what is loaded at first use is no part of it
    return partial(_train, config, kind, member, device)


def _smallest(config: StepBenchConfig) -> StepBenchConfig:
    """The same on a parent of negligible size."""
    shape = dataclasses.replace(
        shape_of(config.parent),
        hidden_size=8,
        vocab_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        mamba_num_heads=1,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=8,
    )
    parent = dataclasses.replace(config.parent, shape=shape)
    return dataclasses.replace(config, parent=parent, sequences=1, sequence_length=2)


def _train(
    config: StepBenchConfig, kind: str, member: Architecture | None, device: torch.device
) -> None:
    """Two steps from nothing: the optimizer's state comes into being in the first."""
    step: Work
    with _stock_kernels(device):
        if kind == STOCK:
            step = partial(_stock_step(config, device), config.stock_chunks[0])
        else:
            step = partial(_our_step(config, device), _execution(config, kind, member, device))
        for _ in range(2):
            step()


def _execution(
    config: StepBenchConfig, kind: str, member: Architecture | None, device: torch.device
) -> Member:
    """How the parent runs for a variant."""
    if kind != "masked" or member is None:
        return member
    return hard_keep(shape_of(config.parent), member, device)


def _our_step(config: StepBenchConfig, device: torch.device) -> TrainingStep:
    parent = random_parent(config.parent, config.seed, device)
    return TrainingStep(parent, _batch(config), config.chunk_tokens, config.precision)


def _stock_step(config: StepBenchConfig, device: torch.device) -> StockStep:
    return StockStep(shape_of(config.parent), _batch(config), config.precision, device)


def _batch(config: StepBenchConfig) -> torch.Tensor:
    vocabulary = shape_of(config.parent).vocab_size
    return random_tokens(vocabulary, config.sequences, config.sequence_length, config.seed)


def _stock_kernels(device: torch.device) -> AbstractContextManager:
    """On a GPU stock transformers may use all it has; on a CPU its kernels cannot run."""
    return plain_transformers() if device.type == "cpu" else nullcontext()
