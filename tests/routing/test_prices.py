"""What a router pays for sizes that are not asked for: one price per goal of a budget."""

import pytest
import torch
from helpers.goals import expected_cost
from routing.test_family import LEARNED, SHAPE, TARGETS, WHOLE, family_of, masks

from elastic.config import ObjectiveConfig
from elastic.members.goals import Goal, Measure, Target
from elastic.routing.router import Router


def test_a_price_follows_the_noise_free_size_of_a_budget_that_was_drawn() -> None:
    """And no other, and none where the step was left out."""
    family = family_of(hard_probability=0.0)
    one, two = (family.draw("small", 0.0, seed) for seed in (1, 2))
    assert any(not torch.equal(a, b) for a, b in zip(masks(one), masks(two), strict=True))
    assert one.figures["expected_params"] == two.figures["expected_params"]
    family.stepped(False)
    assert family.router.multipliers.tolist() == [[0.0], [0.0]]
    family.draw("small", 0.0, 3)
    family.stepped(True)
    medium, small = family.router.multipliers.flatten().tolist()
    assert medium == 0.0 and small == pytest.approx(0.3 * 0.1), "far too large at the start"
    family.stepped(True)
    assert family.router.multipliers.flatten().tolist() == [medium, small], "nothing drawn"


def test_every_goal_of_a_budget_has_its_price() -> None:
    """Medium asks for parameters alone, small for its parameters and a larger cache too."""
    cache = Measure("cache_bytes", context=20)
    whole = cache.exact(SHAPE, WHOLE)
    small = Target(SHAPE, (*TARGETS["small"].goals, Goal(cache, round(0.6 * whole), whole)))
    family = family_of(
        hard_probability=0.0, tolerance=0.1, targets=TARGETS | {"small": small}, goals=2
    )
    router = family.router
    assert isinstance(router, Router)
    drawn = [family.draw(budget, 0.0, 3) for budget in LEARNED][1]
    even = {axis: torch.softmax(v.detach(), -1) for axis, v in router(1, 1.0).items()}
    excess = [
        float(expected_cost(family.space, (1,), even, goal.measure)) / goal.value - 1
        for goal in small.goals
    ]
    assert float(drawn.terms["budget"].detach()) == pytest.approx(max(map(abs, excess)), rel=1e-5)
    weight = ObjectiveConfig().budget_weight
    paid = sum(weight / 2 * each**2 for each in excess)
    assert float(drawn.terms["total"].detach()) == pytest.approx(paid, rel=1e-5)
    family.stepped(True)
    (one, unused), prices = router.multipliers.tolist()
    rate = ObjectiveConfig().budget_rate
    assert one > 0 and unused == 0.0
    assert prices == pytest.approx([rate * min(0.1, each) for each in excess], rel=1e-4)
    chosen = family.choices(0.3)["small"]
    assert abs(small.off_by(chosen.architecture)) <= 0.1
