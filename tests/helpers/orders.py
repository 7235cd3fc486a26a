"""Orders to sort by: random legal ones, the identity, one axis alone."""

import dataclasses

import torch
from torch import Tensor

from elastic.bench import sorting
from elastic.config import ParentShape
from elastic.importance import Orders


def random_orders(shape: ParentShape, seed: int) -> Orders:
    """Legal ones: heads stay in their group, everything else goes anywhere."""
    return sorting.random_orders(shape, torch.Generator().manual_seed(seed))


def identity_orders(shape: ParentShape) -> Orders:
    """Everything stays where it is."""
    orders = random_orders(shape, 0)
    axes = {
        name: order.sort().values
        if isinstance(order, Tensor)
        else {index: values.sort().values for index, values in order.items()}
        for name, order in vars(orders).items()
        if order is not None
    }
    return Orders(**axes)


def one_axis(shape: ParentShape, axis: str, seed: int) -> Orders:
    """Random on one axis, identity on the others."""
    return dataclasses.replace(
        identity_orders(shape), **{axis: getattr(random_orders(shape, seed), axis)}
    )


def random_rotation(size: int, seed: int) -> Tensor:
    """(size, size) float64, orthogonal."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(drawn).Q


def rotated_orders(shape: ParentShape, seed: int) -> Orders:
    """Random legal orders of the inner axes, and a random rotation of the stream."""
    rotation = random_rotation(shape.hidden_size, seed)
    return dataclasses.replace(random_orders(shape, seed), rotation=rotation)
