"""What is checked of sizes before anything starts: the same for training, plans and benches."""

import subprocess
import sys

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
        budgets_per_batch="all", budget_probabilities=probabilities,
    )  # fmt: skip
    asked = {name: BudgetConfig(params=params) for name, params in budgets.items()}
    space = SpaceConfig(**{"hidden": [16, 14, 12, 10, 8], "ffn": [32, 24, 16], **axes})
    space.tolerance = 0.05
    return check_sizes(SHAPE, space, asked, ImportanceConfig(), {"only": stage}, in_place)


def test_what_fits_is_worked_out() -> None:
    sizes = check({"small": 0.6, "full": 1.0}, depth=[5, 4])
    assert list(sizes.targets) == ["full", "small"] and sizes.targets["full"] == FULL
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


def test_the_checks_need_no_torch() -> None:
    code = "import sys, elastic.routing.sizes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
