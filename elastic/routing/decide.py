"""The decision at the freeze: the router proposes members, their distillation loss decides.

A router's probabilities come from noisy soft masks, and members of one size may differ in loss by a
factor of two. So the most probable members of each budget that meet its target are compared as
they would be cut, and the nested family with the least sum of losses is frozen. What the router
itself preferred is kept beside it.
"""

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
    """Trained as itself before: 0 while candidates are compared as they are cut."""

    def to_json(self) -> dict[str, Any]:
        """Its entry in elastic.json."""
        return {"architecture": self.architecture.to_json(), "kl": self.kl, "tokens": self.tokens}


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


def least_loss(
    candidates: Candidates, losses: Mapping[str, Sequence[float]], nested: bool
) -> dict[str, int]:
    """Position of the candidate of every budget: the family with the least sum of losses, nested
    where that is asked for.

    Budgets are largest first. One family at least must be legal.
    """
    names = list(candidates)

    def best(position: int, outer: Architecture | None) -> tuple[float, list[int]] | None:
        if position == len(names):
            return 0.0, []
        name, found = names[position], None
        for index, choice in enumerate(candidates[name]):
            if nested and outer is not None and not choice.architecture.is_within(outer):
                continue
            rest = best(position + 1, choice.architecture)
            if rest is not None:
                total = losses[name][index] + rest[0]
                if found is None or total < found[0]:
                    found = total, [index, *rest[1]]
        return found

    solution = best(0, None)
    assert solution is not None, "no nested family among the candidates"
    return dict(zip(names, solution[1], strict=True))
