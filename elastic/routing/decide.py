"""The decision at the freeze: the router proposes members, their distillation loss decides.

A router's probabilities come from noisy soft masks, and members of one size may differ in loss by a
factor of two. So the most probable members of each budget that meet its target are compared, as
they would be cut and in rounds while they train (`trial`), and the nested family with the least sum
of losses is frozen. What the router itself preferred is kept beside it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.members.architecture import Architecture
from elastic.members.search import Choice

Candidates = Mapping[str, Sequence[Choice]]
"""Members of every budget that are compared, the router's most probable first."""

Compare = Callable[[Candidates], Mapping[str, Sequence[float]]]
"""Mean distillation loss of every candidate, in nats per token; alike on every process."""


@dataclass(frozen=True)
class Candidate:
    """A member that was compared."""

    architecture: Architecture
    kl: float
    """To the teacher, in nats per token."""
    tokens: int
    """Trained as itself before it was compared last."""

    def to_json(self) -> dict[str, Any]:
        """Its entry in elastic.json."""
        return {"architecture": self.architecture.to_json(), "kl": self.kl, "tokens": self.tokens}


@dataclass(frozen=True)
class Wish:
    """What the router itself preferred for a budget when it learnt last."""

    architecture: Architecture
    """The most probable choice on every axis, whatever its size."""
    params: int
    log_probabilities: dict[Architecture, float]
    """Of every candidate."""

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        scores = [[member.to_json(), value] for member, value in self.log_probabilities.items()]
        return {"choice": self.architecture.to_json(), "params": self.params, "scores": scores}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Wish":
        """Inverse of `to_json`."""
        scores = {Architecture.from_json(member): score for member, score in value["scores"]}
        return cls(Architecture.from_json(value["choice"]), value["params"], scores)


@dataclass(frozen=True)
class Decision:
    """How the member of a budget was chosen."""

    router_choice: Architecture
    """The most probable choice on every axis, whatever its size."""
    router_params: int
    log_probability: float
    """Of the frozen member under the router."""
    candidates: list[Candidate]
    """Empty where nothing was compared."""

    def to_json(self) -> dict[str, Any]:
        """The `decision` entry of elastic.json."""
        return {
            "router_choice": self.router_choice.to_json(),
            "router_params": self.router_params,
            "log_probability": self.log_probability,
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Decision":
        """Inverse of `to_json`."""
        return cls(
            Architecture.from_json(value["router_choice"]),
            value["router_params"],
            value["log_probability"],
            [
                Candidate(Architecture.from_json(x["architecture"]), x["kl"], x["tokens"])
                for x in value["candidates"]
            ],
        )


Losses = Mapping[str, Sequence[float]]
"""Of the candidates of every budget, in their order."""


def sums_through(candidates: Candidates, losses: Losses, nested: bool) -> dict[str, list[float]]:
    """The least sum of losses of a family that has each candidate; infinite where none is nested.

    Budgets are largest first. Neighbours decide over nesting, so that two passes over them do.
    """
    names = list(candidates)
    upwards = _sums(candidates, losses, nested, names)
    downwards = _sums(candidates, losses, nested, names[::-1])
    return {
        name: [
            up + down - loss if math.isfinite(up + down) else math.inf
            for up, down, loss in zip(upwards[name], downwards[name], losses[name], strict=True)
        ]
        for name in names
    }


def least_loss(candidates: Candidates, losses: Losses, nested: bool) -> dict[str, int]:
    """Position of the candidate of every budget: the family with the least sum of losses, nested
    where that is asked for.

    Budgets are largest first. One family at least must be legal.
    """
    names = list(candidates)
    below = _sums(candidates, losses, nested, names[::-1])
    picked: dict[str, int] = {}
    outer: Choice | None = None
    for name in names:
        legal = [
            (total, index)
            for index, total in enumerate(below[name])
            if math.isfinite(total) and _fits(candidates[name][index], outer, nested)
        ]
        assert legal, "no nested family among the candidates"
        picked[name] = min(legal)[1]
        outer = candidates[name][picked[name]]
    return picked


def _sums(
    candidates: Candidates, losses: Losses, nested: bool, order: Sequence[str]
) -> dict[str, list[float]]:
    """The least sum of losses over the budgets up to each one, in an order from one end."""
    found: dict[str, list[float]] = {}
    downwards = list(order) == list(candidates)
    before: list[tuple[Choice, float]] = []
    for name in order:
        found[name] = []
        for choice, loss in zip(candidates[name], losses[name], strict=True):
            sums = [] if before else [0.0]
            for other, total in before:
                inner, outer = (choice, other) if downwards else (other, choice)
                if _fits(inner, outer, nested):
                    sums.append(total)
            found[name].append(loss + min(sums, default=math.inf))
        before = list(zip(candidates[name], found[name], strict=True))
    return found


def _fits(inner: Choice, outer: Choice | None, nested: bool) -> bool:
    return not nested or outer is None or inner.architecture.is_within(outer.architecture)
