"""The teacher's top-k log-probabilities for some sequences, as the arrays of one file."""

from collections.abc import Callable

import numpy as np
import torch

from elastic.config import ObjectiveConfig
from elastic.data import Batch, TextDataModule, batch_of
from elastic.losses import top_k_and_text
from elastic.teacher import OnlineTeacher
from elastic.teacher.cache.shards import Rows, ShardSet
from elastic.teacher.cached import text_digest


class Windows:
    """Sequences of a stage in the order of the cache."""

    def __init__(self, text: TextDataModule, sequences: int) -> None:
        self.text = text
        order = text.stream.order
        self.keys = order.keys(0, sequences)[order.first_uses(sequences)[0]]

    def rows(self, split: str, slots: range) -> Batch:
        if split == "validation":
            return batch_of([self.text.held_out[self.text.validation[slot]] for slot in slots])
        return batch_of([self.text.stream.sequences[int(self.keys[slot])] for slot in slots])


class TopKWriter:
    """A teacher, and how its distributions are cut to their top k."""

    def __init__(
        self,
        teacher: OnlineTeacher,
        device: torch.device,
        objective: ObjectiveConfig,
        batch_tokens: int,
    ) -> None:
        self.teacher, self.device = teacher, device
        self.objective, self.batch_tokens = objective, batch_tokens

    def rows(
        self, shards: ShardSet, slots: range, windows: Windows, progress: Callable[[int], object]
    ) -> Rows:
        """The arrays of one file; `progress` is given the tokens of each batch that is done."""
        self.teacher.start(self.device, shards.stage)
        rows = {
            n: np.empty(shape, dtype) for n, (dtype, shape) in shards.layout(len(slots)).items()
        }
        step = max(1, self.batch_tokens // shards.sequence_length)
        for start in range(0, len(slots), step):
            here = slice(start, min(start + step, len(slots)))
            batch = windows.rows(shards.split, slots[here])
            for name, values in self._top_k(batch, shards, slots[here].start).items():
                rows[name][here] = values
            progress(batch.inputs.numel())
        return rows

    def _top_k(self, batch: Batch, shards: ShardSet, first: int) -> Rows:
        digests = b"".join(text_digest(window) for window in batch.tokens)
        text = np.frombuffer(digests, np.uint8).reshape(len(batch), 8)
        batch = batch.to(self.device)
        head = self.teacher.distributions(batch, shards.split, first)
        kept, text_log_probs = top_k_and_text(
            head,
            batch.targets,
            shards.top_k,
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
