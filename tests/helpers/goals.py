"""Targets from numbers of parameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from elastic.config import ParentShape
from elastic.members.architecture import Space
from elastic.members.goals import PARAMS, Measure, Target
from elastic.routing.masks import Distributions
from elastic.routing.router import expected_sizes


def in_params(shape: ParentShape, counts: Mapping[str, int]) -> dict[str, Target]:
    """Every budget asks for so many parameters."""
    return {name: Target.params(shape, count) for name, count in counts.items()}


def expected_cost(
    space: Space,
    drop_order: Sequence[int],
    distributions: Distributions,
    measure: Measure = PARAMS,
) -> Tensor:
    """The cost of the expected sizes, (b,)."""
    hidden, layers = expected_sizes(space, drop_order, distributions)
    return torch.as_tensor(measure.of(space.shape, hidden, layers))
