"""An arm becomes runs: equal tokens, the same parent and text, the members that are meant."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from elastic.config import (
    CONF,
    BudgetConfig,
    ConfigError,
    RunConfig,
    StudyConfig,
    StudySettings,
    parse,
)
from elastic.members.architecture import Architecture, Space
from elastic.members.balanced import balanced_family
from elastic.members.targets import targets_of
from elastic.routing.curriculum import budget_probabilities, plan
from elastic.study.arms import Job, composed, jobs_of, parent_settings

STUDIES = ("main", "quick", "ablations", "brute")


def study_of(name: str = "main", *overrides: str) -> StudySettings:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose("study", [f"study={name}", *overrides])
    return parse(raw, StudyConfig).study


TINY = study_of("quick")
SMALLER = {
    name: {"hidden_size": width, "layers": [{"index": 1, "kind": "mlp", "intermediate_size": 512}]}
    for name, width in (("medium", 112), ("small", 88))
}


def family_of(study: StudySettings = TINY) -> dict[str, dict[str, Any]]:
    """The whole parent and two members."""
    raw = composed([f"experiment={study.experiment}", "run_dir=r"])
    shape = parse(raw, RunConfig).parent.shape
    assert shape is not None
    return {"full": Architecture.full(shape).to_json(), **SMALLER}


PARENT = Path("somewhere/parent")
ORDER = [5, 8, 2]
"""Layers of the small parent, the least important first."""


def trained_tokens(config: RunConfig) -> int:
    """Tokens of all stages, in whole steps."""
    return sum(s.tokens for s in plan(config.curriculum.stages, config.trainer))


def configs(name: str, seed: int = 3, study: StudySettings = TINY) -> list[RunConfig]:
    family = None if name == study.run[0] else family_of(study)
    return [job.config(Path("r")) for job in jobs_of(study, name, seed, PARENT, family, ORDER)]


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_every_study_passes_the_gate(name: str) -> None:
    study = study_of(name)
    for arm in study.run:
        for config in configs(arm, study=study):
            assert config.seed == 3 and config.parent.path == str(PARENT)
            assert all(stage.mode == "elastic" for stage in config.curriculum.stages.values())


def test_the_first_arm_is_the_experiment_without_its_pretraining() -> None:
    (found,) = configs("elastic")
    wanted = parse(composed(["experiment=tiny", "seed=3", "run_dir=r"]), RunConfig)
    pretrain, *stages = wanted.curriculum.stages
    assert list(found.curriculum.stages) == stages
    assert found.curriculum.stages["short"] == wanted.curriculum.stages["short"]
    for part in ("budgets", "space", "importance", "norms", "router", "objective", "optim"):
        assert getattr(found, part) == getattr(wanted, part)
    assert not found.members_given


def test_members_alone_share_the_tokens_of_one_elastic_run() -> None:
    """Every stage keeps its length, batch and rates; each is one member with its own norms."""
    (together,) = configs("elastic")
    alone = configs("separate")
    assert [list(config.budgets) for config in alone] == [["medium"], ["small"]]
    assert sum(map(trained_tokens, alone)) == trained_tokens(together)
    for config, budget in zip(alone, ("medium", "small"), strict=True):
        assert config.budgets[budget].architecture == SMALLER[budget]
        assert config.norms.own and config.importance == together.importance
        for name, stage in config.curriculum.stages.items():
            whole = asdict(together.curriculum.stages[name])
            changed = {k for k, value in asdict(stage).items() if value != whole[k]}
            assert changed <= {"tokens", "draws", "budgets_per_batch", "budget_probabilities"}
    no_whole = jobs_of(TINY, "separate", 3, PARENT, SMALLER)
    assert [job.alone for job in no_whole] == ["medium", "small"]
    published = configs("separate_sorted", study=study_of("main"))
    assert all(c.importance.hidden == "sort" and not c.norms.own for c in published)


def test_an_arm_may_have_other_tokens_than_the_rest() -> None:
    study = study_of("ablations", "study.share=0.5")
    once, twice = (
        sum(map(trained_tokens, configs(name, study=study)))
        for name in ("separate", "separate_double")
    )
    assert twice == 2 * once


@pytest.mark.parametrize(("name", "count"), [("two_members", 2), ("four_members", 4)])
def test_arms_of_more_and_fewer_members_draw_all_of_them(name: str, count: int) -> None:
    (config,) = configs(name, study=study_of("quick", f"study.run=[elastic,{name}]"))
    assert len(config.budgets) == count
    for stage in config.curriculum.stages.values():
        assert len(budget_probabilities(stage, list(config.budgets))) == count


def test_an_arm_may_train_the_family_of_the_first() -> None:
    (config,) = configs("fixed", study=study_of("quick", "study.run=[elastic,fixed]"))
    given = {name: budget.architecture for name, budget in config.budgets.items()}
    assert given == family_of() and config.members_given


def test_a_uniform_shrink_is_the_most_balanced_family_of_the_arms_own_space() -> None:
    """Its layers drop in the order that the first arm has found."""
    study = study_of("ablations", "study.experiment=small")
    (job,) = jobs_of(study, "uniform", 3, PARENT, family_of(study), ORDER)
    config = job.config(Path("r"))
    shape = config.parent.shape
    assert config.members_given and shape is not None
    space, targets = Space.build(config.space, shape), targets_of(study_budgets(study), shape)
    limits = config.space.tolerance, config.space.nested
    expected = balanced_family(space, ORDER, targets, *limits)
    given = {name: budget.architecture for name, budget in config.budgets.items()}
    assert given == {name: choice.architecture.to_json() for name, choice in expected.items()}
    kept = {layer["index"] for layer in given["small"]["layers"]}
    assert not kept & set(ORDER[: 14 - len(kept)])


def study_budgets(study: StudySettings) -> dict[str, BudgetConfig]:
    raw = composed([f"experiment={study.experiment}", "run_dir=r"])
    return parse(raw, RunConfig).budgets


def test_members_from_scratch_have_the_same_teacher_and_tokens_as_separate_ones() -> None:
    study = study_of("ablations", "study.run=[elastic,separate,scratch]")
    for scratch, separate in zip(
        configs("scratch", study=study), configs("separate", study=study), strict=True
    ):
        assert scratch.curriculum.start == "random" and separate.curriculum.start == "parent"
        assert scratch.curriculum.stages == separate.curriculum.stages
        assert scratch.budgets == separate.budgets and scratch.objective == separate.objective


def test_the_untrained_arm_takes_a_step_that_changes_nothing() -> None:
    (config,) = configs("untrained")
    (stage,) = config.curriculum.stages.values()
    assert stage.tokens == stage.batch_tokens and stage.model_lr < 1e-9


def test_the_parent_is_trained_by_the_experiments_own_pretraining() -> None:
    found = parent_settings(TINY, Path("p"))
    wanted = parse(composed(["experiment=tiny", "run_dir=p"]), RunConfig)
    assert found.curriculum.stages["pretrain"] == wanted.curriculum.stages["pretrain"]
    for name in ("short", "long"):
        stage = found.curriculum.stages[name]
        assert stage.tokens == stage.batch_tokens
    other = study_of(
        "quick",
        'study.settings=["curriculum.stages.short.model_lr=2e-4","curriculum.stages.long.draws=2"]',
    )
    assert parent_settings(other, Path("p")) == found, "nothing that the parent would notice"


def test_an_experiment_that_trains_no_parent_is_refused() -> None:
    study = study_of("quick", "study.experiment=nano_v2_12b")
    line = "^study.experiment=nano_v2_12b: must train its own parent"
    with pytest.raises(ConfigError, match=line):
        parent_settings(study, Path("p"))


def key(job: Job, study: StudySettings = TINY, parent: str = "x") -> str:
    return job.key(parent, study)


def test_figures_are_found_again_by_what_they_depend_on_alone(tmp_path: Path) -> None:
    (job,) = jobs_of(TINY, "elastic", 0, PARENT, None)
    (moved,) = jobs_of(TINY, "elastic", 0, tmp_path, None)
    assert key(job) == key(moved)
    others = [
        jobs_of(TINY, "elastic", 1, PARENT, None)[0],
        *jobs_of(TINY, "separate", 0, PARENT, family_of()),
        *jobs_of(TINY, "untrained", 0, PARENT, family_of()),
        *jobs_of(TINY, "all_budgets", 0, PARENT, family_of()),
    ]
    longer = study_of("quick", "study.sequences=9")
    judged = study_of("quick", "study.run=[elastic]", "study.families=4")
    keys = [key(job), key(job, parent="y"), key(job, longer), key(job, judged), *map(key, others)]
    assert len(set(keys)) == len(keys)
    assert json.dumps(job.raw)  # plain values


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("study.run=[elastic,nothing]", "study.run=nothing: must be one of elastic, separate"),
        ("study.run=[]", "study.run=[]: must be at least one arm"),
        ("study.run=[elastic,elastic]", "study.run="),
        ("study.seeds=[1,1]", "study.seeds=[1, 1]: must be different from one another"),
        ("study.run=[separate,elastic]", "study.arms.separate=each_alone: must be without"),
        ("study.run=[published,fixed]", "study.arms.fixed.family_of=elastic: must be null, or"),
        (
            "+study={arms:{fixed:{balanced:true}},run:[elastic,fixed]}",
            "study.arms.fixed.balanced=True: must be false with family_of",
        ),
        ("study.run=[uniform]", "study.arms.uniform=balanced: must be without these"),
        ("jobs=0", "jobs=0: must be positive"),
    ],
)
def test_a_study_that_cannot_be_is_refused(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        study_of("quick", override)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
