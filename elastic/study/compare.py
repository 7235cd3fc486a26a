"""Figures of finished runs -> tables: every arm's members, and paired differences from the first
arm, averaged over seeds, with standard errors over documents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic.config import StudySettings
from elastic.console import short, table
from elastic.evaluate.documents import mean_and_error, mean_over_seeds
from elastic.storage.files import atomic_file, write_json


@dataclass(frozen=True)
class Record:
    """Figures of one run, as its file has them."""

    value: Mapping[str, Any]

    @property
    def arm(self) -> str:
        return str(self.value["arm"])

    @property
    def seed(self) -> int:
        return int(self.value["seed"])

    @property
    def family(self) -> dict[str, Any]:
        """Budget -> entry of elastic.json, largest first."""
        return {name: each["architecture"] for name, each in self.value["members"].items()}

    @property
    def drop_order(self) -> list[int]:
        """Layers, the least important first."""
        return list(self.value["drop_order"])

    @property
    def documents(self) -> np.ndarray:
        """(documents,): tokens of each."""
        return np.asarray(self.value["documents"], dtype=np.float64)

    def sums(self, budget: str, figure: str) -> np.ndarray:
        """(documents,): `loss` or `kl` of a member in nats, summed by document; `excess` is its
        loss above the parent's."""
        if figure == "excess":
            parent = np.asarray(self.value["parent"]["loss"])
            return self.sums(budget, "loss") - parent
        return np.asarray(self.value["members"][budget][figure])


@dataclass(frozen=True)
class Difference:
    """How a member differs from the first arm's, paired by seed and document."""

    mean: float
    """In nats per token."""
    error: float
    """Standard error of it, over documents."""
    share: float
    """Of the first arm's figure."""
    same_sign: bool
    """Whether each seed's has the sign of the mean."""

    def __str__(self) -> str:
        errors = f"{self.mean / self.error:+.1f}" if self.error else "-"
        return f"{self.share:+.1%} ({errors})" + ("" if self.same_sign else " ~")


@dataclass(frozen=True)
class Row:
    """A member of an arm, averaged over seeds; losses in nats per token."""

    arm: str
    budget: str
    params: float
    seeds: int
    excess: tuple[float, float]
    """Loss above the parent's, and its standard error."""
    relative: float
    """The same as a share of the parent's loss."""
    kl: tuple[float, float]
    by_seed: list[float]
    """KL of every seed."""
    versus: Mapping[str, Difference]
    """`excess` and `kl` beside the first arm's; empty for that arm, and for a member that it does
    not have."""


def rows(study: StudySettings, records: Sequence[Record]) -> list[Row]:
    """One per arm and member, in the order of study.run; budgets largest first."""
    by_arm: dict[str, dict[str, dict[int, Record]]] = {}
    for record in records:
        for budget in record.family:
            by_arm.setdefault(record.arm, {}).setdefault(budget, {})[record.seed] = record
    first = by_arm[study.run[0]]
    found = []
    for arm in study.run:
        for budget, seeds in by_arm[arm].items():
            found.append(
                _row(arm, budget, seeds, None if arm == study.run[0] else first.get(budget))
            )
    return found


def _row(
    arm: str, budget: str, seeds: Mapping[int, Record], first: Mapping[int, Record] | None
) -> Row:
    tokens = next(iter(seeds.values())).documents
    kls = {seed: record.sums(budget, "kl") for seed, record in seeds.items()}
    excess = [record.sums(budget, "excess") for record in seeds.values()]
    parents = [np.asarray(record.value["parent"]["loss"]).sum() for record in seeds.values()]
    mean_excess = mean_over_seeds(excess, tokens)
    sizes = [record.value["members"][budget]["params"] for record in seeds.values()]
    return Row(
        arm=arm,
        budget=budget,
        params=float(np.mean(sizes)),
        seeds=len(seeds),
        excess=mean_excess,
        relative=float(mean_excess[0] * tokens.sum() / np.mean(parents)),
        kl=mean_over_seeds(list(kls.values()), tokens),
        by_seed=[mean_and_error(each, tokens)[0] for each in kls.values()],
        versus={}
        if first is None
        else {name: _difference(budget, name, seeds, first) for name in ("excess", "kl")},
    )


