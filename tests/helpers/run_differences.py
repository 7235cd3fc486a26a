"""What is not the same in two runs, by their files, metrics, weights and families."""

import csv
import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file

WEIGHTS, LOSSES = 1e-4, 1e-5
"""Largest differences where several processes add up in another order."""


def losses_of(run_dir: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv without what the clock says."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value and "per_second" not in key}
            for row in csv.DictReader(file)
        ]


def files_of(run_dir: Path) -> dict[str, str]:
    """Every file of a run, hidden ones too, and its checksum; none of metrics.csv, which holds
    times, and nothing of the revision of the code, should that change meanwhile."""
    return {
        str(path.relative_to(run_dir)): "" if path.name == "metrics.csv" else _checksum(path)
        for path in sorted(run_dir.rglob("*"))
        if path.is_file()
    }


def _checksum(path: Path) -> str:
    if path.name == "elastic.json":
        return str(_family(path.parents[1], "git_revision"))
    if path.name == "seals.json" and path.parent.name == "elastic":
        files: dict = json.loads(path.read_text())["files"]
        return str({name: seal for name, seal in files.items() if name != "elastic.json"})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(run_dir: Path, whole: Path, exact: bool) -> list[str]:
    """What is not the same in two runs: with `exact` every file to the last bit, else weights,
    losses and the family within tolerance."""
    found: list[str] = []
    mine, other = files_of(run_dir), files_of(whole)
    if exact:
        found += [f"{name} is there" for name in sorted(mine.keys() - other.keys())]
        found += [f"{name} is not there" for name in sorted(other.keys() - mine.keys())]
        both = sorted(mine.keys() & other.keys())
        found += [f"{name} differs" for name in both if mine[name] != other[name]]
    found += [f"{name} is left over" for name in mine if "/." in f"/{name}"]
    family, wanted_family = (_family(each, "git_revision", "config") for each in (run_dir, whole))
    decided = _decided(family), _decided(wanted_family)
    if str(family) != str(wanted_family) or len(decided[0]) != len(decided[1]):
        found.append("elastic/elastic.json: another family")
    apart = max((abs(a - b) for a, b in zip(*decided, strict=False)), default=0.0)
    if apart > (0 if exact else LOSSES):
        found.append(f"elastic/elastic.json: figures of decisions are {apart:.1e} apart")
    apart = weights_apart(run_dir, whole)
    if apart > (0 if exact else WEIGHTS):
        found.append(f"elastic: weights are up to {apart:.1e} apart")
    rows, others = losses_of(run_dir), losses_of(whole)
    steps, wanted = ([row["step"] for row in each] for each in (rows, others))
    if steps != wanted:
        return [*found, f"metrics.csv: rows of steps {steps} instead of {wanted}"]
    if [row.keys() for row in rows] != [row.keys() for row in others]:
        return [*found, "metrics.csv: other columns"]
    apart, where = losses_apart(run_dir, whole)
    if apart > (0 if exact else LOSSES):
        found.append(f"metrics.csv: {where} is {apart:.1e} apart")
    return found


def _family(run_dir: Path, *without: str) -> dict:
    """elastic.json, but for some of its provenance."""
    value: dict = json.loads((run_dir / "elastic" / "elastic.json").read_text())
    for name in without:
        value["provenance"].pop(name)
    return value


def _decided(family: dict) -> list[float]:
    """Takes the figures out of the decisions of a family: what the router and its candidates had
    when it froze, as functions of weights."""
    figures = []
    for budget in family["budgets"].values():
        decision = budget.get("decision", {"candidates": []})
        figures += [decision.pop("log_probability", 0.0)]
        figures += [candidate.pop("kl") for candidate in decision["candidates"]]
    return figures


def weights_apart(run_dir: Path, whole: Path) -> float:
    """Largest difference between the weights, own norms and routers of two elastic checkpoints."""
    largest = 0.0
    for name in ("model.safetensors", "members.safetensors", "router.safetensors"):
        one, two = (load_file(each / "elastic" / name) for each in (run_dir, whole))
        assert one.keys() == two.keys()
        largest = max(largest, *(float((one[n] - two[n]).abs().max()) for n in one))
    return largest


def losses_apart(run_dir: Path, whole: Path) -> tuple[float, str]:
    """Largest difference between figures of metrics.csv, and where it is.

    Tokens and parameters are counted, and differ by nothing or by more than one; an expected number
    of parameters has the digits of float32, and is compared as a share.
    """
    return max(
        (
            abs(value - expected[key]) / (expected[key] if key.endswith("_params") else 1.0),
            f"step {row['step']:g}, {key}",
        )
        for row, expected in zip(losses_of(run_dir), losses_of(whole), strict=True)
        for key, value in row.items()
    )
