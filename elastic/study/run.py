"""One run of a study: train, and measure every member by document."""

import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic import load
from elastic.config import RunConfig, StudySettings
from elastic.data import load_tokenizer, load_tokens
from elastic.evaluate.documents import ReportText, Sums, report_text, sums_by_document
from elastic.parent.weights import load_parent
from elastic.plan.training import stage_work
from elastic.routing.curriculum import plan
from elastic.storage.manifest import Manifest
from elastic.study.arms import trained_tokens
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


def report_of(task: Task, run_dir: Path) -> ReportText:
    """The text that all runs of a study are measured on: that of any of them."""
    study = task.study
    return report_text(
        load_tokens(run_dir / "data" / "report.npy"),
        load_tokenizer(run_dir / "data" / "tokenizer").eos_token_id,
        study.sequences,
        study.sequence_length,
        max(1, BATCH_TOKENS // study.sequence_length),
    )


def measure(task: Task, directory: Path) -> dict[str, Any]:
    """Figures of a finished run: of the parent, and of every member, by document."""
    text = report_of(task, Path(task.config.run_dir))
    parent = load_parent(task.parent)
    shape = parent.shape
    original = sums_by_document(parent.logits, parent.logits, text)
    manifest = Manifest.read(directory)
    members: dict[str, Any] = {}
    for budget, member in manifest.budgets.items():
        model = load(directory, budget, dtype=torch.float32)
        sums = sums_by_document(partial(_logits, model), parent.logits, text)
        members[budget] = {
            "params": member.params,
            "architecture": member.architecture.to_json(),
            "decision": member.decision,
            **by_document(sums),
        }
    architectures = {name: each.architecture for name, each in manifest.budgets.items()}
    stages = plan(task.config.curriculum.stages, task.config.trainer, list(architectures))
    more = {}
    if task.study.families and not task.config.members_given:
        more["untrained"] = untrained_members(task.config, task.parent)
    work = [stage_work(task.config, shape, stage, architectures) for stage in stages]
    return {
        "tokens": trained_tokens(task.config),
        "student_flops": sum(each.forward + each.backward for each in work),
        "teacher_flops": sum(each.teacher for each in work),
        "documents": original.tokens.astype(int).tolist(),
        "parent": by_document(original),
        "members": members,
        **more,
    }


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def by_document(sums: Sums) -> dict[str, list[float]]:
    """Sums of loss and KL, in nats, with the digits that float32 has."""
    return {
        name: [float(f"{value:.7g}") for value in values]
        for name, values in asdict(sums).items()
        if name != "tokens" and isinstance(values, np.ndarray)
    }
