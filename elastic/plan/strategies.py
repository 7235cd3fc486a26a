"""Every strategy on every number of GPUs: parts, peaks, verdicts and what would help, as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from elastic.config import ConfigError
from elastic.config.training import STRATEGIES
from elastic.plan.fit import GIB, Fitter, Setup
from elastic.plan.memory import on_gpu
from elastic.plan.ranking import ranking_memory


def memory(fitter: Fitter) -> dict[str, Any]:
    """The configured setup, and all others beside it."""
    config, configured = fitter.config, fitter.configured
    counts = sorted({configured.gpus, *(config.plan.gpus if on_gpu(config) else [])})
    return {
        "limit_bytes": fitter.limit,
        "node_bytes": config.plan.node_gib * GIB,
        "precision": config.trainer.precision,
        "parameters": fitter.parameters,
        "configured": _row(fitter, configured),
        "ranking_bytes": ranking_memory(config, fitter.shape).peak,
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
        return entry | {"refused": str(error), "change": _names(fitter, setup)}
    entry["parts"] = asdict(found.static)
    entry["stages"] = {stage: found.stage_peak(stage) for stage in found.passes}
    entry["other"] = _other(fitter, setup)
    entry |= {"peak": found.peak, "worst": found.worst, "fits": found.fits}
    entry["host"] = dict(found.host)
    if not found.fits:
        entry["change"] = _names(fitter, setup)
    return entry


def _names(fitter: Fitter, setup: Setup) -> list[str] | None:
    found = fitter.smallest_change(setup)
    return None if found is None else found[1]


def _other(fitter: Fitter, setup: Setup) -> Mapping[str, float] | None:
    """Peaks by stage with checkpointing the other way round, where that is allowed."""
    try:
        found = fitter.fit(replace(setup, checkpointing=not setup.checkpointing))
    except ConfigError:
        return None
    return {stage: found.stage_peak(stage) for stage in found.passes}
