"""Text of a run -> what a stage reads, and what the parent is ranked on."""

from elastic.config import ConfigError
from elastic.data import Batch, TextDataModule, batch_of
from elastic.data import stage_text as text_of
from elastic.importance import Calibration
from elastic.routing.curriculum import Stage
from elastic.routing.text import stage_texts
from elastic.training.setup import Setup


def stage_text(setup: Setup, stage: Stage, start_micro_step: int) -> TextDataModule:
    """Training and validation text of a stage, from one of its micro-batches on.

    Raises:
        ConfigError: there is no text for it.
    """
    return text_of(
        setup.data,
        stage_texts(setup.stages),
        stage.name,
        seed=setup.config.seed,
        batch_sequences=stage.batch_sequences,
        step_sequences=stage.config.batch_tokens // stage.config.sequence_length,
        repeats=stage.passes,
        start_micro_step=start_micro_step,
        rank=setup.place.rank,
        world_size=setup.place.world_size,
    )


def calibration_text(setup: Setup) -> Calibration:
    """What the parent is ranked on, of every source by its share and spread evenly over its
    training text; on the run's device.

    Raises:
        ConfigError: the text is shorter than one sequence, or has a token that the parent lacks.
    """
    settings = setup.config.importance

    def spread(samples: int, length: int, setting: str) -> Batch:
        rows, keys = setup.data.calibration(length, samples)
        if not keys:
            raise ConfigError(
                f"importance.{setting}={length}: a sequence longer than the training text, which "
                f"has {sum(setup.data.train_tokens.values())} tokens; must be less, or give more "
                "text (data.sources)"
            )
        return batch_of([rows[key] for key in keys]).to(setup.device)

    return Calibration(
        spread(settings.samples, settings.sequence_length, "sequence_length"),
        spread(settings.depth_samples, settings.depth_sequence_length, "depth_sequence_length"),
    )
