"""Orders to sort by: random legal ones, the identity, one axis alone."""

import dataclasses

import torch
from torch import Tensor

from elastic.config import ParentShape
from elastic.importance import Orders


def random_orders(shape: ParentShape, seed: int) -> Orders:
    """Legal ones: heads stay in their group, everything else goes anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(size: int, groups: int = 1) -> Tensor:
        each = size // groups
        parts = [g * each + torch.randperm(each, generator=generator) for g in range(groups)]
        return torch.cat(parts)

    layers = {
        kind: [index for index, k in enumerate(shape.kinds) if k == kind]
        for kind in ("mamba", "mlp", "attention")
    }
    heads, queries = shape.mamba_num_heads, shape.num_attention_heads
    return Orders(
        hidden=shuffled(shape.hidden_size),
        ffn={index: shuffled(shape.intermediate_size) for index in layers["mlp"]},
        mamba_heads={index: shuffled(heads, shape.n_groups) for index in layers["mamba"]},
        mamba_channels={index: shuffled(shape.mamba_head_dim) for index in layers["mamba"]},
        attention_heads={
            index: shuffled(queries, shape.num_key_value_heads) for index in layers["attention"]
        },
    )


def identity_orders(shape: ParentShape) -> Orders:
    """Everything stays where it is."""
    orders = random_orders(shape, 0)
    axes = {
        name: order.sort().values
        if isinstance(order, Tensor)
        else {index: values.sort().values for index, values in order.items()}
        for name, order in vars(orders).items()
    }
    return Orders(**axes)


def one_axis(shape: ParentShape, axis: str, seed: int) -> Orders:
    """Random on one axis, identity on the others."""
    return dataclasses.replace(
        identity_orders(shape), **{axis: getattr(random_orders(shape, seed), axis)}
    )
