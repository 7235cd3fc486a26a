"""What every teacher can do."""

from abc import ABC, abstractmethod

import torch

from elastic.data import Batch
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
    def distributions(self, batch: Batch, split: str, first: int) -> Head | TopK:
        """Distributions of the next token after each of the b * t inputs of a batch, those that do
        not count too.

        Args:
            split: `train` or `validation`.
            first: place of the batch's first row in the order of its split; the others follow it.
                Of `train` that is the position of `data.SequenceStream`, over all processes; of
                `validation` the number of the row.

        The result is valid until the next call.
        """
