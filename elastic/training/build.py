"""Setup -> the parts that train: the parent, the family of its members, and their teacher."""

from pathlib import Path
from typing import Any

import torch

from elastic.importance import Ranking
from elastic.members.families import nested_families
from elastic.members.search import Search
from elastic.members.targets import smaller_budgets
from elastic.parent import HybridParent
from elastic.parent.weights import load_parent
from elastic.routing.family import Family
from elastic.routing.nested import FamilyRouter
from elastic.routing.router import Router
from elastic.teacher import Teacher, build_teacher, cache_contents, cache_places
from elastic.training.setup import Setup


def blank(setup: Setup) -> HybridParent:
    """A parent whose weights are set next."""
    checkpointing = setup.config.parent.activation_checkpointing
    return HybridParent(setup.shape, setup.kernels, checkpointing)


def initial(setup: Setup, seed: int) -> HybridParent:
    """Random weights, a function of `seed`."""
    return blank(setup).initialise(torch.Generator().manual_seed(seed))


def load(setup: Setup, directory: Path) -> HybridParent:
    """The parent of a checkpoint, compared with its seals."""
    seals = setup.seals if directory == setup.original else None
    checkpointing = setup.config.parent.activation_checkpointing
    return load_parent(directory, setup.kernels, checkpointing, seals)


def family_of(setup: Setup, ranking: Ranking) -> Family:
    """Budgets, and the router that chooses a member for each."""
    config = setup.config
    generator = torch.Generator().manual_seed(config.seed + 1)
    smaller = smaller_budgets(setup.targets)
    router: Router | FamilyRouter
    if config.router.kind == "members" and not setup.given:
        search = Search(setup.space, ranking.drop_order, config.space.tolerance)
        families = nested_families(search, setup.targets, config.space.nested)
        router = FamilyRouter(families, config.router, generator)
    else:
        choices = 0 if setup.given else len(smaller)
        goals = max(len(setup.targets[name].goals) for name in setup.targets)
        router = Router(setup.space, choices, config.router, generator, goals)
    return Family(
        setup.space,
        ranking.drop_order,
        setup.targets,
        router.to(setup.device),
        config.router,
        config.space,
        config.objective,
        setup.given,
    )


def cached_teacher(setup: Setup) -> Teacher | None:
    """The teacher, where it is read from a cache; looked at whole, so that what is missing stops a
    run before it trains."""
    config = setup.config
    if config.objective.teacher != "offline":
        return None
    vocabulary = setup.shape.vocab_size
    wanted = cache_contents(config, setup.stages, setup.data, setup.original, vocabulary)
    places = cache_places(config, setup.stages, setup.data)
    return _teacher(setup, None, wanted=wanted, places=places)


def online_teacher(setup: Setup) -> Teacher | None:
    """The frozen parent; None where the full budget teaches."""
    if setup.config.objective.teacher == "in_place":
        return None
    return _teacher(setup, load(setup, setup.original))


def _teacher(setup: Setup, parent: HybridParent | None, **cached: Any) -> Teacher:
    return build_teacher(
        setup.config.objective,
        parent,
        setup.config.trainer.precision,
        setup.place.world_size,
        setup.place.rank,
        **cached,
    )
