"""Whether a run fits, with the smallest change where it does not, what it takes, and the command
that starts it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from elastic.cluster.start import start_command
from elastic.config import ImportanceConfig, PlanConfig
from elastic.plan.fit import Fitter
from elastic.plan.memory import on_gpu
from elastic.plan.ranking import ranking_memory
from elastic.plan.training import training
from elastic.routing.sizes import Sizes

SHORTEST = 256
"""Tokens of a calibration sequence below which no plan goes."""


def verdict(
    fitter: Fitter, sizes: Sizes, memory: dict[str, Any], settings: Sequence[str]
) -> dict[str, Any]:
    """As JSON; `memory` is that of `strategies.memory`, `settings` are those of the command line.

    Days, hours, cost and command are those of the run with the changes, where some make it fit;
    there is no command where none does.
    """
    config, row = fitter.config, memory["configured"]
    ranks = memory["ranking_bytes"] <= fitter.limit
    fits = bool(row.get("fits")) and ranks
    changes: list[str] | None = []
    setup = fitter.configured
    if not row.get("fits"):
        found = fitter.smallest_change(setup)
        setup, changes = found or (setup, None)
    ranking = _ranking_change(fitter)
    if changes is None or ranking is None:
        changes = None
    else:
        changes += _changed(config.importance, ranking)
        config = replace(fitter.settings(setup) if changes else config, importance=ranking)
    work = training(config, sizes, fitter.members)
    timed = on_gpu(config)
    return {
        "fits": fits,
        "gpus": row["gpus"],
        "peak_bytes": row.get("peak"),
        "limit_bytes": fitter.limit,
        "worst": row.get("worst"),
        "short_of": _short_of(fitter, memory),
        "change": None if fits else changes,
        "launched_gpus": config.trainer.world_size,
        "gpu_hours": work["gpu_hours"] if timed else None,
        "days": work["days"] if timed else None,
        "cost": work["cost"],
        "flops": work["flops"],
        "command": None
        if changes is None
        else _command(config, settings, [*changes, *_draws(fitter, config)]),
    }


def _draws(fitter: Fitter, config: PlanConfig) -> list[str]:
    """Stages with fewer draws than the settings ask for, as a command line has them."""
    asked = fitter.config.curriculum.stages
    return [
        f"curriculum.stages.{name}.draws={stage.draws}"
        for name, stage in config.curriculum.stages.items()
        if stage.draws != asked[name].draws
    ]


def _short_of(fitter: Fitter, memory: dict[str, Any]) -> list[str]:
    """Which memory does not suffice: of the `device`, of the `host`, or of the device that
    `ranking` runs on."""
    row, short = memory["configured"], []
    if "peak" in row and row["peak"] > fitter.limit:
        short.append("device")
    if "host" in row and max(row["host"].values()) > fitter.node_limit:
        short.append("host")
    if memory["ranking_bytes"] > fitter.limit:
        short.append("ranking")
    return short


def _ranking_change(fitter: Fitter) -> ImportanceConfig | None:
    """Settings with which ranking fits: smaller passes, then shorter sequences; its own if it does,
    None if nothing helps."""
    config = fitter.config
    settings = config.importance
    tries = [settings, replace(settings, batch_size=1)]
    while (length := tries[-1].sequence_length // 2) >= SHORTEST:
        depth = min(settings.depth_sequence_length, length)
        tries.append(replace(tries[-1], sequence_length=length, depth_sequence_length=depth))
    for tried in tries:
        needed = ranking_memory(replace(config, importance=tried), fitter.shape).peak
        if needed <= fitter.limit:
            return tried
    return None


def _changed(before: ImportanceConfig, after: ImportanceConfig) -> list[str]:
    """Settings that differ, as a command line has them."""
    return [
        f"importance.{name}={getattr(after, name)}"
        for name in ("batch_size", "sequence_length", "depth_sequence_length")
        if getattr(after, name) != getattr(before, name)
    ]


def _command(config: PlanConfig, settings: Sequence[str], changes: Sequence[str]) -> str:
    """The line that starts the run with the changes; `config` has them already."""
    added = [change for change in changes if "=" in change]
    if len(added) < len(changes):  # another number of GPUs
        trainer = config.trainer
        added += [f"trainer.num_nodes={trainer.num_nodes}", f"trainer.devices={trainer.devices}"]
    replaced = {change.split("=")[0] for change in added}
    kept = [
        setting
        for setting in settings
        if setting.split("=")[0] not in {*replaced, "json", "+json"}
        and not setting.lstrip("+~").startswith("plan.")
    ]
    return start_command(config.trainer, [*kept, *added])
