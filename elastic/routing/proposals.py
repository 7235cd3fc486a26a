"""What a router says of members while it learns: soft masks to train, and who might be frozen."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.members.search import Choice
from elastic.parent import Keep
from elastic.routing.decide import Wish
from elastic.routing.router import Schedule


@dataclass(frozen=True)
class SoftDraw:
    """One draw of a router that learns."""

    keep: Keep
    terms: dict[str, Tensor]
    """What the router pays, by name; `total` among them where it pays anything."""
    figures: dict[str, Tensor | float]
    """Worth logging; without gradient."""


Proposed = tuple[dict[str, list[Choice]], dict[str, Wish]]
"""Candidates of every budget, and what the router itself preferred where there is a choice."""


class Proposals(ABC):
    """A router, read as members of budgets."""

    @abstractmethod
    def draw(self, budget: str, now: Schedule, generator: torch.Generator) -> SoftDraw:
        """Soft masks of a budget, a function of the router and of the generator's seed."""

    @abstractmethod
    def stepped(self, taken: bool) -> None:
        """After an optimizer step; not `taken` where it was left out."""

    @abstractmethod
    def family(self, scale: float) -> dict[str, Choice]:
        """The most probable family that meets all budgets, largest first."""

    @abstractmethod
    def candidates(self, scale: float, count: int) -> Proposed:
        """The most probable members of every budget, at most `count`, that of `family` first."""

    @abstractmethod
    def picks(self, scale: float, sure: float) -> tuple[list[tuple[str, int]], bool]:
        """The most probable choices, and whether each has a probability above `sure`."""
