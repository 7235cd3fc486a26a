"""What is checked of sizes before anything starts: the same for training, plans and benches."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.spaces import SHAPE

from elastic.config import (
    BudgetConfig,
    ConfigError,
    ImportanceConfig,
    SpaceConfig,
    StageConfig,
)
from elastic.members.architecture import Architecture
from elastic.members.cost import parameters
from elastic.routing.sizes import Sizes, check_sizes

FULL = parameters(SHAPE, Architecture.full(SHAPE))


def check(
    budgets: dict[str, float],
    probabilities: dict[str, float] | None = None,
    in_place: bool = False,
    **axes: list[int],
) -> Sizes:
    stage = StageConfig(
        tokens=64, sequence_length=8, batch_tokens=16, model_lr=1e-3,
        budgets_per_batch=2 if probabilities is None else 1, budget_probabilities=probabilities,
    )  # fmt: skip
    asked = {name: BudgetConfig(params=params) for name, params in budgets.items()}
    space = SpaceConfig(**{"hidden": [16, 14, 12, 10, 8], "ffn": [32, 24, 16], **axes})
    space.tolerance = 0.05
    return check_sizes(SHAPE, space, asked, ImportanceConfig(), {"only": stage}, in_place)


def test_what_fits_is_worked_out() -> None:
    sizes = check({"small": 0.6, "full": 1.0}, depth=[5, 4])
    assert list(sizes.targets) == ["full", "small"] and sizes.targets["full"].values == [FULL]
    assert sizes.space.choices["depth"] == (5, 4) and len(sizes.drop_order) == 1


@pytest.mark.parametrize(
    ("budgets", "options", "line"),
    [
        ({"full": 1.0}, {"hidden": [17]}, "space.hidden=[17]: 17 is larger than the parent's 16"),
        ({"huge": 1e9}, {}, "budgets.huge.params=1e+09: must be at most the parent's"),
        ({"small": 0.01}, {}, "budgets.small: no combination of space is within"),
        ({"small": 0.6}, {"in_place": True}, "objective.teacher=in_place: must be replicated"),
        (
            {"full": 1.0, "small": 0.6},
            {"in_place": True, "probabilities": {"small": 1.0}},
            "curriculum.stages.only.budget_probabilities={'small': 1.0}: must be positive for full",
        ),
    ],
    ids=["space", "target", "reach", "in place", "stage"],
)
def test_each_of_the_checks_is_made(budgets: dict, options: dict, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(budgets, **options)
    assert str(error.value).startswith(line)


# Given members

WHOLE = Architecture.full(SHAPE)
MEDIUM = replace(WHOLE, hidden_size=14)
SMALL = replace(WHOLE.without({3}), hidden_size=12)
COUNTS = [parameters(SHAPE, each) for each in (MEDIUM, SMALL)]


def given(medium: object, small: object, nested: bool = True, params: float | None = None) -> Sizes:
    """Checked with these members; no budget asks for parameters, but the small one for `params`."""
    stage = StageConfig(tokens=64, sequence_length=8, batch_tokens=16, model_lr=1e-3)
    asked = {
        "full": BudgetConfig(params=1.0),
        "medium": BudgetConfig(architecture=medium),
        "small": BudgetConfig(architecture=small, params=params),
    }
    return check_sizes(SHAPE, SpaceConfig(nested=nested), asked, ImportanceConfig(), {"a": stage})


def test_given_members_are_the_family_whatever_the_space() -> None:
    sizes = given(MEDIUM.to_json(), SMALL.to_json())
    assert sizes.given == {"full": WHOLE, "medium": MEDIUM, "small": SMALL}
    assert [t.values for t in sizes.targets.values()] == [[FULL], *([count] for count in COUNTS)]
    assert check({"full": 1.0}).given == {}
    asked = given(MEDIUM.to_json(), SMALL.to_json(), params=COUNTS[1] * 1.005)
    assert asked.targets["small"].values == [round(COUNTS[1] * 1.005)]


def test_a_file_holds_a_member_alone_or_as_an_export_says_it(tmp_path: Path) -> None:
    alone, said = tmp_path / "medium.json", tmp_path / "provenance.json"
    alone.write_text(json.dumps(MEDIUM.to_json()))
    said.write_text(json.dumps({"budget": "x", "architecture": SMALL.to_json()}))
    assert list(given(str(alone), str(said)).given.values()) == [WHOLE, MEDIUM, SMALL]


HEADS = {"hidden_size": 12, "layers": [{"index": 0, "kind": "mamba", "num_heads": 3}]}


@pytest.mark.parametrize(
    ("small", "options", "line"),
    [
        (None, {"params": 0.6}, "small.architecture: must be given, as that of budgets.medium is"),
        ("/no/such.json", {}, "small.architecture=/no/such.json: "),
        ({"layers": []}, {}, "small.architecture: architecture entry is malformed: "),
        (HEADS, {}, "small.architecture: architecture entry is malformed: "),
        (
            replace(SMALL, hidden_size=17).to_json(),
            {},
            "small.architecture: hidden_size=17 must be in 1..16",
        ),
        (
            SMALL.to_json(),
            {"params": 0.3},
            f"small.architecture: has {COUNTS[1]:,} parameters, not within 1.0% of",
        ),
        (
            replace(WHOLE.without({0, 1, 2}), hidden_size=15).to_json(),
            {},
            "small.architecture: must be within that of budgets.medium on every axis and layer",
        ),
    ],
)
def test_what_is_no_member_or_misses_its_budget_is_refused(
    small: object, options: dict, line: str
) -> None:
    with pytest.raises(ConfigError) as error:
        given(MEDIUM.to_json(), small, **options)
    assert str(error.value).startswith(f"budgets.{line}") and "\n" not in str(error.value)


def test_members_need_not_be_nested_where_that_is_said() -> None:
    wide = replace(WHOLE.without({0, 1, 2}), hidden_size=15)
    assert given(MEDIUM.to_json(), wide.to_json(), nested=False).given["small"] == wide


def test_the_checks_need_no_torch() -> None:
    code = "import sys, elastic.routing.sizes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