def _difference(
    budget: str, figure: str, seeds: Mapping[int, Record], first: Mapping[int, Record]
) -> Difference:
    tokens = next(iter(seeds.values())).documents
    firsts = [first[seed].sums(budget, figure) for seed in seeds]
    each = [
        record.sums(budget, figure) - other
        for record, other in zip(seeds.values(), firsts, strict=True)
    ]
    mean, error = mean_over_seeds(each, tokens)
    return Difference(
        mean=mean,
        error=error,
        share=mean / mean_over_seeds(firsts, tokens)[0],
        same_sign=all(np.sign(one.sum()) == np.sign(mean) for one in each),
    )


def cost(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """arm -> tokens of text, FLOPs of students and teacher, seconds, per seed."""
    found: dict[str, dict[str, float]] = {}
    seeds: dict[str, set[int]] = {}
    for record in records:
        entry = found.setdefault(record.arm, {})
        seeds.setdefault(record.arm, set()).add(record.seed)
        for name in ("tokens", "student_flops", "teacher_flops", "seconds"):
            entry[name] = entry.get(name, 0.0) + record.value[name]
    return {a: {n: v / len(seeds[a]) for n, v in entry.items()} for a, entry in found.items()}


def tables(found: Sequence[Row], spent: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Both tables, of `rows` and of `cost`, as lines of at most 100 columns."""
    lines = []
    for row in found:
        lines.append(
            [
                row.arm,
                row.budget,
                short(row.params),
                str(row.seeds),
                f"{row.relative:+.2%}",
                str(row.versus.get("excess", "")),
                f"{row.kl[0]:.4f} +- {row.kl[1]:.4f}",
                str(row.versus.get("kl", "")),
            ]
        )
    versus = f"to {found[0].arm}'s"
    header = (
        "arm", "member", "params", "seeds", "loss", versus, "KL", versus,
    )  # fmt: skip
    costs = [
        [arm, *(short(each[name]) for name in ("tokens", "student_flops", "teacher_flops")),
         f"{each['seconds']:.0f}"]
        for arm, each in spent.items()
    ]  # fmt: skip
    head = ("arm", "tokens", "student FLOPs", "teacher FLOPs", "seconds")
    return [*table(header, lines), "", *table(head, costs)]


def write_figures(
    directory: Path,
    study: StudySettings,
    documents: np.ndarray,
    found: Sequence[Row],
    spent: Mapping[str, Mapping[str, float]],
) -> None:
    """`<name>.json`: what the tables show, with every digit; `documents` are their tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    value = {
        "experiment": study.experiment,
        "documents": len(documents),
        "tokens": int(documents.sum()),
        "rows": [asdict(row) for row in found],
        "cost": spent,
    }
    write_json(directory / f"{study.name}.json", value)


def write_tables(
    directory: Path, study: StudySettings, shown: Sequence[str], plot: Path | None = None
) -> Path:
    """`<name>.md`, with tables as they were printed, and a figure beside it."""
    text = [
        f"# {study.name}",
        "",
        f"Written by `elastic study study={study.name}`: experiment `{study.experiment}`, "
        f"{len(study.seeds)} seed(s), on text by which nothing was chosen. Loss is the relative "
        "distance from the parent's, KL to the parent is in nats per token, with its standard "
        f"error over documents. Behind each: how far it is above that of `{study.run[0]}`, in "
        "percent and in standard errors of the difference, paired by seed and document; `~` where "
        "a seed has the other sign. Seconds are of runs that may have shared the machine.",
        "",
        "```text",
        *shown,
        "```",
        *([] if plot is None else ["", f"![KL and FLOPs of every arm]({plot.name})"]),
    ]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{study.name}.md"
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(text) + "\n")
    return path
