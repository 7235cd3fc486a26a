"""Members in training: soft masks until the freeze, exact architectures from then on."""

import io
import itertools
from typing import Any

import pytest
import torch
from helpers.goals import in_params
from helpers.routers import members
from helpers.strategies import tiny_shape

from elastic.config import ConfigError, ObjectiveConfig, RouterConfig, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.search import Unreachable
from elastic.parent import Keep
from elastic.routing.family import Draw, Family
from elastic.routing.masks import hard_keep
from elastic.routing.router import Router

SHAPE = tiny_shape(pattern="M-*M-", hidden_size=16, intermediate_size=32)
WHOLE = Architecture.full(SHAPE)
FULL = parameters(SHAPE, WHOLE)
COUNTS = {"full": FULL, "medium": round(0.75 * FULL), "small": round(0.5 * FULL)}
TARGETS = in_params(SHAPE, COUNTS)
LEARNED = ["medium", "small"]
"""Budgets that the router chooses for; the full one is the whole parent."""
CHOICES: dict[str, list[int]] = {
    "hidden": [16, 15, 14, 13, 12, 11, 10, 9, 8],
    "ffn": [32, 28, 24, 20, 16],
    "mamba_heads": [6, 4, 2],
    "depth": [5, 4],
}


def family_of(seed: int = 0, layered: tuple[str, ...] = (), **fields: Any) -> Family:
    """A family as a rank builds it, from seeds and settings alone."""
    nested = fields.pop("nested", True)
    tolerance, goals = fields.pop("tolerance", 0.02), fields.pop("goals", 1)
    targets = fields.pop("targets", TARGETS)
    space_config = SpaceConfig(
        heterogeneous=list(layered), nested=nested, tolerance=tolerance, **CHOICES
    )
    space = Space.build(space_config, SHAPE)
    config = RouterConfig(**({"freeze_at": 0.5} | fields))
    router = Router(space, len(LEARNED), config, torch.Generator().manual_seed(seed), goals)
    return Family(space, (1,), targets, router, config, space_config, ObjectiveConfig())


