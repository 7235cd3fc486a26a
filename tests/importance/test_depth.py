"""Depth: shared prefixes, sums and trials against a greedy twin that shares nothing."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.documents import rows_of
from helpers.strategies import random_parent, random_tokens, tiny_shape
from torch import Tensor

from elastic.config import ConfigError, ImportanceConfig
from elastic.importance import depth
from elastic.importance.depth import rank_layers
from elastic.members.architecture import Architecture
from elastic.parent import HybridParent

DEEP = tiny_shape(pattern="M-M-*M-M-", hidden_size=16)


def settings(**fields: object) -> ImportanceConfig:
    """Small, and all of the calibration text."""
    defaults: dict[str, object] = {"batch_size": 2, "depth_samples": 100}
    return ImportanceConfig(**(defaults | fields))  # type: ignore[arg-type]


@torch.no_grad()
def greedy(
    parent: HybridParent, tokens: Tensor, count: int, candidates: list[int], positions: Tensor
) -> tuple[list[int], list[dict[int, float]]]:
    """The plain twin: whole logits first, then the positions; one sequence at a time."""
    full = Architecture.full(parent.shape)

    def logits(dropped: set[int]) -> Tensor:
        rows = [
            parent.logits(row[None], full.without(dropped))[0, places]
            for row, places in zip(tokens, positions, strict=True)
        ]
        return torch.stack(rows).double()

    reference, order, rounds = logits(set()), list[int](), []
    for _ in range(count):
        errors = {}
        for layer in sorted(set(candidates) - set(order)):
            change = (logits({*order, layer}) - reference).square().sum()
            errors[layer] = float(change / reference.square().sum())
        order.append(min(errors, key=lambda layer: errors[layer]))
        rounds.append(errors)
    return order, rounds


def everywhere(tokens: Tensor) -> Tensor:
    """All positions of all sequences."""
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_rounds_near(rounds: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert [trial.keys() for trial in rounds] == [trial.keys() for trial in expected]
    for trial, plain in zip(rounds, expected, strict=True):
        assert trial == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_iterative_ranking_is_the_greedy_one(seed: int, batch_size: int) -> None:
    parent, tokens = random_parent(DEEP, seed), random_tokens(DEEP, batch=3, seed=seed)
    config = settings(batch_size=batch_size)
    order, rounds = rank_layers(parent, rows_of(tokens), config, 5, generator())
    expected = greedy(parent, tokens, 5, [1, 2, 3, 5, 6, 7], everywhere(tokens))
    assert order == expected[0]
    assert_rounds_near(rounds, expected[1])


def test_logits_are_compared_at_the_same_random_positions_in_every_trial() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP, batch=3)
    order, rounds = rank_layers(
        parent, rows_of(tokens), settings(depth_positions=4), 3, generator(7)
    )
    again = generator(7)
    positions = torch.stack([torch.randperm(9, generator=again)[:4] for _ in tokens])
    expected = greedy(parent, tokens, 3, [1, 2, 3, 5, 6, 7], positions)
    assert order == expected[0]
    assert_rounds_near(rounds, expected[1])


def test_one_pass_sorts_the_errors_of_the_first_round() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    order, rounds = rank_layers(
        parent, rows_of(tokens), settings(depth_method="one_pass"), 4, generator()
    )
    iterative = rank_layers(parent, rows_of(tokens), settings(), 4, generator())
    assert rounds == iterative[1][:1]
    assert order == sorted(rounds[0], key=lambda layer: rounds[0][layer])[:4]


def test_ranking_again_after_every_drop_changes_the_order() -> None:
    """Guards the guard: with `one_pass` in place of `iterative` some parent gets another order."""
    tokens = random_tokens(DEEP)
    differ = 0
    for seed in range(6):
        parent = random_parent(DEEP, seed)
        one_pass, iterative = (
            rank_layers(parent, rows_of(tokens), settings(depth_method=method), 5, generator())[0]
            for method in ("one_pass", "iterative")
        )
        assert one_pass[0] == iterative[0]
        differ += one_pass != iterative
    assert differ > 0


def test_the_error_of_a_round_counts_all_layers_dropped_before() -> None:
    """Errors are against the original logits, so that they hardly ever shrink."""
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    order, rounds = rank_layers(parent, rows_of(tokens), settings(), 5, generator())
    last = {order[4]} | set(order[:4])
    full = Architecture.full(DEEP)
    with torch.no_grad():
        original = parent.logits(tokens).double()
        reduced = parent.logits(tokens, full.without(last)).double()
    expected = (original - reduced).square().sum() / original.square().sum()
    assert rounds[4][order[4]] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("allowed", "candidates"),
    [
        ({}, {1, 2, 3, 5, 6, 7}),
        ({"drop_attention": True}, {1, 2, 3, 4, 5, 6, 7}),
        ({"drop_ends": True}, {0, 1, 2, 3, 5, 6, 7, 8}),
        ({"drop_attention": True, "drop_ends": True}, set(range(9))),
    ],
)
def test_attention_and_both_ends_are_protected_unless_asked(
    allowed: dict[str, bool], candidates: set[int]
) -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    _, rounds = rank_layers(parent, rows_of(tokens), settings(**allowed), 1, generator())
    assert set(rounds[0]) == candidates


def test_too_few_droppable_layers_are_an_error_that_says_what_to_set() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    rank_layers(parent, rows_of(tokens), settings(depth_method="one_pass"), 6, generator())
    with pytest.raises(ConfigError, match="drops up to 7 layers, but only 6 of M-M-") as error:
        rank_layers(parent, rows_of(tokens), settings(), 7, generator())
    assert "importance.drop_attention" in str(error.value)
    rank_layers(
        parent, rows_of(tokens), settings(drop_ends=True, depth_method="one_pass"), 7, generator()
    )


def test_nothing_to_drop_runs_no_trial() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    for method in ("iterative", "one_pass"):
        result = rank_layers(parent, rows_of(tokens), settings(depth_method=method), 0, generator())
        assert result == ([], [])


def test_the_ranking_is_a_function_of_the_generator_seed() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP)
    config = settings(depth_positions=2)
    first = rank_layers(parent, rows_of(tokens), config, 3, generator(1))
    torch.manual_seed(123)
    assert rank_layers(parent, rows_of(tokens), config, 3, generator(1)) == first
    assert rank_layers(parent, rows_of(tokens), config, 3, generator(2))[1] != first[1]


def test_depth_reads_only_its_own_number_of_samples() -> None:
    parent, tokens = random_parent(DEEP), random_tokens(DEEP, batch=4)
    few = rank_layers(parent, rows_of(tokens), settings(depth_samples=2), 2, generator())
    assert few == rank_layers(parent, rows_of(tokens[:2]), settings(), 2, generator())
    assert few != rank_layers(parent, rows_of(tokens), settings(), 2, generator())


def test_a_tied_parent_is_ranked_through_its_embedding() -> None:
    shape = dataclasses.replace(DEEP, tied_head=True)
    parent, tokens = random_parent(shape), random_tokens(shape)
    order, rounds = rank_layers(parent, rows_of(tokens), settings(), 3, generator())
    expected = greedy(parent, tokens, 3, [1, 2, 3, 5, 6, 7], everywhere(tokens))
    assert order == expected[0]
    assert_rounds_near(rounds, expected[1])


@pytest.mark.parametrize("lost", [None, 3], ids=["parent", "a trial"])
def test_errors_that_are_not_finite_are_no_ranking(
    lost: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer may be what keeps activations within range."""
    through, walk = depth.through, depth.walk

    def overflowing(*arguments: Any) -> Tensor:
        return through(*arguments) * torch.inf

    def overflowing_walk(*arguments: Any) -> Iterator[tuple[int, Tensor]]:
        for layer, x in walk(*arguments):
            yield layer, x * torch.inf if layer == lost else x

    if lost is None:
        monkeypatch.setattr(depth, "through", overflowing)
    else:
        monkeypatch.setattr(depth, "walk", overflowing_walk)
    parent = random_parent(DEEP)
    what = "logits" if lost is None else "logits without mlp layer 3"
    with pytest.raises(ValueError, match=f"importance: {what} are not finite"):
        rank_layers(parent, rows_of(random_tokens(DEEP)), settings(), 2, generator())


def test_ranking_changes_no_weight() -> None:
    parent = random_parent(DEEP)
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    rank_layers(parent, rows_of(random_tokens(DEEP)), settings(), 2, generator())
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight, before[name])
