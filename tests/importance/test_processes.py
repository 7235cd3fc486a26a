"""Several processes rank as one does: real processes, on small random parents.

They start as forks and write what they find; one process computes the same here.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cluster_processes import processes
from helpers.documents import rows_of
from helpers.strategies import random_parent, random_tokens, tiny_shape
from safetensors.torch import load_file

from elastic.cluster.place import Place
from elastic.cluster.rendezvous import joined
from elastic.config import ImportanceConfig, SpaceConfig
from elastic.importance import Calibration, Ranking, rank
from elastic.members.architecture import Space
from elastic.parent import HybridParent
from elastic.parent.weights import save_parent
from elastic.storage.seals import Seals

Tell = Callable[[str], None]

SHAPE = tiny_shape(pattern="M-*M-M-M", hidden_size=12)
TEXT = Calibration(
    rows_of(random_tokens(SHAPE, batch=7, time=11)),
    rows_of(random_tokens(SHAPE, batch=5, time=8, seed=1)),
)
CONFIG = ImportanceConfig(samples=7, batch_size=2, depth_samples=5, depth_positions=6)
SPACE = Space.build(SpaceConfig(hidden=[12, 8], depth=[8, 5]), SHAPE)
WIDTHS = 1e-6
"""Largest difference between scores and energies of different sums, relative: float32 is stored."""


def ranked(
    directory: Path, place: Place, load: Callable[[], HybridParent], **changes: Any
) -> Ranking:
    arguments: dict[str, Any] = {"config": CONFIG, "calibration": TEXT} | changes
    return rank(
        directory / "parent", load, space=SPACE, seed=0, data_fingerprint="text",
        path=directory / f"scores{place.world_size}" / "scores.safetensors", place=place,
        **arguments,
    )  # fmt: skip


def body(rank_: int, count: int, tell: Tell, directory: str, changes: dict[str, Any]) -> None:
    """One of the processes: ranks twice, and says what it has and how often it loaded."""
    torch.set_num_threads(1)
    place = Place(rank_, rank_, count, count)
    loads = 0

    def load() -> HybridParent:
        nonlocal loads
        loads += 1
        return random_parent(SHAPE)

    with joined(place, torch.device("cpu"), directory):
        found = ranked(Path(directory), place, load, **changes)
        again = ranked(Path(directory), place, load, **changes)
    assert again.drop_order == found.drop_order and again.key == found.key
    tell(json.dumps([found.drop_order, found.key, found.depth_errors, loads]))


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "two": (2, {}),
    "more than batches": (5, {}),
    "sorted": (2, {"config": replace(CONFIG, hidden="sort", aggregation="mean_l2")}),
    "spread": (2, {"config": replace(CONFIG, spread=True)}),
    "bfloat16": (2, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_processes_rank_as_one_does(case: str, tmp_path: Path) -> None:
    """Errors of the depth to the last bit; sums over the text to rounding, every order exactly."""
    count, changes = CASES[case]
    (tmp_path / "parent").mkdir()
    save_parent(random_parent(SHAPE), tmp_path / "parent")
    alone = ranked(tmp_path, Place(), lambda: random_parent(SHAPE), **changes)
    with processes(tmp_path / "told", body, count, str(tmp_path), changes) as started:
        assert started.codes() == [0] * count, started.errors(0)
        told = [json.loads(started.told(number)[0]) for number in range(count)]
    errors = json.loads(json.dumps(alone.depth_errors))
    assert told == [[list(alone.drop_order), alone.key, errors, 1]] * count
    one, several = (tmp_path / f"scores{n}" / "scores.safetensors" for n in (1, count))
    expected, found = load_file(one), load_file(several)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if name == "rotation":  # a direction is as sure as its eigenvalue is far from the next
            torch.testing.assert_close(found[name], values, rtol=0, atol=1e-4)
        else:
            torch.testing.assert_close(found[name], values, rtol=WIDTHS, atol=1e-9)
            assert found[name].sort().indices.equal(values.sort().indices)
    assert Seals.read(several.parent) is not None


def overflowing(rank_: int, count: int, tell: Tell, directory: str, what: str) -> None:
    """The parent overflows: everybody finds it, the first process says so."""
    place = Place(rank_, rank_, count, count)

    def load() -> HybridParent:
        parent = random_parent(SHAPE)
        with torch.no_grad():
            if what == "scores":
                parent.backbone.layers[1].mixer.up_proj.weight[2, 3] = torch.nan
            else:
                parent.lm_head.weight[1, 1] = torch.inf
        return parent

    config = replace(CONFIG, hidden="sort")
    with joined(place, torch.device("cpu"), directory):
        try:
            ranked(Path(directory), place, load, config=config)
        except ValueError as error:
            tell(str(error))
        except SystemExit as left:
            tell(f"left with {left.code}")


@pytest.mark.parametrize("what", ["scores", "logits"])
def test_what_overflows_is_said_once_and_written_by_nobody(what: str, tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    save_parent(random_parent(SHAPE), tmp_path / "parent")
    with processes(tmp_path / "told", overflowing, 2, str(tmp_path), what) as started:
        assert started.codes() == [0, 0], started.errors(0)
        (line,), other = started.told(0), started.told(1)
    assert line.startswith(f"importance: {what}") and "are not finite" in line
    assert other == ["left with 2"]
    assert not (tmp_path / "scores2").exists()


def damaged(rank_: int, count: int, tell: Tell, directory: str) -> None:
    """What the first process cannot read it alone reports."""
    place = Place(rank_, rank_, count, count)
    with joined(place, torch.device("cpu"), directory):
        try:
            ranked(Path(directory), place, lambda: random_parent(SHAPE))
        except ValueError as error:
            tell(f"{type(error).__name__}")
        except SystemExit as left:
            tell(f"left with {left.code}")


def test_a_parent_that_cannot_be_read_is_said_once(tmp_path: Path) -> None:
    with processes(tmp_path / "told", damaged, 2, str(tmp_path)) as started:
        assert started.codes() == [0, 0], started.errors(0)
        assert started.told(0)[0] != "left with 2"
        assert started.told(1) == ["left with 2"]
