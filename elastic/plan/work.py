"""A configuration -> everything that is planned, as JSON."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elastic.config import AXES, ConfigError, ParentShape, PlanConfig
from elastic.config.training import STRATEGIES
from elastic.members.architecture import AXIS_KIND, Architecture, Space
from elastic.members.cost import parameters
from elastic.members.search import check_reachable, targets_of
from elastic.plan.family import (
    Reach,
    architecture_of,
    assumed_drop_order,
    describe_member,
    reachable,
)
from elastic.plan.fit import Fit, Fitter, Setup
from elastic.plan.memory import on_gpu, ranking_memory
from elastic.plan.training import SCRATCH_TOKENS, SEPARATE_TOKENS, gpu_hours, stage_work
from elastic.routing.curriculum import check_budgets, plan


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """What the run would do.

    Raises:
        ConfigError: a target that no member reaches, or settings that the run would refuse.
    """
    shape = find_shape(config)
    space = Space.build(config.space, shape)
    targets = targets_of(config.budgets, shape)
    full = parameters(shape, Architecture.full(shape))
    check_budgets(config.curriculum.stages, targets, full, config.objective.teacher == "in_place")
    nested, tolerance = config.space.nested, config.space.tolerance
    check_reachable(space, targets, config.importance, tolerance, nested)
    order = assumed_drop_order(space, config.importance)
    reach = reachable(space, order, targets, tolerance, nested)
    members = {
        name: architecture_of(space, order, found.balanced or _nearest(found))
        for name, found in reach.items()
        if found.candidates
    }
    # A budget that only layer-by-layer sizes reach runs as the parent here: an upper bound.
    everyone = {name: members.get(name, Architecture.full(shape)) for name in targets}
    return {
        "name": config.name,
        "device": "GPU" if on_gpu(config) else "process",
        "settings": asdict(config.plan),
        "family": _family(config, shape, space, reach, members),
        "training": _training(config, shape, everyone),
        "memory": _memory(config, shape, space, everyone),
    }


def find_shape(config: PlanConfig) -> ParentShape:
    """Sizes of the parent: those announced, else those in config.json. No weights are read."""
    if config.parent.shape is not None:
        return config.parent.shape
    assert config.parent.path is not None
    from elastic.parent.stock import read_config, read_shape  # takes torch along

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


def _nearest(found: Reach) -> Any:
    return min(found.candidates, key=lambda c: abs(c.params - found.target))


def _family(
    config: PlanConfig,
    shape: ParentShape,
    space: Space,
    reach: Mapping[str, Reach],
    members: Mapping[str, Architecture],
) -> dict[str, Any]:
    settings = config.plan
    budgets: dict[str, Any] = {}
    for name, found in reach.items():
        entry: dict[str, Any] = {
            "target": found.target,
            "homogeneous_members": len(found.candidates),
        }
        if name in members:
            member = members[name]
            entry["balanced"] = found.balanced is not None
            entry |= describe_member(shape, member, settings.contexts, settings.batch)
            entry["sizes"] = _sizes(space, member)
            entry["ranges"] = {axis: found.range_of(axis) for axis in space.elastic_axes}
        budgets[name] = entry
    full = parameters(shape, Architecture.full(shape))
    separate = sum(2 * (entry.get("parameters") or entry["target"]) for entry in budgets.values())
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


def _sizes(space: Space, member: Architecture) -> dict[str, Any]:
    """Size on every axis of a homogeneous member, and how many layers of each kind."""
    sizes: dict[str, Any] = {axis: space.choices[axis][0] for axis in AXES}
    sizes |= {"hidden": member.hidden_size, "depth": len(member.layers)}
    fields = {"ffn": "intermediate_size", "mamba_head_dim": "head_dim"}
    for axis, kind in AXIS_KIND.items():
        of_kind = [layer for layer in member.layers if layer.kind == kind]
        if of_kind:
            sizes[axis] = getattr(of_kind[0], fields.get(axis, "num_heads"))
    return sizes | {"layers": dict(Counter(layer.kind for layer in member.layers))}


def _training(
    config: PlanConfig, shape: ParentShape, members: Mapping[str, Architecture]
) -> dict[str, Any]:
    stages = []
    for stage in plan(config.curriculum.stages, config.trainer, list(members)):
        work = stage_work(config, shape, stage, members)
        hours = gpu_hours(config, work.flops)
        stages.append(
            asdict(work) | {"mode": stage.config.mode, "flops": work.flops, "gpu_hours": hours}
        )
    elastic = sum(stage["tokens"] for stage in stages if stage["mode"] == "elastic")
    hours = sum(stage["gpu_hours"] for stage in stages)
    return {
        "stages": stages,
        "gpus": config.trainer.world_size,
        "tokens": sum(stage["tokens"] for stage in stages),
        "elastic_tokens": elastic,
        "flops": sum(stage["flops"] for stage in stages),
        "gpu_hours": hours,
        "days": hours / config.trainer.world_size / 24,
        "separate_tokens": SEPARATE_TOKENS,
        "scratch_tokens": SCRATCH_TOKENS,
        "separate_over_elastic": SEPARATE_TOKENS / elastic,
        "scratch_over_elastic": SCRATCH_TOKENS / elastic,
    }


def _memory(
    config: PlanConfig,
    shape: ParentShape,
    space: Space,
    members: Mapping[str, Architecture],
) -> dict[str, Any]:
    fitter = Fitter(config, shape, space, members)
    configured = fitter.configured
    counts = sorted({configured.gpus, *(config.plan.gpus if on_gpu(config) else [])})
    return {
        "limit_bytes": fitter.limit,
        "precision": config.trainer.precision,
        "parameters": fitter.parameters,
        "configured": _row(fitter, configured),
        "ranking_bytes": ranking_memory(config, shape),
        "gpus": [_count(fitter, replace(configured, gpus=count)) for count in counts],
    }


def _count(fitter: Fitter, setup: Setup) -> dict[str, Any]:
    """All strategies on one number of GPUs."""
    rows = []
    for strategy in STRATEGIES:
        if strategy == "single" and setup.gpus > 1:
            continue
        for offload in (False, True) if strategy.startswith("zero") else (False,):
            rows.append(_row(fitter, replace(setup, strategy=strategy, offload=offload)))
    entry: dict[str, Any] = {"gpus": setup.gpus, "rows": rows, "stages": []}
    try:
        config = fitter.settings(replace(setup, strategy="zero2", checkpointing=True))
    except ConfigError:
        return entry
    for stage in fitter.stages(config):
        passes = {}
        for checkpointing in (True, False):
            shown = replace(setup, strategy="zero2", offload=False, checkpointing=checkpointing)
            found = fitter.fit(shown).passes[stage.name]
            worst = max(found.values(), key=lambda one: one.peak)
            passes["checkpointed" if checkpointing else "all"] = {
                "activations": worst.activations,
                "peak": worst.peak,
                "worst": worst.worst,
            }
        loss = max(one.loss for one in found.values())
        entry["stages"].append(
            {
                "name": stage.name,
                "sequence_length": stage.config.sequence_length,
                "sequences_per_pass": stage.batch_sequences,
                "passes_per_step": stage.accumulation,
                "loss": loss,
                **passes,
            }
        )
    return entry


def _row(fitter: Fitter, setup: Setup) -> dict[str, Any]:
    """One setup: parts, peaks, a verdict and, where it does not fit, what would."""
    entry: dict[str, Any] = asdict(setup)
    try:
        found = fitter.fit(setup)
    except ConfigError as error:
        return entry | {"refused": str(error), "change": fitter.smallest_change(setup)}
    entry["parts"] = asdict(found.static)
    entry["stages"] = {stage: found.stage_peak(stage) for stage in found.passes}
    entry["other"] = _other(fitter, setup)
    entry |= {"peak": found.peak, "worst": found.worst, "fits": found.fits}
    entry["host"] = fitter.host(setup)
    if not found.fits:
        entry["change"] = fitter.smallest_change(setup)
    return entry


def _other(fitter: Fitter, setup: Setup) -> dict[str, float] | None:
    """Peaks by stage with checkpointing the other way round, where that is allowed."""
    try:
        found: Fit = fitter.fit(replace(setup, checkpointing=not setup.checkpointing))
    except ConfigError:
        return None
    return {stage: found.stage_peak(stage) for stage in found.passes}
