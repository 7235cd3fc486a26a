"""A configuration -> everything that is planned, as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastic.config import ConfigError, ParentShape, PlanConfig
from elastic.members.architecture import Architecture
from elastic.members.balanced import balanced_family
from elastic.members.cost import parameters
from elastic.parent.stock import read_config, read_shape
from elastic.plan.family import describe_member, ranges_of, sizes_of, within_tolerance
from elastic.plan.fit import Fitter
from elastic.plan.memory import on_gpu
from elastic.plan.preparing import preparing
from elastic.plan.strategies import memory
from elastic.plan.training import training
from elastic.plan.verdict import verdict
from elastic.routing.sizes import Sizes, check_sizes


def make_plan(config: PlanConfig, settings: Sequence[str] = ()) -> dict[str, Any]:
    """What the run would do; `settings` are those of the command line, for the command to launch.

    Raises:
        ConfigError: a target that no member reaches, or settings that the run would refuse.
    """
    shape = find_shape(config)
    parts = config.space, config.budgets, config.importance, config.curriculum.stages
    sizes = check_sizes(shape, *parts, in_place=config.objective.teacher == "in_place")
    limits = config.space.tolerance, config.space.nested
    members = sizes.given
    if not members:
        chosen = balanced_family(sizes.space, sizes.drop_order, sizes.targets, *limits)
        members = {name: choice.architecture for name, choice in chosen.items()}
    fitter = Fitter(config, shape, sizes.space, members)
    amounts = memory(fitter)
    return {
        "name": config.name,
        "device": "GPU" if on_gpu(config) else "process",
        "settings": asdict(config.plan),
        "verdict": verdict(fitter, sizes, amounts, settings),
        "family": _family(config, shape, sizes, members),
        "memory": amounts,
        "training": training(config, sizes, members),
        "preparing": preparing(config, shape),
    }


def find_shape(config: PlanConfig) -> ParentShape:
    """Sizes of the parent: parent.shape, else those in config.json. No weights are read."""
    if config.parent.shape is not None:
        return config.parent.shape
    assert config.parent.path is not None
    directory = Path(config.parent.path)
    if not directory.is_dir():
        directory = _download(config.parent.path)
    return read_shape(read_config(directory))


def _download(name: str) -> Path:
    """Directory with the config.json of a hub repository, and nothing else of it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"parent.path={name}: neither a local directory nor a hub repository whose config.json "
            f"can be downloaded ({type(error).__name__}); or set parent.shape"
        ) from error


def _family(
    config: PlanConfig, shape: ParentShape, sizes: Sizes, members: Mapping[str, Architecture]
) -> dict[str, Any]:
    settings, space = config.plan, sizes.space
    found = within_tolerance(space, sizes.drop_order, sizes.targets, config.space.tolerance)
    budgets: dict[str, Any] = {}
    for name, member in members.items():
        alike = found[name]
        budgets[name] = {
            "target": {g.measure.unit: g.value for g in sizes.targets[name].goals},
            "homogeneous_members": len(alike),
            "ranges": ranges_of(space, alike) if alike else None,
            "sizes": sizes_of(space, member),
        } | describe_member(shape, member, settings.contexts, settings.batch)
    full = parameters(shape, Architecture.full(shape))
    separate = sum(entry["weight_bytes"] for entry in budgets.values())
    return {
        "parent": {"parameters": full, "pattern": shape.pattern},
        "tolerance": config.space.tolerance,
        "nested": config.space.nested,
        "heterogeneous": sorted(space.heterogeneous),
        "choices": {axis: list(space.choices[axis]) for axis in space.elastic_axes},
        "budgets": budgets,
        "one_checkpoint_bytes": 2 * full,
        "separate_checkpoints_bytes": separate,
    }