def unsettle(family: Family, seed: int, size: float = 3.0) -> Family:
    """Move the router somewhere random, as if it had learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in family.router.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * size / weight[0].numel())
    return family


def masks(draw: Draw) -> list[torch.Tensor]:
    """All masks of a soft draw, in order."""
    assert isinstance(draw.member, Keep) and draw.member.hidden is not None
    found = [draw.member.hidden]
    for layer in draw.member.layers:
        found += [m for m in (layer.gate, layer.width, layer.channels) if m is not None]
    return found


# Before the freeze


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.49, 0.9])
def test_the_full_budget_is_the_whole_parent_from_the_first_step(progress: float) -> None:
    """No mask, no draw and nothing to pay, whatever the router thinks: it learns as itself."""
    family = unsettle(family_of(), 3)
    draw = family.draw("full", progress, seed=1)
    assert draw.member is None and draw.terms == {} and draw.figures == {}


@pytest.mark.parametrize("budget", LEARNED)
def test_a_draw_is_float32_whatever_the_precision_around_it(budget: str) -> None:
    """Under autocast products would be bfloat16, and counts of parameters off by 0.4%."""
    family = unsettle(family_of(hard_probability=0.0), seed=3)
    exact = family.draw(budget, 0.1, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        half = family.draw(budget, 0.1, seed=1)
    assert half.figures == exact.figures
    for ours, theirs in zip(masks(half), masks(exact), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("budget", LEARNED)
def test_before_the_freeze_a_draw_is_soft_and_pays(budget: str) -> None:
    family = family_of(hard_probability=0.0, full_bias=0.0)
    draw = family.draw(budget, 0.1, seed=1)
    assert any(((mask > 0.001) & (mask < 0.999)).any() for mask in masks(draw))
    assert set(draw.terms) == {"budget", "total"}
    draw.terms["total"].backward()
    for index, name in enumerate(LEARNED):
        gradients = [weight.grad for weight in family.router.budgets[index].parameters()]
        assert all((g is not None and g.abs().sum() > 0) == (name == budget) for g in gradients)


def test_what_is_logged_has_no_gradient_and_follows_the_schedule_to_the_freeze() -> None:
    """Temperature and scale end at `freeze_at`, not at the end of the run."""
    family = family_of(freeze_at=0.4)
    for progress, temperature, scale in ((0.0, 1.0, 1.0), (0.2, 0.05**0.5, 5.5), (0.4, 0.05, 10.0)):
        figures = family.draw("small", progress, seed=1).figures
        assert figures["temperature"] == pytest.approx(temperature)
        assert figures["scale"] == pytest.approx(scale)
        for name in ("entropy", "expected_params"):
            assert isinstance(figures[name], torch.Tensor) and not figures[name].requires_grad
        assert 0 <= figures["entropy"] <= 1


def test_a_hard_draw_is_exactly_one_member() -> None:
    family = family_of(hard_probability=1.0)
    found = set()
    for seed in range(20):
        draw = family.draw("small", 0.0, seed)
        for mask in masks(draw):
            assert ((mask < 1e-6) | (mask > 1 - 1e-6)).all()
        found.add(tuple(mask.round().sum().item() for mask in masks(draw)))
    assert len(found) > 1


# Law 8


@pytest.mark.parametrize("budget", LEARNED)
@pytest.mark.parametrize("hard_probability", [0.0, 0.5])
def test_two_ranks_draw_the_same_masks(budget: str, hard_probability: float) -> None:
    """Whatever else each has done: other draws before, another global generator."""
    one, two = (family_of(hard_probability=hard_probability) for _ in range(2))
    torch.manual_seed(1)
    first = one.draw(budget, 0.2, seed=5)
    torch.manual_seed(2)
    for seed in range(3):
        two.draw("medium", 0.1, seed)
    second = two.draw(budget, 0.2, seed=5)
    for mask, other in zip(masks(first), masks(second), strict=True):
        assert torch.equal(mask, other)
    for name, term in first.terms.items():
        assert torch.equal(term, second.terms[name])


def test_another_seed_draws_other_masks() -> None:
    family = family_of()
    one, two = (masks(family.draw("small", 0.2, seed)) for seed in (5, 6))
    assert not any(torch.equal(a, b) for a, b in zip(one, two, strict=True) if (a != 1).any())


def test_a_draw_leaves_the_global_generator_alone() -> None:
    family = family_of()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    family.draw("small", 0.2, seed=5)
    assert torch.equal(torch.rand(4), expected)


# Choices


@pytest.mark.parametrize("seed", range(5))
def test_choices_are_nested_and_within_tolerance(seed: int) -> None:
    family = unsettle(family_of(seed), seed)
    choices = family.choices(0.3)
    assert list(choices) == family.names == list(TARGETS)
    for name, choice in choices.items():
        assert abs(choice.params - COUNTS[name]) <= 0.02 * COUNTS[name]
        assert choice.params == parameters(SHAPE, choice.architecture)
        choice.architecture.check(SHAPE)
    assert choices["full"].architecture == WHOLE
    for outer, inner in itertools.pairwise(choices.values()):
        assert inner.architecture.is_within(outer.architecture)


def test_choices_follow_what_the_router_has_learned() -> None:
    found = {unsettle(family_of(), seed).choices(0.3)["small"].architecture for seed in range(5)}
    assert len(found) > 1


def test_without_nesting_each_budget_gets_its_own_best() -> None:
    """Some router wants budgets that do not fit into each other."""
    crossed = 0
    for seed in range(10):
        choices = unsettle(family_of(nested=False), seed, size=30.0).choices(0.3)
        crossed += not choices["small"].architecture.is_within(choices["medium"].architecture)
        for name, choice in choices.items():
            assert abs(choice.params - COUNTS[name]) <= 0.02 * COUNTS[name]
    assert crossed > 0


def test_an_unreachable_target_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="budgets.medium: no combination of space is within"):
        family_of(tolerance=1e-6)


# The freeze


def test_the_freeze_comes_at_its_time_and_once() -> None:
    family = family_of(freeze_at=0.5)
    for progress in (0.0, 0.1, 0.3, 0.49, 0.4999):
        assert not family.freeze_if_due(progress)
        assert family.frozen is None
        assert isinstance(family.draw("small", progress, 0).member, Keep)
    assert family.freeze_if_due(0.5)
    assert family.frozen is not None
    assert not family.freeze_if_due(0.6), "only just now counts"


def test_a_run_that_steps_over_the_moment_freezes_too() -> None:
    family = family_of(freeze_at=0.5)
    assert not family.freeze_if_due(0.45)
    assert family.freeze_if_due(0.7)


def test_after_the_freeze_steps_run_sliced_and_the_router_rests() -> None:
    family = unsettle(family_of(), 0)
    expected = family.choices(0.5)
    family.freeze_if_due(0.5)
    assert family.frozen == expected == family.choices(0.9)
    for name in TARGETS:
        draw = family.draw(name, 0.6, seed=0)
        if name == "full":
            assert draw.member is None, "the whole parent runs plainly"
        else:
            assert draw.member == expected[name].architecture
        assert draw.terms == {} and draw.figures == {}
    assert not any(weight.requires_grad for weight in family.router.parameters())


def test_the_router_no_longer_matters_once_frozen() -> None:
    family = family_of()
    family.freeze_if_due(0.5)
    before = {name: family.draw(name, 0.6, 0).member for name in TARGETS}
    unsettle(family, 1, size=100.0)
    assert {name: family.draw(name, 0.9, 7).member for name in TARGETS} == before


def test_hard_masks_of_a_frozen_member_are_masks_over_this_parent() -> None:
    family = family_of()
    family.freeze_if_due(1.0)
    member = family.draw("small", 1.0, 0).member
    assert isinstance(member, Architecture)
    keep = hard_keep(SHAPE, member)
    assert keep.hidden is not None and keep.hidden.sum() == member.hidden_size


# Settling


def calls_to_freeze(family: Family, most: int = 20) -> int | None:
    """How many looks at an unchanging router it takes, all long before the schedule's end."""
    for call in range(1, most + 1):
        if family.freeze_if_due(0.01):
            return call
    return None


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_settled_choices_freeze_early(steps: int) -> None:
    """The first look has nothing to compare with."""
    family = family_of(settled_steps=steps, full_bias=10.0)
    assert calls_to_freeze(family) == steps + 1
    assert not any(weight.requires_grad for weight in family.router.parameters())


