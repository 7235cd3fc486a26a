"""What a teacher is, wherever its words come from."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from elastic.losses import Head, TopK

SPLITS = ("train", "validation")
"""Texts that a teacher is asked about."""


class Teacher(ABC):
    """Says what the next token is, for sequences of a batch; never trained, never saved.

    No module: whoever holds one has none of its weights among its own.
    """

    @abstractmethod
    def start(self, device: torch.device, stage: str) -> None:
        """Be ready for a stage, on a device; called before its first batch, once the process group
        exists, on every process."""

    @abstractmethod
    def teach(self, batch: Tensor, split: str, first: int) -> Head | TopK:
        """What is said about the batch (b, t + 1) int64, every t of which asks for the next token.

        Args:
            split: `train` or `validation`.
            first: place of the batch's first row in the order of its split; the others follow it.
                Of `train` that is the position of `data.SequenceStream`, over all processes; of
                `validation` the number of the row.

        The answer is good until the next call.
        """


def documents_in(tokens: Tensor, start: int | None) -> Tensor | None:
    """Ids (b, t) int32 of the documents of tokens (b, t), each of which begins with `start`; None,
    all one document, where no token does."""
    return None if start is None else (tokens == start).cumsum(-1, dtype=torch.int32)
