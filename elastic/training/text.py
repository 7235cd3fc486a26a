"""Text of a run -> what a stage reads, and what the parent is ranked on."""

import torch
from torch import Tensor

from elastic.data import PackedTokens, TextDataModule
from elastic.importance import Calibration
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


def calibration_text(setup: Setup) -> Calibration:
    """What the parent is ranked on, spread evenly over the training text; on the run's device.

    Raises:
        ConfigError: the text is shorter than one sequence, or has a token that the parent lacks.
    """
    settings = setup.config.importance

    def spread(samples: int, length: int, setting: str) -> Tensor:
        windows = PackedTokens(
            setup.data.train,
            length,
            setting=f"importance.{setting}",
            text="training text",
            vocabulary=setup.shape.vocab_size,
        )
        count = min(samples, len(windows))
        rows = [windows[i * len(windows) // count][:-1] for i in range(count)]
        return torch.stack(rows).to(setup.device)

    return Calibration(
        spread(settings.samples, settings.sequence_length, "sequence_length"),
        spread(settings.depth_samples, settings.depth_sequence_length, "depth_sequence_length"),
    )
