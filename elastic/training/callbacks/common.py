"""What several callbacks need of a module and of its last pass."""

from typing import Any

import lightning as L
from torch import Tensor

from elastic.data import Batch
from elastic.training.module import ElasticModule

Outputs = dict[str, Any]
"""What a training step returns."""


def log_row(trainer: L.Trainer, module: ElasticModule, metrics: dict[str, float]) -> None:
    """Write a row; its step counts over all stages."""
    row = metrics | {"stage": module.stage.index}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=module.stage.steps_before + module.step)


def new_tokens(trainer: L.Trainer, module: ElasticModule, batch: Batch) -> int:
    """Tokens of text, over all processes, that the last pass has finished with."""
    finished = module.micro_step % module.stage.passes == 0
    return batch.inputs.numel() * trainer.world_size if finished else 0


def loss_of(module: ElasticModule, outputs: Outputs) -> Tensor:
    """A pass' own loss: before its weight, and before Lightning divided it."""
    loss: Tensor = outputs["loss"].detach() * (module.stage.accumulation / outputs["weight"])
    return loss
