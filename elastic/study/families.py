"""Brute force: every nested family of a space, or the best ones without training, distilled alike,
beside the family that a run has frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from elastic.config import RunConfig
from elastic.console import table
from elastic.data import open_prepared
from elastic.evaluate.documents import mean_and_error, report_text, sums_by_document
from elastic.members.architecture import Architecture, Space
from elastic.members.search import Search, chains
from elastic.members.targets import smaller_budgets, targets_of
from elastic.parent.weights import load_parent
from elastic.routing.table import span
from elastic.storage.files import elastic_directory
from elastic.storage.manifest import ENERGIES, Manifest
from elastic.study.compare import Record

MOST = 256
"""Members of a budget that are measured without training."""

GOOD, ERRORS = 1.02, 2.0
"""A decision is good if its loss is at most so many times the best one's, or within so many
paired standard errors of it."""

Entries = dict[str, dict[str, Any]]
"""Budget -> entry of elastic.json, largest first."""


def untrained_members(config: RunConfig, parent: Path) -> dict[str, list[dict[str, Any]]]:
    """KL to the parent of every member that meets a budget, as it is cut by a finished run, on the
    validation text: smaller budget -> entries with `architecture` and `kl`, least first."""
    run_dir = Path(config.run_dir)
    manifest = Manifest.read(elastic_directory(run_dir))
    original, cut = load_parent(parent), load_parent(run_dir / "sorted")
    shape, space = cut.shape, Space.build(config.space, cut.shape)
    targets = targets_of(config.budgets, shape)
    smaller = smaller_budgets(targets)
    if config.norms.own:
        cut.add_own_norms(len(smaller), load_file(elastic_directory(run_dir) / ENERGIES))
    text = report_text(open_prepared(config.data, run_dir), "validation", 32, 256, 16)
    search = Search(space, manifest.ranking["drop_order"], config.space.tolerance)
    found: dict[str, list[dict[str, Any]]] = {}
    for position, budget in enumerate(smaller):
        own = position if config.norms.own else None
        members = [c.architecture for c in search.members(targets[budget], {}, MOST)]
        models = [partial(cut.logits, member=member, own=own) for member in members]
        entries = [
            {"architecture": member.to_json(), "kl": mean_and_error(sums.kl, sums.tokens)[0]}
            for member, sums in zip(
                members, sums_by_document(models, original.logits, text), strict=True
            )
        ]
        found[budget] = sorted(entries, key=lambda entry: entry["kl"])
    return found


def best_families(record: Record, count: int, nested: bool) -> list[Entries]:
    """The `count` families with the least sum of KL without training, and the frozen one."""
    untrained, frozen = record.value["untrained"], record.family
    whole = {name: entry for name, entry in frozen.items() if name not in untrained}
    members = [
        [(Architecture.from_json(entry["architecture"]), entry) for entry in entries]
        for entries in untrained.values()
    ]
    families: list[tuple[float, Entries]] = []
    for chain in chains(members, nested, lambda pair: pair[0]):
        named = zip(untrained, chain, strict=True)
        chosen = {name: entry["architecture"] for name, (_, entry) in named}
        families.append((sum(entry["kl"] for _, entry in chain), whole | chosen))
    families.sort(key=lambda pair: pair[0])
    best = [family for _, family in families[:count]]
    return best if frozen in best else [*best, frozen]


@dataclass(frozen=True)
class Standing:
    """A family in the table of brute force."""

    family: Entries
    kl: float
    """Sum over the smaller budgets, mean over seeds."""
    over_best: tuple[float, float]
    """Distance from the best family's, paired, and its standard error over documents."""
    frozen: int
    """Seeds whose run has frozen it."""


@dataclass(frozen=True)
class Judgement:
    """The table of brute force, and whether the run's decisions are good (law 10)."""

    standings: list[Standing]
    """Best first."""
    ratio: float
    """KL of what each seed has frozen, as that seed's own brute force has it, over the best
    family's; means over seeds."""
    errors: float
    """Their distance in paired standard errors over documents; 0 where they are the same."""

    @property
    def good(self) -> bool:
        return self.ratio <= GOOD or self.errors <= ERRORS


def judgement(
    families: Sequence[Entries],
    figures: Mapping[int, Sequence[Record]],
    frozen: Mapping[int, Entries],
) -> Judgement:
    """Compare what was frozen with the best family, whose mean over seeds is the least.

    Args:
        figures: seed -> a record per family, in their order.
        frozen: seed -> what the run has frozen, one of the families.
    """
    smaller = list(families[0])[1:]
    tokens = next(iter(figures.values()))[0].documents
    sums = np.array(  # (seeds, families, documents)
        [
            [np.sum([record.sums(budget, "kl") for budget in smaller], 0) for record in each]
            for each in figures.values()
        ]
    )
    means = sums.mean(0)
    best = int(means.sum(-1).argmin())
    taken = np.array([sums[i, families.index(frozen[seed])] for i, seed in enumerate(figures)])
    mean, error = mean_and_error((taken - sums[:, best]).mean(0), tokens)
    found = [
        Standing(
            family,
            mean_and_error(each, tokens)[0],
            mean_and_error(each - means[best], tokens),
            sum(choice == family for choice in frozen.values()),
        )
        for family, each in zip(families, means, strict=True)
    ]
    return Judgement(
        sorted(found, key=lambda standing: standing.kl),
        float(taken.mean(0).sum() / means[best].sum()),
        mean / error if error else 0.0,
    )


def lines(told: Judgement) -> list[str]:
    """The table as text, with the verdict below."""
    rows, least = [], told.standings[0].kl
    for standing in told.standings:
        mean, error = standing.over_best
        sizes = [_brief(entry) for entry in list(standing.family.values())[1:]]
        rows.append(
            [
                " | ".join(sizes),
                f"{standing.kl:.4f}",
                f"{standing.kl / least:.3f}",
                f"{mean / error:.1f}" if error else "-",
                str(standing.frozen) if standing.frozen else "",
            ]
        )
    said = "good" if told.good else "not good"
    header = ("family: hidden/ffn/heads/layers", "KL", "over best", "errors", "frozen by")
    return [
        *table(header, rows),
        "",
        f"the decision is {said}: {told.ratio:.3f} times the best, {told.errors:.1f} standard "
        f"errors from it",
        f"(good is at most {GOOD} times, or within {ERRORS:.0f} standard errors)",
    ]


def _brief(entry: Mapping[str, Any]) -> str:
    """Sizes of a member in a few characters; ranges where layers differ."""
    member = Architecture.from_json(dict(entry))
    heads = f"{span(member, 'mamba_heads')}x{span(member, 'mamba_head_dim')}"
    query, layers = span(member, "attention_heads"), len(member.layers)
    return f"{member.hidden_size}/{span(member, 'ffn')}/{heads}+{query}/{layers}"
