"""Tables from figures: by hand, on a few documents."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study.test_arms import TINY

from elastic.evaluate.documents import mean_and_error
from elastic.study.compare import Record, cost, rows, tables, write_figures, write_tables
from elastic.study.plot import write_plot

DOCUMENTS = [100, 50, 150]
STUDY = replace(TINY, run=["elastic", "separate"], seeds=[0, 1])


def record(arm: str, seed: int, **kls: list[float]) -> Record:
    """Sums over documents; the parent's loss is 2 nats per token."""
    parent = [2.0 * count for count in DOCUMENTS]
    members: dict[str, Any] = {
        name: {
            "params": 10 if name == "medium" else 5,
            "architecture": {},
            "loss": [p + 2 * value for p, value in zip(parent, values, strict=True)],
            "kl": values,
        }
        for name, values in kls.items()
    }
    work = {"tokens": 10, "student_flops": 3.0, "teacher_flops": 2.0, "seconds": 1.0}
    value = {"arm": arm, "seed": seed, "documents": DOCUMENTS, "members": members, **work}
    return Record(value | {"parent": {"loss": parent}})


RECORDS = [
    record("elastic", 0, medium=[1.0, 0.5, 1.5], small=[2.0, 1.0, 3.0]),
    record("elastic", 1, medium=[1.0, 0.6, 1.4], small=[2.0, 1.0, 3.0]),
    record("separate", 0, medium=[1.5, 0.6, 1.9]),
    record("separate", 0, small=[1.9, 0.9, 2.9]),
    record("separate", 1, medium=[1.1, 0.8, 1.6]),
    record("separate", 1, small=[2.5, 1.1, 3.1]),
]


def test_rows_are_means_over_seeds_with_paired_differences() -> None:
    found = rows(STUDY, RECORDS)
    assert [(row.arm, row.budget, row.seeds) for row in found] == [
        ("elastic", "medium", 2), ("elastic", "small", 2),
        ("separate", "medium", 2), ("separate", "small", 2),
    ]  # fmt: skip
    tokens = np.array(DOCUMENTS, dtype=float)
    assert found[0].kl == pytest.approx(mean_and_error(np.array([1.0, 0.55, 1.45]), tokens))
    assert found[0].versus == {}
    assert found[0].relative == pytest.approx(2 * 3.0 / 600)
    medium = found[2]
    expected = mean_and_error((np.array([0.5, 0.1, 0.4]) + [0.1, 0.2, 0.2]) / 2, tokens)
    kl, excess = medium.versus["kl"], medium.versus["excess"]
    assert (kl.mean, kl.error) == pytest.approx(expected) and kl.same_sign
    assert kl.share == pytest.approx(0.75 / 3.0)
    assert (excess.mean, excess.share) == pytest.approx((2 * kl.mean, kl.share))
    assert str(kl) == f"+25.0% (+{kl.mean / kl.error:.1f})"
    assert medium.by_seed == pytest.approx([4.0 / 300, 3.5 / 300])
    small = found[3]
    assert small.versus["kl"].mean > 0
    assert not small.versus["kl"].same_sign, "the first seed has the other sign"
    assert str(small.versus["kl"]).endswith(" ~")


def test_runs_of_one_arm_count_together() -> None:
    assert cost(RECORDS)["separate"] == {
        "tokens": 20.0, "student_flops": 6.0, "teacher_flops": 4.0, "seconds": 2.0,
    }  # fmt: skip
    assert cost(RECORDS)["elastic"]["tokens"] == 10


def test_tables_are_written_with_the_figures_behind_them(tmp_path: Path) -> None:
    found, spent = rows(STUDY, RECORDS), cost(RECORDS)
    shown = tables(found, spent)
    path = write_tables(tmp_path / "docs", STUDY, shown, tmp_path / "docs" / "quick.svg")
    write_figures(tmp_path / "docs", STUDY, RECORDS[0].documents, found, spent)
    text = path.read_text()
    assert all(line in text for line in shown) and max(map(len, shown)) <= 100
    assert "tiny" in text and "2 seed(s)" in text and "](quick.svg)" in text
    figures = json.loads(path.with_suffix(".json").read_text())
    assert len(figures["rows"]) == 4 and figures["cost"]["separate"]["tokens"] == 20
    assert (figures["documents"], figures["tokens"]) == (3, 300)


def test_the_figure_has_every_arm_member_and_seed_and_is_always_the_same(tmp_path: Path) -> None:
    """A member without a KL, the parent itself, is no point on a logarithmic axis."""
    whole = [record("elastic", seed, full=[0.0, 0.0, 0.0]) for seed in (0, 1)]
    records = [*whole, *RECORDS]
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        write_plot(path, rows(STUDY, records), cost(records))
    text = paths[0].read_text()
    assert text == paths[1].read_text()
    for word in ("elastic", "separate", "medium", "small", "students", "teacher"):
        assert f">{word}<" in text, word
    assert ">full<" not in text
