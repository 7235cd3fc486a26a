"""A router over whole families: one distribution over all nested families that meet the budgets.

Every draw is of members that meet their targets, so that nothing is paid for a size; there must be
few enough of them to be listed (`router.kind=members`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elastic.config import RouterConfig
from elastic.members.families import Families
from elastic.members.search import Choice, Search
from elastic.routing.decide import Wish
from elastic.routing.masks import soft_keep
from elastic.routing.proposals import Proposals, Proposed, SoftDraw
from elastic.routing.router import Schedule, entropy, sample, two_layers


class FamilyRouter(nn.Module):
    """Two layers that say how probable each family is; their logits are scaled."""

    def __init__(
        self, families: Families, config: RouterConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.families = families
        self.network = two_layers(config.hidden_units, len(families), generator)
        self.register_buffer("multipliers", torch.zeros(0), persistent=False)

    multipliers: Tensor
    """None: no size has a price."""

    def forward(self, scale: float) -> Tensor:
        """Logits (1, 1, families), in float32 whatever the precision around it."""
        with torch.autocast(self.multipliers.device.type, enabled=False):
            return (scale * self.network(self.multipliers.new_ones(1, 1)))[:, None]

    @torch.no_grad()
    def probabilities(self, scale: float) -> list[float]:
        """Of every family, without noise."""
        found: list[float] = torch.softmax(self(scale)[0, 0].double(), -1).tolist()
        return found


class FamilyProposals(Proposals):
    """Proposals of a `FamilyRouter`.

    Args:
        smaller: the budgets that have a choice.
    """

    def __init__(
        self, router: FamilyRouter, search: Search, smaller: Sequence[str], config: RouterConfig
    ) -> None:
        self.router, self.search, self.config = router, search, config
        self.smaller = list(smaller)
        space, device = search.space, router.multipliers.device  # copied once, not in every step
        self._picks = {  # budget -> axis -> (families, decisions, choices), one-hot
            name: {
                axis: torch.stack(
                    [
                        nn.functional.one_hot(
                            torch.tensor(family[name].selection[axis]), len(space.choices[axis])
                        )
                        for family in router.families
                    ]
                ).to(device, torch.float32)
                for axis in space.elastic_axes
            }
            for name in self.smaller
        }
        self._params = {
            name: torch.tensor(
                [float(family[name].params) for family in router.families], device=device
            )
            for name in self.smaller
        }

    def draw(self, budget: str, now: Schedule, generator: torch.Generator) -> SoftDraw:
        space, order, logits = self.search.space, self.search.drop_order, self.router(now.scale)
        with torch.autocast(logits.device.type, enabled=False):
            hard = self.config.hard_probability
            drawn = sample({"family": logits}, now.temperature, generator, hard)
            weights = drawn["family"][:, 0]  # (1, families)
            marginals = {
                axis: torch.einsum("bf,fdc->bdc", weights, one_hot)
                for axis, one_hot in self._picks[budget].items()
            }
            keep = soft_keep(space, order, marginals)
            even = torch.softmax(logits.detach(), -1)
            undecided = entropy({"family": even}) if even.shape[-1] > 1 else 0.0
            expected = (even[0, 0] * self._params[budget]).sum()
        return SoftDraw(keep, {}, {"entropy": undecided, "expected_params": expected})

    def stepped(self, taken: bool) -> None:
        pass  # nothing has a price

    def family(self, scale: float) -> dict[str, Choice]:
        return self._ranked(scale)[0][1]

    def candidates(self, scale: float, count: int) -> Proposed:
        ranked = self._ranked(scale)
        found: dict[str, list[Choice]] = {name: [] for name in ranked[0][1]}
        shares: dict[str, dict] = {name: {} for name in found}
        for probability, family in ranked:
            for name, choice in family.items():
                known = shares[name].get(choice.architecture)
                shares[name][choice.architecture] = (known or 0.0) + probability
                if known is None and len(found[name]) < count:
                    found[name].append(choice)
        wishes = {}
        for name in self.smaller:
            scores = {
                choice.architecture: math.log(max(shares[name][choice.architecture], 1e-300))
                for choice in found[name]
            }
            own = found[name][0]
            wishes[name] = Wish(own.architecture, own.params, scores)
        return found, wishes

    def picks(self, scale: float, sure: float) -> tuple[list[tuple[str, int]], bool]:
        probabilities = self.router.probabilities(scale)
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return [("family", best)], probabilities[best] > sure

    def _ranked(self, scale: float) -> list[tuple[float, dict[str, Choice]]]:
        """Families, the most probable first; ties keep their order."""
        pairs = zip(self.router.probabilities(scale), self.router.families, strict=True)
        return sorted(pairs, key=lambda pair: -pair[0])
