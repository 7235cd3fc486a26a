"""A shape and spaces small enough to search by brute force."""

import itertools
from collections.abc import Sequence

from helpers.strategies import tiny_shape

from elastic.config import AXES, SpaceConfig
from elastic.members.architecture import Architecture, Selection, Space
from elastic.members.cost import parameters
from elastic.members.search import Choice

SHAPE = tiny_shape(pattern="M-*M-", hidden_size=16, intermediate_size=32)
FULL = parameters(SHAPE, Architecture.full(SHAPE))


def space_of(heterogeneous: Sequence[str] = (), **axes: list[int]) -> Space:
    return Space.build(SpaceConfig(heterogeneous=list(heterogeneous), **axes), SHAPE)


def everything(space: Space, drop_order: Sequence[int]) -> list[Choice]:
    """All selections of a space, with their architecture and exact size; the parent's first."""
    per_axis = [
        itertools.product(range(len(space.choices[axis])), repeat=space.decisions(axis))
        for axis in AXES
    ]
    members = []
    for indices in itertools.product(*per_axis):
        selection = dict(zip(AXES, indices, strict=True))
        architecture = space.architecture(selection, tuple(drop_order))
        members.append(Choice(selection, architecture, parameters(space.shape, architecture)))
    return members


def selection(space: Space, **indices: int) -> Selection:
    """One index per axis, the same for all layers; 0 where none is given."""
    return {axis: (indices.get(axis, 0),) * space.decisions(axis) for axis in AXES}
