"""Text of a run -> what a stage reads, and what the parent is ranked on."""

import torch
from torch import Tensor

from elastic.data import PackedTokens, TextDataModule
from elastic.routing.curriculum import Stage
from elastic.training.setup import Setup


def stage_text(setup: Setup, stage: Stage, start_micro_step: int) -> TextDataModule:
    """Training and validation text of a stage, from one of its micro-batches on.

    Raises:
        ConfigError: the text is shorter than one sequence of the stage.
    """
    return TextDataModule(
        setup.data.train,
        setup.data.validation,
        sequence_length=stage.config.sequence_length,
        batch_sequences=stage.batch_sequences,
        validation_sequences=setup.config.data.validation_sequences,
        validation_batch=stage.batch_sequences,
        seed=setup.config.seed,
        stage_name=stage.name,
        repeats=stage.passes,
        start_micro_step=start_micro_step,
        rank=setup.place.rank,
        world_size=setup.place.world_size,
        vocabulary=setup.shape.vocab_size,
    )


def calibration_text(setup: Setup) -> Tensor:
    """Calibration sequences (samples, t) int64, spread evenly over the training text.

    Raises:
        ConfigError: the text is shorter than one of them, or has a token that the parent lacks.
    """
    settings = setup.config.importance
    windows = PackedTokens(
        setup.data.train,
        settings.sequence_length,
        setting="importance.sequence_length",
        text="training text",
        vocabulary=setup.shape.vocab_size,
    )
    count = min(max(settings.samples, settings.depth_samples), len(windows))
    return torch.stack([windows[i * len(windows) // count][:-1] for i in range(count)])
