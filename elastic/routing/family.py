"""The members in training: soft masks while the router learns, fixed architectures afterwards."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.config import ConfigError, ObjectiveConfig, RouterConfig, SpaceConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.goals import Target
from elastic.members.search import Choice, Search
from elastic.members.targets import smaller_budgets
from elastic.parent import Member
from elastic.routing.axes import AxisProposals
from elastic.routing.decide import Compare, Decision, Wish
from elastic.routing.nested import FamilyProposals, FamilyRouter
from elastic.routing.proposals import Proposals
from elastic.routing.router import Router, schedule
from elastic.routing.table import account, describe
from elastic.routing.trial import Entrant, Trial

log = logging.getLogger(__name__)

SETTLED = 0.9
"""Least probability of every choice that counts as settled."""


@dataclass(frozen=True)
class Draw:
    """How one forward pass runs, and what the router pays for it."""

    member: Member
    terms: dict[str, Tensor]
    """Router losses by name, `total` among them; empty once frozen."""
    figures: dict[str, Tensor | float]
    """Worth logging: temperature, scale, entropy, expected size."""


class Family:
    """Budgets, their targets and, from the freeze on, their architectures.

    Everything drawn is a function of the seeds it is given, so that all ranks hold the same family
    without talking, and a resumed run the same as an uninterrupted one.
    """

    def __init__(
        self,
        space: Space,
        drop_order: tuple[int, ...],
        targets: Mapping[str, Target],
        router: Router | FamilyRouter,
        config: RouterConfig,
        space_config: SpaceConfig,
        objective: ObjectiveConfig,
        given: Mapping[str, Architecture] | None = None,
    ) -> None:
        self.space, self.drop_order, self.targets = space, drop_order, dict(targets)
        self.router, self.config = router, config
        self.nested = space_config.nested
        self.search = Search(space, drop_order, space_config.tolerance)
        smaller = smaller_budgets(self.targets)
        self.smaller = {name: position for position, name in enumerate(smaller)}
        """Budgets that have a choice, and norm weights of their own, by their position among these:
        in the router, and in those weights."""
        self.frozen: dict[str, Choice] | None = None
        self.trial: Trial | None = None
        """Candidates that train, between the router's last step and the decision."""
        self._round_ends = 0.0
        self._wishes: dict[str, Wish] = {}
        self.decisions: dict[str, Decision] = {}
        """How the frozen members were chosen, by budget; the whole parent is not."""
        self.held_until = 1.0
        """Share of the elastic tokens after which rates fall: where the router learnt last."""
        self._last_picks: list[tuple[str, int]] = []
        self._settled = 0
        self._printed = ""
        self.given = bool(given)
        """Whether settings gave the members, from the first step on."""
        if given:
            self.frozen, self.held_until = self._family(given), 0.0
            log.info("members are given; %s", self.news(self.frozen))
            return
        self.proposals: Proposals
        if isinstance(router, FamilyRouter):
            self.proposals = FamilyProposals(router, self.search, smaller, config)
        else:
            self.proposals = AxisProposals(
                router, self.search, targets, self.smaller, self.nested, config, objective
            )

    @property
    def names(self) -> list[str]:
        """Budgets, largest first."""
        return list(self.targets)

    def draw(self, budget: str, progress: float, seed: int, tokens: int = 0) -> Draw:
        """The member of `budget` for one forward pass over so many tokens; `progress` 0..1 is over
        all elastic tokens."""
        if self.frozen is not None:
            return Draw(self.member(self.frozen[budget]), {}, {})
        if budget not in self.smaller:
            return Draw(None, {}, {})  # nothing to choose, and no mask teaches it anything else
        if self.trial is not None:
            return Draw(self.member(self.trial.draw(budget, seed, tokens)), {}, {})
        now = schedule(self.config, progress / self.config.freeze_at)
        drawn = self.proposals.draw(budget, now, torch.Generator().manual_seed(seed))
        figures = {"temperature": now.temperature, "scale": now.scale, **drawn.figures}
        return Draw(drawn.keep, drawn.terms, figures)

    def stepped(self, taken: bool) -> None:
        """After an optimizer step; not `taken` where it was left out."""
        if self.soft:
            self.proposals.stepped(taken)

    def member(self, choice: Choice) -> Member:
        """How to run a choice: None when it is the whole parent."""
        whole = Architecture.full(self.space.shape)
        return None if choice.architecture == whole else choice.architecture

    def _scale(self, progress: float) -> float:
        return schedule(self.config, progress / self.config.freeze_at).scale

    def choices(self, progress: float) -> dict[str, Choice]:
        """The family as it would be cut now."""
        if self.frozen is not None:
            return self.frozen
        if self.trial is not None:
            return self.trial.best()
        return self.proposals.family(self._scale(progress))

    def news(self, choices: Mapping[str, Choice]) -> str:
        """The table of a family, or that it is still the one that was printed last."""
        table = describe(self.targets, choices)
        if table == self._printed:
            return "the family is unchanged"
        self._printed = table
        return f"the family is\n{table}"

    @property
    def soft(self) -> bool:
        """Whether members are masks that the router draws."""
        return self.frozen is None and self.trial is None

    def freeze_if_due(self, progress: float, compare: Compare | None = None) -> bool:
        """Fix the choices when it is time, or when they have settled; True if just now.

        `compare` measures candidates; without it, or with one candidate, the router's most probable
        family is taken unmeasured. Where rounds are to follow, the better candidates train first.
        """
        if self.frozen is not None:
            return False
        if self.trial is None:
            if progress < self.config.freeze_at and not self._has_settled(progress):
                return False
            self._begin(progress, compare)
            if self.trial is None:
                return True
        elif progress < self._round_ends or compare is None:
            return False
        else:
            self.trial.compared(compare(self.trial.alive))
            self._round_ends = progress + self.config.round_share
        if not self.trial.decided:
            left = {name: len(choices) for name, choices in self.trial.alive.items()}
            log.info("candidates that train on: %s", _counts(left))
            return False
        self._decide(self.trial.best(), self.trial.entrants)
        return True

    def _begin(self, progress: float, compare: Compare | None) -> None:
        """The router learns no more; its most probable members become candidates."""
        candidates, self._wishes = self.proposals.candidates(
            self._scale(progress), self.config.candidates
        )
        several = any(len(choices) > 1 for choices in candidates.values())
        self.held_until, self._round_ends = progress, progress + self.config.round_share
        self.router.requires_grad_(False)
        if compare is None or not several:
            self._decide({name: choices[0] for name, choices in candidates.items()}, {})
        else:
            losses = compare(candidates)
            self.trial = Trial(candidates, losses, self.nested, self.config.rounds)

    def _decide(self, chosen: dict[str, Choice], entrants: Mapping[str, Sequence[Entrant]]) -> None:
        """Freeze, and keep how it was decided."""
        for name, wish in self._wishes.items():
            self.decisions[name] = Decision(
                wish.architecture,
                wish.params,
                wish.log_probabilities[chosen[name].architecture],
                [entrant.candidate for entrant in entrants.get(name, ())],
            )
            told = account(name, self.targets[name], self.decisions[name], chosen[name])
            log.info("%s", told)
        self.trial = None
        self.freeze(chosen)

    def freeze(self, choices: dict[str, Choice]) -> None:
        """Fix the choices for good; the router learns no more."""
        self.frozen = choices
        self.router.requires_grad_(False)
        log.info("router frozen; %s", self.news(choices))

    def _has_settled(self, progress: float) -> bool:
        if self.config.settled_steps == 0:
            return False
        picks, sure = self.proposals.picks(self._scale(progress), SETTLED)
        self._settled = self._settled + 1 if sure and picks == self._last_picks else 0
        self._last_picks = picks
        return self._settled >= self.config.settled_steps

    def state(self) -> dict:
        """What a checkpoint needs beside the router's weights; JSON."""
        frozen = None
        if self.frozen is not None:
            frozen = {name: c.architecture.to_json() for name, c in self.frozen.items()}
        return {
            "frozen": frozen,
            "decisions": {name: each.to_json() for name, each in self.decisions.items()},
            "trial": None if self.trial is None else self.trial.state(),
            "round_ends": self._round_ends,
            "wishes": {name: wish.to_json() for name, wish in self._wishes.items()},
            "held_until": self.held_until,
            "settled": self._settled,
            "picks": self._last_picks,
        }

    def load_state(self, state: dict) -> None:
        """Inverse of `state`."""
        self.held_until = state["held_until"]
        decisions = state["decisions"].items()
        self.decisions = {name: Decision.from_json(value) for name, value in decisions}
        self._settled = state["settled"]
        self._last_picks = [(axis, pick) for axis, pick in state["picks"]]
        self._round_ends = state["round_ends"]
        wishes = state["wishes"].items()
        self._wishes = {name: Wish.from_json(value) for name, value in wishes}
        if state["trial"] is not None:
            self.trial = Trial.from_state(state["trial"], self.nested, self.space.shape)
            self.router.requires_grad_(False)
        if state["frozen"] is None:
            return
        members = {name: Architecture.from_json(value) for name, value in state["frozen"].items()}
        if self.given:
            self._require_same(members)
            return
        self.frozen = self._family(members)
        self.router.requires_grad_(False)

    def _family(self, members: Mapping[str, Architecture]) -> dict[str, Choice]:
        shape = self.space.shape
        return {name: Choice({}, each, parameters(shape, each)) for name, each in members.items()}

    def _require_same(self, members: Mapping[str, Architecture]) -> None:
        """A file with a member may have changed while the setting that names it has not."""
        for name, choice in (self.frozen or {}).items():
            if members.get(name) != choice.architecture:
                raise ConfigError(
                    f"budgets.{name}.architecture: is not the member that this run trains; restore "
                    "it, or choose another run_dir"
                )


def _counts(left: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in left.items())
