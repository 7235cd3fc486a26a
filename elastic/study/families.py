"""Brute force: every nested family of a space, or the best ones without training, distilled alike,
beside the family that a run has frozen."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from elastic.config import RunConfig
from elastic.console import table
from elastic.data import load_tokenizer, load_tokens
from elastic.evaluate.documents import mean_and_error, report_text, sums_by_document
from elastic.members.architecture import Architecture, Space
from elastic.members.search import Search
from elastic.members.targets import smaller_budgets, targets_of
from elastic.parent.weights import load_parent
from elastic.storage.manifest import ENERGIES, Manifest
from elastic.study.compare import Record

MOST = 256
"""Members of a budget that are measured without training."""

GOOD, ERRORS = 1.02, 2.0
"""A decision is good if its loss is at most so many times the best one's, or within so many
paired standard errors of it."""

Family = dict[str, dict[str, Any]]
"""Budget -> entry of elastic.json, largest first."""


def untrained_members(config: RunConfig, parent: Path) -> dict[str, list[dict[str, Any]]]:
    """KL to the parent of every member that meets a budget, as it is cut by a finished run, on the
    validation text: smaller budget -> entries with `architecture` and `kl`, least first."""
    run_dir = Path(config.run_dir)
    manifest = Manifest.read(run_dir / "elastic")
    original, cut = load_parent(parent), load_parent(run_dir / "sorted")
    shape, space = cut.shape, Space.build(config.space, cut.shape)
    targets = targets_of(config.budgets, shape)
    smaller = smaller_budgets(shape, targets)
    if config.norms.own:
        cut.add_own_norms(len(smaller), load_file(run_dir / "elastic" / ENERGIES))
    data = run_dir / "data"
    end = load_tokenizer(data / "tokenizer").eos_token_id
    text = report_text(load_tokens(data / "validation.npy"), end, 32, 256, 16)
    search = Search(space, manifest.ranking["drop_order"], config.space.tolerance)
    found: dict[str, list[dict[str, Any]]] = {}
    for position, budget in enumerate(smaller):
        own = position if config.norms.own else None
        entries = []
        for choice in search.members(targets[budget], {}, MOST):
            logits = partial(cut.logits, member=choice.architecture, own=own)
            sums = sums_by_document(logits, original.logits, text)
            kl, _ = mean_and_error(sums.kl, sums.tokens)
            entries.append({"architecture": choice.architecture.to_json(), "kl": kl})
        found[budget] = sorted(entries, key=lambda entry: entry["kl"])
    return found


def best_families(record: Record, count: int, nested: bool) -> list[Family]:
    """The `count` families with the least sum of KL without training, and the frozen one."""
    untrained = record.value["untrained"]
    frozen = record.family
    whole = {name: entry for name, entry in frozen.items() if name not in untrained}
    families: list[tuple[float, Family]] = []
    for entries in itertools.product(*untrained.values()):
        members = [Architecture.from_json(entry["architecture"]) for entry in entries]
        legal = all(inner.is_within(outer) for outer, inner in itertools.pairwise(members))
        if legal or not nested:
            chosen = {n: e["architecture"] for n, e in zip(untrained, entries, strict=True)}
            families.append((sum(entry["kl"] for entry in entries), whole | chosen))
    families.sort(key=lambda pair: pair[0])
    best = [family for _, family in families[:count]]
    return best if frozen in best else [*best, frozen]


@dataclass(frozen=True)
class Standing:
    """A family in the table of brute force."""

    family: Family
    kl: float
    """Sum over the smaller budgets, mean over seeds."""
    over_best: tuple[float, float]
    """Distance from the best family's, paired, and its standard error over documents."""
    frozen: int
    """Seeds whose run has frozen it."""


def standings(
    families: Sequence[Family],
    figures: Mapping[int, Sequence[Record]],
    frozen: Mapping[int, Family],
) -> list[Standing]:
    """The table, best first.

    Args:
        figures: seed -> a record per family, in their order.
        frozen: seed -> what the run has frozen.
    """
    smaller = list(families[0])[1:]
    tokens = next(iter(figures.values()))[0].documents
    sums = []
    for i in range(len(families)):
        parts = [
            records[i].sums(budget, "kl") for records in figures.values() for budget in smaller
        ]
        sums.append(np.sum(parts, axis=0) / len(figures))
    best = min(sums, key=lambda each: float(each.sum()))
    found = [
        Standing(
            family,
            mean_and_error(each, tokens)[0],
            mean_and_error(each - best, tokens),
            sum(choice == family for choice in frozen.values()),
        )
        for family, each in zip(families, sums, strict=True)
    ]
    return sorted(found, key=lambda standing: standing.kl)


@dataclass(frozen=True)
class Verdict:
    """Whether the decisions of all seeds are good, by the mean over seeds (law 10)."""

    ratio: float
    """KL of the frozen families over the best one's."""
    errors: float
    """Their distance in paired standard errors; of the mean over seeds."""

    @property
    def good(self) -> bool:
        return self.ratio <= GOOD or self.errors <= ERRORS


def verdict(found: Sequence[Standing]) -> Verdict:
    """Each seed's frozen family counts once."""
    seeds = sum(standing.frozen for standing in found)
    best = found[0].kl
    mean = sum(standing.kl * standing.frozen for standing in found) / seeds
    errors = [
        standing.over_best[0] / standing.over_best[1] if standing.over_best[1] else 0.0
        for standing in found
        for _ in range(standing.frozen)
    ]
    return Verdict(mean / best, float(np.mean(errors)))


def lines(found: Sequence[Standing]) -> list[str]:
    """The table as text, with the verdict below."""
    rows = []
    for standing in found:
        mean, error = standing.over_best
        sizes = [_brief(entry) for entry in list(standing.family.values())[1:]]
        rows.append(
            [
                " | ".join(sizes),
                f"{standing.kl:.4f}",
                f"{standing.kl / found[0].kl:.3f}",
                f"{mean / error:.1f}" if error else "-",
                str(standing.frozen) if standing.frozen else "",
            ]
        )
    told = verdict(found)
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

    def span(field: str, kind: str) -> str:
        values = [layer[field] for layer in entry["layers"] if layer["kind"] == kind]
        if not values:
            return "-"
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low}-{high}"

    heads = f"{span('num_heads', 'mamba')}x{span('head_dim', 'mamba')}"
    query = span("num_heads", "attention")
    ffn = span("intermediate_size", "mlp")
    return f"{entry['hidden_size']}/{ffn}/{heads}+{query}/{len(entry['layers'])}"
