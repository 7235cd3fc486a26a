"""What every teacher can do."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from elastic.losses import Head, TopK

SPLITS = ("train", "validation")
"""Texts that a teacher predicts."""


class Teacher(ABC):
    """Predicts the next tokens of a batch; never trained, never saved.

    Not an nn.Module, so that a module that holds one does not own its weights.
    """

    @abstractmethod
    def start(self, device: torch.device, stage: str) -> None:
        """Be ready for a stage, on a device; called before its first batch, once the process group
        exists, on every process."""

    @abstractmethod
    def distributions(self, batch: Tensor, split: str, first: int) -> Head | TopK:
        """Distributions of the next token after each of the first t tokens of a batch (b, t + 1)
        int64.

        Args:
            split: `train` or `validation`.
            first: place of the batch's first row in the order of its split; the others follow it.
                Of `train` that is the position of `data.SequenceStream`, over all processes; of
                `validation` the number of the row.

        The result is valid until the next call.
        """


def documents_in(tokens: Tensor, start: int | None) -> Tensor | None:
    """Ids (b, t) int32 of the documents of tokens (b, t), each of which begins with `start`; None,
    all one document, where no token does."""
    return None if start is None else (tokens == start).cumsum(-1, dtype=torch.int32)