def test_choices_never_settle_by_default() -> None:
    assert RouterConfig().settled_steps == 0
    assert calls_to_freeze(family_of(full_bias=10.0)) is None


def test_choices_that_are_not_sure_do_not_settle() -> None:
    """The same argmax all the time, but with a probability under 0.9."""
    assert calls_to_freeze(family_of(settled_steps=2, full_bias=2.0)) is None


def test_a_change_of_mind_starts_the_count_again() -> None:
    family = family_of(settled_steps=3, full_bias=10.0)
    assert not any(family.freeze_if_due(0.01) for _ in range(3))
    with torch.no_grad():
        family.router.budgets[0]["ffn"][2].bias[1] = 30.0
    assert not any(family.freeze_if_due(0.01) for _ in range(3))
    assert family.freeze_if_due(0.01)


@pytest.mark.parametrize("settled", [0, 2])
def test_rates_are_held_until_the_choices_are_final(settled: int) -> None:
    family = family_of(settled_steps=settled, full_bias=10.0, freeze_at=0.1)
    assert family.held_until == 1.0
    moments = [step / 100 for step in range(50)]
    for progress in moments:
        family.freeze_if_due(progress)
    assert family.held_until == (0.02 if settled else 0.1)
    resumed = family_of()
    resumed.load_state(stored(family.state()))
    assert resumed.held_until == family.held_until


# Checkpoints


def stored(state: dict) -> dict:
    """Through a file, as a resumed run reads it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("layered", [(), ("ffn", "mamba_heads")], ids=["once", "layered"])
def test_frozen_choices_survive_a_checkpoint(layered: tuple[str, ...]) -> None:
    """Even where the router alone would choose something else by now."""
    family = unsettle(family_of(layered=layered), 1)
    family.freeze_if_due(0.5)
    resumed = family_of(seed=9, layered=layered)
    resumed.load_state(stored(family.state()))
    assert members(resumed) == members(family)
    assert not any(weight.requires_grad for weight in resumed.router.parameters())
    assert not resumed.freeze_if_due(0.9)
    for name in TARGETS:
        assert resumed.draw(name, 0.9, 0).member == family.draw(name, 0.9, 0).member


def test_a_family_that_is_not_frozen_resumes_soft() -> None:
    family, resumed = family_of(), family_of()
    resumed.load_state(stored(family.state()))
    assert resumed.frozen is None
    assert all(weight.requires_grad for weight in resumed.router.parameters())
    one, two = (masks(each.draw("small", 0.2, 5)) for each in (family, resumed))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_the_count_of_settled_steps_survives_a_checkpoint(interrupted: int) -> None:
    """Law 7: a resumed run freezes at the step at which it would have."""
    family = family_of(settled_steps=3, full_bias=10.0)
    for _ in range(interrupted):
        assert not family.freeze_if_due(0.01)
    resumed = family_of(settled_steps=3, full_bias=10.0)
    resumed.load_state(stored(family.state()))
    assert calls_to_freeze(resumed) == 4 - interrupted


def test_a_family_is_printed_once_per_change() -> None:
    family = family_of()
    early, late = family.choices(0.0), unsettle(family, 3).choices(0.4)
    assert early != late
    first = family.news(early)
    assert "budget" in first and first.count("\n") >= len(TARGETS)
    assert family.news(early) == "the family is unchanged"
    assert family.news(late) not in (first, "the family is unchanged")
    assert family.news(early) == first


def test_a_search_that_fails_half_way_falls_back_to_a_legal_family(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The freeze must not end a run of days: targets were met at the start, so they are met now."""
    family = family_of()

    def fail(*args: object) -> None:
        raise Unreachable("small", TARGETS["small"], [(2,)], 0.01, True)

    monkeypatch.setattr(family.search, "family", fail)
    assert family.freeze_if_due(1.0)
    assert "small" in caplog.text
    assert_legal(family.choices(1.0))


def assert_legal(choices: dict) -> None:
    """Nested, and each within tolerance of its target."""
    for outer, inner in itertools.pairwise(choices.values()):
        assert inner.architecture.is_within(outer.architecture)
    for name, choice in choices.items():
        assert abs(choice.params / COUNTS[name] - 1) <= 0.02
