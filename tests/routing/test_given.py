"""A family whose members are given: no router, and the same members after a resume."""

from dataclasses import replace

import pytest
import torch
from helpers.routers import members
from routing.test_family import CHOICES, SHAPE, TARGETS, WHOLE, stored

from elastic.config import ConfigError, ObjectiveConfig, RouterConfig, SpaceConfig
from elastic.members.architecture import Space
from elastic.routing.family import Family
from elastic.routing.router import Router


def given_family(small: int = 10) -> Family:
    """A family that settings give: 16, 14 and `small` channels."""
    space_config = SpaceConfig(**CHOICES)
    space = Space.build(space_config, SHAPE)
    config = RouterConfig()
    router = Router(space, 0, config, torch.Generator().manual_seed(0))
    given = {
        name: replace(WHOLE, hidden_size=width)
        for name, width in zip(TARGETS, (16, 14, small), strict=True)
    }
    objective = ObjectiveConfig()
    return Family(space, (1,), TARGETS, router, config, space_config, objective, given)


def test_given_members_are_trained_as_themselves_from_the_first_step() -> None:
    """No router, no masks, nothing to pay; the cosine starts after the warmup."""
    family = given_family()
    assert not list(family.router.parameters()) and family.held_until == 0.0
    assert not family.freeze_if_due(1.0)
    for name, member in members(family).items():
        draw = family.draw(name, 0.0, 0)
        assert draw.terms == {} and draw.member == (None if name == "full" else member)
    assert family.smaller == {"medium": 0, "small": 1}, "for norms of their own"


def test_a_run_goes_on_with_the_member_that_was_given_alone() -> None:
    family = given_family()
    other = given_family()
    other.load_state(stored(family.state()))
    assert members(other) == members(family)
    line = "^budgets.small.architecture: is not the member that this run trains; restore it, or"
    with pytest.raises(ConfigError, match=line):
        given_family(small=9).load_state(stored(family.state()))
