"""The router: schedules, draws, expected cost and entropy.

Draws are compared with the probabilities they come from, expected sizes with enumerations and with
exact counts of one-hot choices. Statistical bounds are 4 sigma of fixed seeds.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.goals import expected_cost
from helpers.routers import DROP, SPACE, generator, router_of
from helpers.spaces import FULL, SHAPE, space_of
from helpers.strategies import selections, shapes, spaces
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.config import OptimConfig, RouterConfig
from elastic.members.architecture import Selection, Space
from elastic.members.cost import parameters
from elastic.members.goals import PARAMS, Measure
from elastic.routing.router import (
    RouterOptimizer,
    Schedule,
    entropy,
    sample,
    schedule,
)


def one_hots(space: Space, selection: Selection) -> dict[str, Tensor]:
    """(1, decisions, choices) per elastic axis, in float64."""
    return {
        axis: F.one_hot(torch.tensor([selection[axis]]), len(space.choices[axis])).double()
        for axis in space.elastic_axes
    }


# Noise


@pytest.mark.parametrize("hard_probability", [0.0, 1.0])
def test_noise_is_drawn_axis_by_axis(hard_probability: float) -> None:
    """One copy to the device or one for each axis: the same numbers, written out plainly."""
    logits = router_of()(1, scale=2.0)
    drawn, noise = sample(logits, 0.7, generator(5), hard_probability), generator(5)
    torch.rand((), generator=noise)  # soft or hard
    assert list(drawn) == list(logits)
    for axis, values in logits.items():
        uniform = torch.rand(values.shape, generator=noise).clamp(1e-9, 1 - 1e-7)
        gumbel = -torch.log(-torch.log(uniform))
        expected = torch.softmax((values + gumbel) / 0.7, dim=-1)
        if hard_probability:
            expected = F.one_hot(expected.argmax(-1), expected.shape[-1]) + expected - expected
        assert torch.equal(drawn[axis], expected), axis


# Schedules


def test_schedules_start_and_end_exactly_at_the_published_values() -> None:
    config = RouterConfig()
    assert schedule(config, 0.0) == Schedule(temperature=1.0, scale=1.0)
    end = schedule(config, 1.0)
    assert end.temperature == pytest.approx(0.05, rel=1e-12) and end.scale == 10.0


def test_temperature_falls_geometrically_and_scale_grows_linearly() -> None:
    config = RouterConfig()
    middle = schedule(config, 0.5)
    assert middle.temperature == pytest.approx(math.sqrt(1.0 * 0.05), rel=1e-12)
    assert middle.scale == 5.5
    moments = [schedule(config, step / 10) for step in range(11)]
    for before, after in itertools.pairwise(moments):
        assert after.temperature / before.temperature == pytest.approx(0.05**0.1)
        assert after.scale - before.scale == pytest.approx(0.9)


@pytest.mark.parametrize(("beyond", "edge"), [(-0.5, 0.0), (1.5, 1.0)])
def test_schedules_hold_their_ends(beyond: float, edge: float) -> None:
    assert schedule(RouterConfig(), beyond) == schedule(RouterConfig(), edge)


# The network


def test_logits_have_one_row_per_decision() -> None:
    sizes = {axis: tuple(values.shape) for axis, values in router_of()(0, 1.0).items()}
    assert sizes == {
        "hidden": (1, 1, 3), "ffn": (1, 2, 2), "mamba_heads": (1, 1, 3), "depth": (1, 1, 3)
    }  # fmt: skip


def test_an_axis_that_is_left_alone_has_no_router() -> None:
    assert list(router_of(space_of(ffn=[32, 20]))(0, 1.0)) == ["ffn"]
    assert router_of(space_of())(2, 1.0) == {}


@pytest.mark.parametrize("seed", range(3))
def test_training_starts_near_the_parent(seed: int) -> None:
    """The head start makes the full choice the most probable one for every budget and layer."""
    router = router_of(seed=seed)
    for budget in range(3):
        for values in router.log_probabilities(budget, 1.0).values():
            assert (values.argmax(-1) == 0).all()
            assert math.exp(values[:, 0].min()) > 0.6


@pytest.mark.parametrize("scale", [1.0, 10.0, 200.0])
def test_the_head_start_does_not_grow_with_the_scale(scale: float) -> None:
    """Where it does, the softmax saturates at full size before anything is learnt."""
    plain, ahead = router_of(full_bias=0.0)(0, scale), router_of(full_bias=3.0)(0, scale)
    for axis, values in ahead.items():
        start = torch.zeros_like(values)
        start[..., 0] = 3.0
        torch.testing.assert_close(values - plain[axis], start, rtol=0, atol=1e-4)


def test_a_budget_that_was_not_drawn_does_not_move() -> None:
    """Not by shared weights, and not by what Adam remembers of an earlier step."""
    router = router_of()
    optimizer = RouterOptimizer(router, OptimConfig())

    def step(*budgets: int) -> list[dict[str, Tensor]]:
        for budget in budgets:
            drawn = sample(router(budget, 1.0), 1.0, generator())
            expected_cost(SPACE, DROP, drawn).sum().backward()
        optimizer.step(1e-2)
        return [router(budget, 1.0) for budget in range(3)]

    before, after = step(0, 1, 2), step(1)
    for axis in SPACE.elastic_axes:
        moved = [not torch.equal(before[b][axis], after[b][axis]) for b in range(3)]
        assert moved == [False, True, False]


def test_multipliers_are_in_a_checkpoint_and_not_among_the_weights() -> None:
    one, other = router_of(), router_of()
    one.multipliers.copy_(torch.tensor([[0.5], [-1.0], [2.0]]))
    RouterOptimizer(other, OptimConfig()).load_state(RouterOptimizer(one, OptimConfig()).state())
    assert other.multipliers.tolist() == [[0.5], [-1.0], [2.0]]
    assert "multipliers" not in one.state_dict()


def test_without_a_head_start_choices_begin_about_even() -> None:
    for values in router_of(full_bias=0.0).log_probabilities(0, 1.0).values():
        assert abs(math.exp(values.max()) * values.shape[-1] - 1) < 0.5


def test_budgets_have_logits_of_their_own() -> None:
    one, two, three = (router_of()(budget, 1.0) for budget in range(3))
    for axis in SPACE.elastic_axes:
        assert not torch.equal(one[axis], two[axis]) and not torch.equal(two[axis], three[axis])


def test_the_start_is_a_function_of_the_generator() -> None:
    first = router_of(seed=1).state_dict()
    torch.manual_seed(77)
    second, other = router_of(seed=1).state_dict(), router_of(seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_log_probabilities_are_those_of_the_scaled_logits() -> None:
    router = router_of()
    logits = router(1, 4.0)
    for axis, values in router.log_probabilities(1, 4.0).items():
        expected = torch.log_softmax(logits[axis][0], -1)
        torch.testing.assert_close(torch.from_numpy(values).float(), expected.detach())


# Draws


def logits_of(*values: float, decisions: int = 1) -> dict[str, Tensor]:
    return {"ffn": torch.tensor(values).expand(1, decisions, -1).clone().requires_grad_()}


@pytest.mark.parametrize("hard", [0.0, 1.0], ids=["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_draws_are_distributions(hard: float, temperature: float) -> None:
    drawn = sample(router_of()(1, 10.0), temperature, generator(), hard)
    for values in drawn.values():
        assert (values >= 0).all()
        torch.testing.assert_close(values.sum(-1), torch.ones(values.shape[:-1]))


def test_the_same_seed_draws_the_same() -> None:
    """Hard or soft included; the global generator has no say."""
    logits = router_of()(1, 1.0)
    for seed in range(8):
        first = sample(logits, 1.0, generator(seed), 0.5)
        torch.manual_seed(seed + 1)
        second, other = (sample(logits, 1.0, generator(s), 0.5) for s in (seed, seed + 100))
        assert all(torch.equal(first[axis], second[axis]) for axis in first)
        assert any(not torch.equal(first[axis], other[axis]) for axis in first)


def test_axes_and_layers_have_noise_of_their_own() -> None:
    even = {axis: torch.zeros(1, 2, 3) for axis in ("ffn", "mamba_heads")}
    drawn = sample(even, 1.0, generator())
    rows = [row for values in drawn.values() for row in values[0]]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(rows, 2))


def test_a_hard_draw_is_one_hot_and_has_the_gradient_of_the_soft_one() -> None:
    weights = torch.tensor([1.0, -2.0, 5.0])
    gradients, draws = [], []
    for hard in (0.0, 1.0):
        logits = logits_of(0.6, -0.4, 0.2)
        draws.append(sample(logits, 0.7, generator(5), hard)["ffn"])
        (draws[-1] @ weights).sum().backward()
        gradients.append(logits["ffn"].grad)
    soft, one_hot = draws
    assert sorted(one_hot.flatten().tolist()) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert one_hot.argmax() == soft.argmax() and soft.max() < 0.99
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().min() > 0


@pytest.mark.parametrize("probability", [0.0, 0.004, 0.3, 1.0])
def test_draws_are_hard_as_often_as_asked(probability: float) -> None:
    """All axes at once, so that a hard draw is a whole member."""
    logits, draws = {"ffn": torch.zeros(1, 2, 3), "hidden": torch.zeros(1, 1, 3)}, 2000
    source, hard = generator(1), 0
    for _ in range(draws):
        drawn = sample(logits, 1.0, source, probability)
        smallest = [values.max(-1).values.min().item() for values in drawn.values()]
        extreme = {value > 1 - 1e-6 for value in smallest}
        assert len(extreme) == 1
        hard += extreme.pop()
    sigma = math.sqrt(draws * probability * (1 - probability))
    assert abs(hard - draws * probability) <= 4 * sigma


def test_at_a_low_temperature_draws_are_nearly_one_hot() -> None:
    logits = logits_of(0.5, 0.0, -0.5, decisions=2000)
    warm, cold = (
        sample(logits, temperature, generator())["ffn"].max(-1).values
        for temperature in (1.0, 0.05)
    )
    assert cold.mean() > 0.97 and (cold > 0.99).float().mean() > 0.85
    assert warm.mean() < 0.8


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_the_largest_share_falls_as_often_as_the_softmax_says(temperature: float) -> None:
    """Gumbel-max: the argmax has the distribution softmax(logits), at any temperature."""
    logits, draws = logits_of(0.6, 0.0, -0.4, -1.0, decisions=40_000), 40_000
    drawn = sample(logits, temperature, generator(2))["ffn"]
    frequencies = torch.bincount(drawn.argmax(-1).flatten(), minlength=4) / draws
    expected = torch.softmax(logits["ffn"][0, 0], -1)
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert ((frequencies - expected).abs() <= 4 * sigma).all()


# Expected parameters


@given(st.data())
def test_expected_parameters_of_a_choice_are_its_exact_count(data: st.DataObject) -> None:
    """Any parent, any space, heterogeneous axes and dropped layers included."""
    shape = data.draw(shapes())
    space = data.draw(spaces(shape))
    selection = data.draw(selections(space))
    drop_order = data.draw(st.permutations(range(len(shape.pattern))))[: space.max_dropped]
    member = space.architecture(selection, tuple(drop_order))
    expected = expected_cost(space, drop_order, one_hots(space, selection))
    assert expected.flatten().tolist() == [parameters(shape, member)]


def test_expected_parameters_of_a_batch_are_those_of_each() -> None:
    one, two = (
        one_hots(SPACE, {"hidden": (i,), "ffn": (i, 0), "mamba_heads": (i,), "depth": (i,)})
        for i in (0, 1)
    )
    both = {axis: torch.cat([one[axis], two[axis]]) for axis in one}
    expected = [expected_cost(SPACE, DROP, part).item() for part in (one, two)]
    assert expected_cost(SPACE, DROP, both).tolist() == expected


MEASURES = [
    PARAMS,
    Measure("active_params"),
    Measure("weight_bytes", "float32"),
    Measure("cache_bytes", context=40, batch=3),
    Measure("flops", context=40),
]


@pytest.mark.parametrize("seed", range(3))
def test_expected_costs_are_expectations_over_all_members(seed: int) -> None:
    source = generator(seed)
    distributions = {
        axis: torch.softmax(
            2 * torch.randn(
                1, SPACE.decisions(axis), len(SPACE.choices[axis]), generator=source
            ).double(), -1,
        )
        for axis in SPACE.elastic_axes
    }  # fmt: skip
    decisions = [(axis, i) for axis in SPACE.elastic_axes for i in range(SPACE.decisions(axis))]
    totals, mass = [0.0] * len(MEASURES), 0.0
    ranges = [range(len(SPACE.choices[axis])) for axis, _ in decisions]
    for taken in itertools.product(*ranges):
        probability = math.prod(
            distributions[axis][0, i, index].item()
            for (axis, i), index in zip(decisions, taken, strict=True)
        )
        selection: Selection = {axis: () for axis in SPACE.elastic_axes}
        for (axis, _), index in zip(decisions, taken, strict=True):
            selection[axis] += (index,)
        selection |= {axis: (0,) for axis in SPACE.choices if axis not in selection}
        member = SPACE.architecture(selection, DROP)
        for position, measure in enumerate(MEASURES):
            totals[position] += probability * measure.exact(SHAPE, member)
        mass += probability
    assert mass == pytest.approx(1)
    for measure, total in zip(MEASURES, totals, strict=True):
        expected = expected_cost(SPACE, DROP, distributions, measure).item()
        assert expected == pytest.approx(total, rel=1e-12), measure


def test_nothing_elastic_costs_the_parent() -> None:
    assert expected_cost(space_of(), (), {}).item() == FULL


# Entropy


def test_entropy_is_1_undecided_and_0_decided() -> None:
    even = {"ffn": torch.full((1, 2, 4), 0.25), "hidden": torch.full((1, 1, 3), 1 / 3)}
    decided = {"ffn": torch.eye(4)[None, :2], "hidden": torch.eye(3)[None, :1]}
    assert entropy(even).item() == pytest.approx(1)
    assert entropy(decided).item() == pytest.approx(0, abs=1e-6)
    assert entropy({}).item() == 0


def test_entropy_counts_every_decision_alike() -> None:
    """Three decisions, one of them undecided: not a mean of axes' means."""
    mixed = {"ffn": torch.eye(4)[None, :2], "hidden": torch.full((1, 1, 3), 1 / 3)}
    assert entropy(mixed).item() == pytest.approx(1 / 3)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_entropy_is_between_0_and_1(logits: list[float]) -> None:
    value = entropy({"ffn": torch.softmax(torch.tensor(logits), -1)[None, None]}).item()
    assert -1e-6 <= value <= 1 + 1e-6
