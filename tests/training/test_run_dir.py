"""A run directory is nobody's, this run's, or refused; what a killed start has left is nobody's."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.runs import settings

from elastic.cluster.lock import LOCK
from elastic.config import BudgetConfig, ConfigError, CurriculumConfig, RunConfig
from elastic.training.run_dir import check_run_dir, write_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return settings(tmp_path / "run")


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, ".config.yaml.tmp-17"]])
def test_a_run_may_begin_where_nothing_is(config: RunConfig, left: list[str]) -> None:
    """A run that died before its settings were written is no run yet."""
    run_dir = Path(config.run_dir)
    check_run_dir(config, first=True)
    run_dir.mkdir()
    for name in left:
        (run_dir / name).touch()
    check_run_dir(config, first=True)
    check_run_dir(replace(config, resume=False), first=True)


def test_a_directory_with_anything_else_is_no_run(config: RunConfig) -> None:
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty, and not a run"):
        check_run_dir(config, first=True)
    check_run_dir(config, first=False)


def test_a_run_goes_on_with_the_same_settings_on_other_machines(config: RunConfig) -> None:
    """How many processes there are, and what they keep in memory, changes no result."""
    Path(config.run_dir).mkdir()
    write_config(config)
    check_run_dir(config, first=True)
    trainer = replace(config.trainer, strategy="zero3", devices=2)
    parent = replace(config.parent, activation_checkpointing=True)
    check_run_dir(replace(config, trainer=trainer, parent=parent), first=True)
    with pytest.raises(ConfigError, match="seed=7: .* was started with 0; must be that"):
        check_run_dir(replace(config, seed=7), first=True)
    with pytest.raises(ConfigError, match="parent.kernels=torch: .* was started with auto"):
        check_run_dir(replace(config, parent=replace(parent, kernels="torch")), first=True)
    with pytest.raises(ConfigError, match="resume=false: .* is not empty"):
        check_run_dir(replace(config, resume=False), first=True)


def with_budgets(config: RunConfig, **budgets: float) -> RunConfig:
    """The same, with these budgets, of which every draw trains one, all alike."""
    stages = config.curriculum.stages.items()
    curriculum = CurriculumConfig(
        stages={
            name: replace(stage, budget_probabilities=None, budgets_per_batch=1)
            for name, stage in stages
        }
    )
    named = {name: BudgetConfig(params=params) for name, params in budgets.items()}
    return replace(config, curriculum=curriculum, budgets=named)


@pytest.mark.parametrize(
    ("before", "now", "what"),
    [
        (
            {},
            {"tiny": 0.4},
            "budgets.tiny={params: 0.4}: RUN was started without th",
        ),
        (
            {"tiny": 0.4},
            {},
            "budgets.tiny is not set: RUN was started with {params: 0.4}; must be th",
        ),
        ({"tiny": 0.4}, {"tiny": 0.3}, "budgets.tiny.params=0.3: RUN was started with 0.4; must b"),
    ],
    ids=["added", "removed", "changed"],
)
def test_a_refusal_says_what_was_set_and_what_was_not(
    before: dict[str, float], now: dict[str, float], what: str, config: RunConfig
) -> None:
    Path(config.run_dir).mkdir()
    write_config(with_budgets(config, full=1.0, **before))
    with pytest.raises(ConfigError) as refused:
        check_run_dir(with_budgets(config, full=1.0, **now), first=True)
    assert str(refused.value).startswith(what.replace("RUN", f"run_dir={config.run_dir}"))
    assert str(refused.value).endswith("or choose another run_dir")


def test_null_is_a_value_like_another(config: RunConfig) -> None:
    Path(config.run_dir).mkdir()
    write_config(config)
    space = replace(config.space, ffn=None)
    with pytest.raises(ConfigError, match=r"space.ffn=null: .* was started with \[512, .*"):
        check_run_dir(replace(config, space=space), first=True)
    write_config(replace(config, space=space))
    with pytest.raises(ConfigError, match=r"space.ffn=\[512, .*: .* was started with null"):
        check_run_dir(config, first=True)
