"""Stages -> what the text needs to know of them."""

from collections.abc import Iterable

from elastic.data import StageText
from elastic.routing.curriculum import Stage


def stage_texts(stages: Iterable[Stage]) -> list[StageText]:
    """The same stages, in order."""
    return [
        StageText(
            stage.name,
            stage.config.sequence_length,
            stage.tokens // stage.config.sequence_length,
            stage.config.weights,
        )
        for stage in stages
    ]
