"""One run of a study: train, and measure every member by document."""

import logging
import os
import shutil
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic import load
from elastic.config import RunConfig, StudySettings
from elastic.data import open_prepared
from elastic.evaluate.documents import report_text, stock_logits, sums_by_document
from elastic.parent.weights import load_parent
from elastic.plan.training import stage_work
from elastic.routing.curriculum import plan
from elastic.storage.manifest import Manifest
from elastic.study.families import untrained_members

BATCH_TOKENS = 4096
"""Of a forward pass that measures."""


@dataclass(frozen=True)
class Task:
    """What a process gets to do."""

    config: RunConfig
    parent: Path
    study: StudySettings
    threads: int | None


def answer(end: Connection, task: Task) -> None:
    """A process' work: send the record, or the error that stopped it."""
    try:
        end.send(carry_out(task))
    except Exception as error:
        logging.getLogger(__name__).exception("stopped")
        end.send(error)


def carry_out(task: Task) -> dict[str, Any]:
    """Train and measure; the run's directory is gone afterwards. Returns the record but for whose
    it is, as JSON.

    A process of its own runs it: threads and log belong to it.
    """
    from elastic.training.launch import launch

    if task.threads is not None:
        torch.set_num_threads(task.threads)
    run_dir = Path(task.config.run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".log").open("a") as file:  # bars and warnings would mix with others'
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("elastic").setLevel(logging.INFO)
    start = time.monotonic()
    directory = launch(task.config)
    seconds = time.monotonic() - start
    record = measure(task, directory) | {"seconds": round(seconds, 1)}
    shutil.rmtree(run_dir)
    return record


def measure(task: Task, directory: Path) -> dict[str, Any]:
    """Figures of a finished run: of the parent, and of every member, by document."""
    run_dir, study = Path(task.config.run_dir), task.study
    text = report_text(
        open_prepared(task.config.data, run_dir),
        "report",
        study.sequences,
        study.sequence_length,
        max(1, BATCH_TOKENS // study.sequence_length),
    )
    parent, manifest = load_parent(task.parent), Manifest.read(directory)
    models = [stock_logits(load(directory, name, torch.float32)) for name in manifest.budgets]
    original, *found = sums_by_document([parent.logits, *models], parent.logits, text)
    members = {
        budget: {
            "params": member.params,
            "architecture": member.architecture.to_json(),
            "decision": member.decision,
            "loss": _digits(sums.loss),
            "kl": _digits(sums.kl),
        }
        for (budget, member), sums in zip(manifest.budgets.items(), found, strict=True)
    }
    architectures = {name: each.architecture for name, each in manifest.budgets.items()}
    stages = plan(task.config.curriculum.stages, task.config.trainer)
    more = {}
    if task.study.families and not task.config.members_given:
        more["untrained"] = untrained_members(task.config, task.parent)
    work = [stage_work(task.config, parent.shape, stage, architectures) for stage in stages]
    return {
        "tokens": sum(stage.tokens for stage in stages),
        "student_flops": sum(each.forward + each.backward for each in work),
        "teacher_flops": sum(each.teacher for each in work),
        "documents": original.tokens.astype(int).tolist(),
        "parent": {"loss": _digits(original.loss)},
        "members": members,
        "drop_order": manifest.ranking["drop_order"],
        **more,
    }


def _digits(values: np.ndarray) -> list[float]:
    """With the digits that float32 has."""
    return [float(f"{value:.7g}") for value in values]
