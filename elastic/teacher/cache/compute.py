"""What the teacher says about some sequences, as the arrays of one file."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from elastic.config import ObjectiveConfig
from elastic.data import TextDataModule
from elastic.data.datamodule import permutation
from elastic.losses import top_k_and_text
from elastic.teacher import LiveTeacher
from elastic.teacher.cache.shards import Rows, Shelf
from elastic.teacher.cached import text_digest


class Windows:
    """Sequences of a stage in the order of the store."""

    def __init__(self, text: TextDataModule) -> None:
        self.train, self.validation = text.stream.sequences, text.validation
        self.order = permutation(text.stream.seed, text.stream.stage_name, 0, len(self.train))

    def rows(self, split: str, slots: range) -> Tensor:
        """(n, t + 1) int64."""
        if split == "validation":
            return torch.stack([self.validation[slot] for slot in slots])
        return torch.stack([self.train[int(self.order[slot])] for slot in slots])


class Speaker:
    """A teacher, and how its words are cut."""

    def __init__(
        self,
        teacher: LiveTeacher,
        device: torch.device,
        objective: ObjectiveConfig,
        batch_tokens: int,
    ) -> None:
        self.teacher, self.device = teacher, device
        self.objective, self.batch_tokens = objective, batch_tokens

    def rows(
        self, shelf: Shelf, slots: range, windows: Windows, spoken: Callable[[int], object]
    ) -> Rows:
        """The arrays of one file; `spoken` is told the tokens of each batch that is done."""
        self.teacher.start(self.device, shelf.stage)
        rows = {n: np.empty(shape, dtype) for n, (dtype, shape) in shelf.layout(len(slots)).items()}
        step = max(1, self.batch_tokens // shelf.sequence_length)
        for start in range(0, len(slots), step):
            here = slice(start, min(start + step, len(slots)))
            batch = windows.rows(shelf.split, slots[here])
            for name, values in self._say(batch, shelf, slots[here].start).items():
                rows[name][here] = values
            spoken(batch[:, 1:].numel())
        return rows

    def _say(self, batch: Tensor, shelf: Shelf, first: int) -> Rows:
        digests = b"".join(text_digest(window) for window in batch)
        text = np.frombuffer(digests, np.uint8).reshape(len(batch), 8)
        batch = batch.to(self.device)
        head = self.teacher.teach(batch, shelf.split, first)
        kept, text_log_probs = top_k_and_text(
            head,
            batch[:, 1:].flatten(),
            shelf.top_k,
            self.objective.temperature,
            self.objective.chunk_tokens,
        )
        values = {
            "indices": kept.indices,
            "log_probs": kept.log_probs,
            "text_log_probs": text_log_probs,
        }
        by_row = {n: v.unflatten(0, (len(batch), -1)).cpu().numpy() for n, v in values.items()}
        return by_row | {"text": text}
