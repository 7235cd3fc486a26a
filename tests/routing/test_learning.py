"""The router learns: its gradients, and that expected sizes are held at their targets."""

import pytest
import torch
from helpers.goals import expected_cost
from helpers.routers import DROP, SPACE, generator, router_of
from helpers.spaces import FULL, space_of

from elastic.config import ObjectiveConfig, OptimConfig, RouterConfig
from elastic.losses import next_multiplier, router_terms
from elastic.routing.curriculum import draw_seed
from elastic.routing.router import (
    RouterOptimizer,
    sample,
    schedule,
)

# Gradients


OBJECTIVE = ObjectiveConfig()


@pytest.mark.parametrize("axis", SPACE.elastic_axes)
@pytest.mark.parametrize(("target", "wants_smaller"), [(0.5, True), (2.0, False)])
def test_the_budget_loss_pushes_towards_its_target(
    axis: str, target: float, wants_smaller: bool
) -> None:
    """A step down the gradient moves every axis alone, and every layer of it, the right way."""
    decisions, choices = SPACE.decisions(axis), len(SPACE.choices[axis])
    logits = torch.zeros(1, decisions, choices, requires_grad=True)
    distributions = {axis: torch.softmax(logits, -1)}
    expected = expected_cost(SPACE, DROP, distributions)
    price = torch.zeros(())
    router_terms(expected, target * expected.item(), price, OBJECTIVE)[0]["total"].backward()
    assert logits.grad is not None
    largest, smallest = logits.grad[0, :, 0], logits.grad[0, :, -1]
    assert bool((largest > smallest).all()) == wants_smaller
    assert (largest != smallest).all()


def test_the_gradient_of_the_budget_reaches_every_weight_of_the_router() -> None:
    router = router_of()
    expected = expected_cost(SPACE, DROP, sample(router(1, 1.0), 1.0, generator()))
    router_terms(expected, FULL / 2, torch.zeros(()), OBJECTIVE)[0]["total"].backward()
    for name, weight in router.budgets[1].named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


# Learning


def learn(
    heterogeneous: tuple[str, ...], slope: float, steps: int, seed: int = 0, **fields: float
) -> list[float]:
    """Relative distance of the expected size from 90%, 75% and 50% of a toy parent, after so many
    steps in which every budget is drawn; distillation would fall by `slope` nats if a member were
    larger by its target."""
    space = space_of(
        heterogeneous,
        hidden=[16, 15, 14, 13, 12, 11, 10, 9, 8],
        ffn=[32, 28, 24, 20, 16],
        mamba_heads=[6, 4, 2],
        depth=[5, 4, 3],
    )
    objective, config = ObjectiveConfig(**fields), RouterConfig()  # type: ignore[arg-type]
    targets, router = [0.9 * FULL, 0.75 * FULL, 0.5 * FULL], router_of(space, seed=seed)
    optimizer = RouterOptimizer(router, OptimConfig())
    for step in range(steps):
        now = schedule(config, step / steps)
        for budget, target in enumerate(targets):
            logits = router(budget, now.scale)
            noise = generator(draw_seed(seed, "router", 0, step, budget))
            drawn = expected_cost(space, DROP, sample(logits, now.temperature, noise))
            even = {axis: torch.softmax(values, -1) for axis, values in logits.items()}
            price = router.multipliers[budget]
            terms, excess = router_terms(
                expected_cost(space, DROP, even), target, price.clone(), objective
            )
            (terms["total"] - slope * drawn.mean() / target).backward()
            price.copy_(next_multiplier(price, excess, objective))
        optimizer.step(1e-3)
    off = []
    for budget, target in enumerate(targets):
        logits = router(budget, config.scale_end)
        even = {axis: torch.softmax(values, -1) for axis, values in logits.items()}
        off.append(expected_cost(space, DROP, even).item() / target - 1)
    return off


@pytest.mark.parametrize("slope", [0.0, 3.0], ids=["alone", "against-distillation"])
@pytest.mark.parametrize("heterogeneous", [(), ("ffn", "mamba_heads")], ids=["once", "layered"])
def test_expected_sizes_are_held_at_their_targets(
    heterogeneous: tuple[str, ...], slope: float
) -> None:
    """Where every member would rather be larger, too. Over three seeds: roundings of 300 steps move
    one of them by as much, from processor to processor."""
    off = [max(map(abs, learn(heterogeneous, slope, 300, seed))) for seed in range(3)]
    assert sum(off) / len(off) < 0.06


def test_a_fixed_price_is_outbid_by_distillation() -> None:
    """A weight of the order of the paper's ends above the target."""
    assert max(learn((), 3.0, 300, budget_weight=3.0, budget_rate=0.0)) > 0.2
