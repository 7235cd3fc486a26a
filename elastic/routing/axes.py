"""What the router of the paper proposes: choices on every axis by themselves, the expected size of
each budget held at its target by a price (arXiv 2511.16664, section 3.3)."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from elastic.config import ObjectiveConfig, RouterConfig
from elastic.losses import next_multiplier, router_terms
from elastic.members.architecture import Selection
from elastic.members.goals import PARAMS, Target
from elastic.members.search import Choice, LogProbabilities, Search, Unreachable
from elastic.routing.decide import Wish
from elastic.routing.masks import soft_keep
from elastic.routing.proposals import Proposals, Proposed, SoftDraw
from elastic.routing.router import Router, Schedule, entropy, expected_sizes, sample

log = logging.getLogger(__name__)


class AxisProposals(Proposals):
    """Proposals of a `Router`.

    Args:
        targets: by budget, largest first.
        smaller: the budgets that have a choice, by their position in the router.

    Raises:
        Unreachable: no family meets the targets.
    """

    def __init__(
        self,
        router: Router,
        search: Search,
        targets: Mapping[str, Target],
        smaller: Mapping[str, int],
        nested: bool,
        config: RouterConfig,
        objective: ObjectiveConfig,
    ) -> None:
        self.router, self.search, self.nested = router, search, nested
        self.targets, self.smaller = dict(targets), dict(smaller)
        self.config, self.objective = config, objective
        self._excess: dict[int, Tensor] = {}
        flat: dict[str, dict] = {name: {} for name in self.targets}
        # Unreachable targets stop here; and this family is there should the router's search fail.
        self._some_family = search.family(self.targets, flat, nested)

    def draw(self, budget: str, now: Schedule, generator: torch.Generator) -> SoftDraw:
        space, order, index = self.search.space, self.search.drop_order, self.smaller[budget]
        logits = self.router(index, now.scale)
        goals = self.targets[budget].goals
        multipliers = self.router.multipliers[index].clone()  # they are stepped in place
        # Masks and counts of parameters are products too: bfloat16 would be off by half a per cent.
        with torch.autocast(multipliers.device.type, enabled=False):
            drawn = sample(logits, now.temperature, generator, self.config.hard_probability)
            keep = soft_keep(space, order, drawn)
            # Of the distribution itself: noise would be paid for by making it narrow first.
            even = {axis: torch.softmax(values, -1) for axis, values in logits.items()}
            hidden, layers = expected_sizes(space, order, even)

            expected = {
                measure: torch.as_tensor(
                    measure.of(space.shape, hidden, layers), device=multipliers.device
                )
                for measure in {PARAMS, *self.targets[budget].measures}
            }
            paid = [
                router_terms(expected[goal.measure], goal.value, price, self.objective)
                for goal, price in zip(goals, multipliers, strict=False)
            ]
        distance, total = (
            torch.stack([terms[name] for terms, _ in paid]) for name in ("budget", "total")
        )
        self._excess[index] = torch.stack([excess for _, excess in paid])
        return SoftDraw(
            keep,
            {"budget": distance.max(), "total": total.sum()},
            {
                "entropy": entropy(even).detach(),
                "expected_params": expected[PARAMS].detach().mean(),
                "multiplier": multipliers.sum(),  # of all goals; nearly always there is one
            },
        )

    def stepped(self, taken: bool) -> None:
        """The multipliers of the budgets that the step drew follow how far their sizes were off."""
        if taken:
            for index, excess in self._excess.items():
                price = self.router.multipliers[index, : len(excess)]
                price.copy_(next_multiplier(price, excess, self.objective))
        self._excess.clear()

    def family(self, scale: float) -> dict[str, Choice]:
        try:
            return self.search.family(self.targets, self._log_probabilities(scale), self.nested)
        except Unreachable as error:
            log.warning("%s; taking a family that is legal, but not the router's own", error)
            return self._some_family

    def candidates(self, scale: float, count: int) -> Proposed:
        probable, log_probabilities = self.family(scale), self._log_probabilities(scale)
        found: dict[str, list[Choice]] = {name: [probable[name]] for name in self.targets}
        wishes = {}
        for name in self.smaller:
            more = self.search.members(self.targets[name], log_probabilities[name], count)
            new = [c for c in more if c.architecture != probable[name].architecture]
            found[name] += new[: count - 1]
            scores = {
                choice.architecture: self.search.log_probability(
                    log_probabilities[name], choice.selection
                )
                for choice in found[name]
            }
            own = self._most_probable(log_probabilities[name])
            wishes[name] = Wish(own.architecture, own.params, scores)
        return found, wishes

    def picks(self, scale: float, sure: float) -> tuple[list[tuple[str, int]], bool]:
        picks: list[tuple[str, int]] = []
        certain = True
        for log_probabilities in self._log_probabilities(scale).values():
            for axis, values in log_probabilities.items():
                picks.extend((axis, int(pick)) for pick in values.argmax(-1))
                certain = certain and bool((values.max(-1) > math.log(sure)).all())
        return picks, certain

    def _log_probabilities(self, scale: float) -> dict[str, LogProbabilities]:
        found: dict[str, LogProbabilities] = {name: {} for name in self.targets}
        for name, index in self.smaller.items():
            found[name] = self.router.log_probabilities(index, scale)
        return found

    def _most_probable(self, log_probabilities: LogProbabilities) -> Choice:
        """The most probable choice on every axis, whatever its size."""
        space = self.search.space
        selection: Selection = {}
        for axis in space.choices:
            if axis in log_probabilities:
                selection[axis] = tuple(int(pick) for pick in log_probabilities[axis].argmax(-1))
            else:
                selection[axis] = (0,) * space.decisions(axis)
        return self.search.choice(selection)
