"""A space with axes of both kinds, and routers over it."""

import torch
from helpers.spaces import space_of

from elastic.config import RouterConfig
from elastic.members.architecture import Architecture, Space
from elastic.routing.family import Family
from elastic.routing.router import Router

DROP = (1, 3)
SPACE = space_of(("ffn",), hidden=[16, 12, 8], ffn=[32, 20], mamba_heads=[6, 4, 2], depth=[5, 4, 3])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def router_of(space: Space = SPACE, budgets: int = 3, seed: int = 0, **fields: float) -> Router:
    return Router(space, budgets, RouterConfig(**fields), generator(seed))  # type: ignore[arg-type]


def members(family: Family) -> dict[str, Architecture]:
    """What a family has frozen."""
    assert family.frozen is not None
    return {name: choice.architecture for name, choice in family.frozen.items()}
