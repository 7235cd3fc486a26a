"""Every family that meets the budgets, listed where there are few enough. No torch."""

import itertools
from collections.abc import Mapping, Sequence

from elastic.config import ConfigError
from elastic.members.goals import Target
from elastic.members.search import Choice, Search, chains

MOST = 4096
"""Families that are listed at most."""

Families = list[dict[str, Choice]]
"""Budget -> member, largest first."""


def nested_families(search: Search, targets: Mapping[str, Target], nested: bool) -> Families:
    """Every family that meets the targets, which are largest first.

    Raises:
        ConfigError: there is none, or there are more than `MOST`.
        Unreachable: a target that no member meets.
    """
    search.family(targets, {name: {} for name in targets}, nested)  # names what cannot be reached
    members = {name: search.members(target, {}, MOST + 1) for name, target in targets.items()}
    count = _count(list(members.values()), nested)
    if count > MOST:
        many = any(len(each) > MOST for each in members.values())
        shown = f"more than {MOST:,}" if many else f"{count:,}"
        raise ConfigError(
            f"router.kind=members: {shown} families meet the budgets, and at most {MOST:,} can be "
            "listed; give the space fewer choices, lower space.tolerance, or take router.kind=axes"
        )
    found = chains(list(members.values()), nested, lambda choice: choice.architecture)
    return [dict(zip(members, chain, strict=True)) for chain in found]


def _count(members: Sequence[Sequence[Choice]], nested: bool) -> int:
    """How many families there are, without listing them."""
    ways = [1] * len(members[0])
    for outer, inner in itertools.pairwise(members):
        ways = [
            sum(
                n
                for n, o in zip(ways, outer, strict=True)
                if not nested or i.architecture.is_within(o.architecture)
            )
            for i in inner
        ]
    return sum(ways)
