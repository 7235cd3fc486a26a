"""One sort in a process of its own, and that process' own counters."""

import time
from pathlib import Path

import torch
from torch import Tensor

from elastic.bench.measure import resident_peak
from elastic.config import ParentShape
from elastic.importance import Orders, sort_checkpoint
from elastic.parent.weights import open_weights
from elastic.storage.files import atomic_directory


def sort(checkpoint: Path, output: Path, seed: int) -> tuple[float, int]:
    """Seconds of sorting a checkpoint by random orders, and bytes that this process held at
    most."""
    torch.set_num_threads(1)
    orders = random_orders(open_weights(checkpoint)[0], torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    with atomic_directory(output) as temporary:
        sort_checkpoint(checkpoint, temporary, orders, "random")
    return time.perf_counter() - start, resident_peak()


def random_orders(shape: ParentShape, generator: torch.Generator) -> Orders:
    """Legal ones: heads stay in their group, everything else goes anywhere."""

    def shuffled(size: int, groups: int = 1) -> Tensor:
        each = size // groups
        parts = [g * each + torch.randperm(each, generator=generator) for g in range(groups)]
        return torch.cat(parts)

    def of(kind: str, size: int, groups: int = 1) -> dict[int, Tensor]:
        return {i: shuffled(size, groups) for i, k in enumerate(shape.kinds) if k == kind}

    return Orders(
        hidden=shuffled(shape.hidden_size),
        ffn=of("mlp", shape.intermediate_size),
        mamba_heads=of("mamba", shape.mamba_num_heads, shape.n_groups),
        mamba_channels=of("mamba", shape.mamba_head_dim),
        attention_heads=of("attention", shape.num_attention_heads, shape.num_key_value_heads),
    )
