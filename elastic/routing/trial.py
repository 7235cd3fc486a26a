"""Candidates compared again while they train as themselves: half of them leave in every round.

A member that is best as it is cut need not be best once it is trained. So after the first
comparison the better half trains on, sliced, each draw as one of them; after every round they are
compared again and half of the rest leaves (successive halving, arXiv 1502.07943). All of a budget
share its norm weights and, as always, the parent's.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.config import ParentShape
from elastic.members.architecture import Architecture
from elastic.members.cost import parameters
from elastic.members.search import Choice
from elastic.routing.decide import Candidate, least_loss, sums_through


@dataclass
class Entrant:
    """A candidate of a budget."""

    choice: Choice
    kl: float
    """When it was compared last, in nats per token."""
    tokens: int = 0
    """Trained as itself."""
    alive: bool = True

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.choice.architecture, self.kl, self.tokens)


class Trial:
    """The candidates of all budgets, largest first.

    Args:
        candidates: of every budget; one alone where there is no choice.
        losses: how they compare as they are cut.
        nested: only members of nested families among those that are left stay.
        rounds: comparisons to come; 0 decides now.
    """

    def __init__(
        self,
        candidates: Mapping[str, Sequence[Choice]],
        losses: Mapping[str, Sequence[float]],
        nested: bool,
        rounds: int,
    ) -> None:
        self.entrants = {
            name: [Entrant(c, kl) for c, kl in zip(choices, losses[name], strict=True)]
            for name, choices in candidates.items()
        }
        self.nested, self.rounds_left = nested, rounds
        if rounds > 0:
            self._halve()

    @property
    def alive(self) -> dict[str, list[Choice]]:
        """Candidates that are left."""
        return {name: [e.choice for e in self._left(name)] for name in self.entrants}

    def draw(self, budget: str, seed: int, tokens: int) -> Choice:
        """The candidate that trains next on so many tokens; a function of the seed."""
        left = self._left(budget)
        entrant = left[random.Random(seed).randrange(len(left))]
        entrant.tokens += tokens
        return entrant.choice

    def compared(self, losses: Mapping[str, Sequence[float]]) -> None:
        """End a round with the losses of those that are left, in the order of `alive`."""
        for name, values in losses.items():
            for entrant, kl in zip(self._left(name), values, strict=True):
                entrant.kl = kl
        self.rounds_left -= 1
        self._halve()

    @property
    def decided(self) -> bool:
        """Whether nothing is left to compare, or no round is."""
        return self.rounds_left == 0 or all(len(self._left(name)) == 1 for name in self.entrants)

    def best(self) -> dict[str, Choice]:
        """The family with the least sum of losses of those that are left."""
        alive = self.alive
        picked = least_loss(alive, self._losses(), self.nested)
        return {name: alive[name][index] for name, index in picked.items()}

    def _left(self, budget: str) -> list[Entrant]:
        return [entrant for entrant in self.entrants[budget] if entrant.alive]

    def _losses(self) -> dict[str, list[float]]:
        return {name: [entrant.kl for entrant in self._left(name)] for name in self.entrants}

    def _halve(self) -> None:
        """Keep the better half of every budget's, by the best family that each belongs to; and none
        that is in no nested family with the others."""
        through = sums_through(self.alive, self._losses(), self.nested)
        for name, sums in through.items():
            left = self._left(name)
            order = sorted(range(len(left)), key=lambda i: (sums[i], i))
            for i in order[(len(left) + 1) // 2 :]:
                left[i].alive = False
        for name, sums in sums_through(self.alive, self._losses(), self.nested).items():
            for entrant, total in zip(self._left(name), sums, strict=True):
                entrant.alive = math.isfinite(total)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        return {
            "rounds_left": self.rounds_left,
            "entrants": {
                name: [entrant.candidate.to_json() | {"alive": entrant.alive} for entrant in each]
                for name, each in self.entrants.items()
            },
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], nested: bool, shape: ParentShape) -> "Trial":
        """Inverse of `state`."""
        trial = cls.__new__(cls)
        trial.nested, trial.rounds_left = nested, state["rounds_left"]
        trial.entrants = {}
        for name, each in state["entrants"].items():
            trial.entrants[name] = []
            for value in each:
                member = Architecture.from_json(value["architecture"])
                choice = Choice({}, member, parameters(shape, member))
                entrant = Entrant(choice, value["kl"], value["tokens"], value["alive"])
                trial.entrants[name].append(entrant)
        return trial
