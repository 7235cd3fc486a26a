"""An arm and a seed -> the runs that it takes, as settings of `elastic train`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.config import CONF, ConfigError, ParentShape, RunConfig, StudySettings, parse
from elastic.members.architecture import Architecture, Space
from elastic.members.balanced import balanced_family
from elastic.members.targets import targets_of
from elastic.storage.files import digest

NO_RATE = 1e-12
"""Peak rate of a run that is to change nothing."""


@dataclass(frozen=True)
class Job:
    """One run of an arm, whose members are measured."""

    arm: str
    seed: int
    alone: str | None
    """The budget that is trained by itself; None where all are trained together."""
    raw: dict[str, Any]
    """Settings of the run but for `run_dir`, before the gate."""

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.arm}-{self.seed}" + ("" if self.alone is None else f"-{self.alone}")

    def config(self, run_dir: Path) -> RunConfig:
        """Through the gate."""
        return parse({**self.raw, "run_dir": str(run_dir)}, RunConfig)

    def key(self, parent: str, study: StudySettings) -> str:
        """Hash of all that its figures depend on: settings, the parent's weights (`parent`, a
        checksum), and what is measured. Where things lie, and who watches, is none of it."""
        settings = {n: v for n, v in self.raw.items() if n not in ("run_dir", "logger", "trainer")}
        settings["parent"] = parent
        measured = [study.sequences, study.sequence_length, study.families > 0]
        return digest([settings, self.raw["trainer"]["precision"], measured])


def composed(settings: Sequence[str]) -> dict[str, Any]:
    """What `elastic train` would read of a command line, as plain values before the gate."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    with ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # else the command's own search path
            stack.enter_context(initialize_config_dir(str(CONF), version_base="1.3"))
        raw = OmegaConf.to_container(compose("train", list(settings)), resolve=True)
    assert isinstance(raw, dict)
    return {str(name): value for name, value in raw.items() if name != "hydra"}


def parent_settings(study: StudySettings, run_dir: Path) -> RunConfig:
    """The run that trains the parent: its elastic stages are a step each, at no rate and with draws
    that are always the same, so that a change of these is no reason to train it again.

    Raises:
        ConfigError: the experiment trains none.
    """
    raw = composed([f"experiment={study.experiment}", *study.settings, f"run_dir='{run_dir}'"])
    pretrains = len(_elastic(raw)) < len(raw["curriculum"]["stages"])
    if raw["parent"].get("path") is not None or not pretrains:
        raise ConfigError(
            f"study.experiment={study.experiment}: must train its own parent, in a stage of mode "
            "pretrain"
        )
    for stage in _elastic(raw).values():
        stage |= {
            "tokens": stage["batch_tokens"],
            "warmup_steps": 0,
            "model_lr": NO_RATE,
            "draws": 1,
            "budgets_per_batch": 1,
            "budget_probabilities": None,
        }
    return parse(raw, RunConfig)


def _elastic(raw: dict[str, Any]) -> dict[str, Any]:
    stages = raw["curriculum"]["stages"].items()
    return {name: stage for name, stage in stages if stage.get("mode", "elastic") == "elastic"}


def jobs_of(
    study: StudySettings,
    name: str,
    seed: int,
    parent: Path,
    family: Mapping[str, Mapping[str, Any]] | None,
    drop_order: Sequence[int] = (),
) -> list[Job]:
    """The runs of an arm and a seed.

    Args:
        parent: directory of the parent's checkpoint.
        family: what the first arm has frozen with this seed, budget -> entry of elastic.json,
            largest first; None for that arm itself.
        drop_order: layers, the least important first, as that arm has ranked them.

    Raises:
        ConfigError: a setting of the arm that `elastic train` would refuse.
    """
    arm = study.arms[name]
    raw = composed(
        [
            f"experiment={study.experiment}",
            *study.settings,
            *arm.settings,
            f"seed={seed}",
            "data.tokenizer=parent",
            f"parent.path='{parent}'",
        ]
    )
    raw["curriculum"]["stages"] = {
        stage: _shortened(settings, study.share * arm.share)
        for stage, settings in _elastic(raw).items()
    }
    if not arm.trained:
        _leave_untrained(raw)
    if family is None:
        return [Job(name, seed, None, raw)]
    if not arm.each_alone:
        if arm.family_of is not None:
            raw["budgets"] = _all_given(family)
        if arm.balanced:
            raw["budgets"] = _all_given(_balanced(raw, drop_order))
        return [Job(name, seed, None, raw)]
    whole = _whole(raw)
    smaller = [budget for budget, entry in family.items() if entry != whole]
    return [Job(name, seed, b, _alone(raw, b, family[b], len(smaller))) for b in smaller]


def family_job(
    study: StudySettings, label: str, seed: int, parent: Path, family: Mapping[str, Any]
) -> Job:
    """The first arm with a family that is given, called `label`."""
    (job,) = jobs_of(study, study.run[0], seed, parent, None)
    return Job(label, seed, None, job.raw | {"budgets": _all_given(family)})


def _balanced(raw: Mapping[str, Any], drop_order: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The most balanced family of a run's space: budget -> entry of elastic.json."""
    config = parse({**raw, "run_dir": "run"}, RunConfig)
    shape = _shape(config)
    space, targets = Space.build(config.space, shape), targets_of(config.budgets, shape)
    family = balanced_family(
        space, drop_order, targets, config.space.tolerance, config.space.nested
    )
    return {name: choice.architecture.to_json() for name, choice in family.items()}


def _whole(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's entry of elastic.json."""
    return Architecture.full(_shape(parse({**raw, "run_dir": "run"}, RunConfig))).to_json()


def _shape(config: RunConfig) -> ParentShape:
    assert config.parent.shape is not None, "the experiment trains its parent"
    return config.parent.shape


def _all_given(family: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {budget: _given(entry) for budget, entry in family.items()}


def _shortened(stage: dict[str, Any], share: float) -> dict[str, Any]:
    """A part of a stage, in whole steps; the warmup keeps its share."""
    steps = max(1, round(stage["tokens"] * share / stage["batch_tokens"]))
    warmup = round(stage.get("warmup_steps", 0) * share)
    return stage | {"tokens": steps * stage["batch_tokens"], "warmup_steps": warmup}


def _given(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": None, "architecture": dict(entry)}


def _alone(
    raw: dict[str, Any], budget: str, entry: Mapping[str, Any], parts: int
) -> dict[str, Any]:
    """The same run for one member: an equal part of every stage's tokens, in whole steps."""
    stages = {}
    for name, stage in raw["curriculum"]["stages"].items():
        steps = -(-stage["tokens"] // (stage["batch_tokens"] * parts))
        stages[name] = stage | {
            "tokens": steps * stage["batch_tokens"],
            "budget_probabilities": None,
            "budgets_per_batch": 1,
            "draws": 1,
        }
    curriculum = raw["curriculum"] | {"stages": stages}
    return raw | {"curriculum": curriculum, "budgets": {budget: _given(entry)}}


def _leave_untrained(raw: dict[str, Any]) -> None:
    """One step of the first stage, at no rate."""
    name, stage = next(iter(raw["curriculum"]["stages"].items()))
    stage |= {"tokens": stage["batch_tokens"], "model_lr": NO_RATE, "warmup_steps": 0}
    raw["curriculum"]["stages"] = {name: stage}
