"""Losses summed by document: documents are drawn from a source, tokens of one document are not
independent, so that standard errors are over documents."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic.config import ConfigError
from elastic.data import PreparedData
from elastic.data.order import SOURCE_BITS
from elastic.losses.divergences import forward_kl

Logits = Callable[[Tensor], Tensor]
"""(b, t) tokens -> (b, t, v)."""


@dataclass(frozen=True)
class ReportText:
    """Pieces of documents, each in a row of its own, and which document each target is of."""

    batches: list[Tensor]
    """(b, t + 1) int64 each."""
    documents: list[Tensor]
    """(b, t) int64 each: number of the document of every target, from 0 on; -1 where none
    counts."""

    @property
    def tokens(self) -> int:
        """Targets."""
        return sum(int((each >= 0).sum()) for each in self.documents)

    @property
    def document_count(self) -> int:
        return 1 + max(int(each.max()) for each in self.documents)


def report_text(
    data: PreparedData, split: str, sequences: int, length: int, batch: int
) -> ReportText:
    """Pieces of held-out documents, of every source by its share and spread evenly over its text. A
    row has one piece, and padding behind it, so that any model may read it.

    Args:
        sequences: at most so many rows of at most `length` targets, in batches of `batch`.

    Raises:
        ConfigError: all of them are within one document; a token that the parent does not have.
    """
    rows, keys = data.held_out_rows(split, length, sequences, packing="none")
    tokens = torch.stack([torch.from_numpy(rows[key].tokens) for key in keys])  # (n, t + 1)
    sources = np.array([key >> SOURCE_BITS for key in keys])[:, None]
    found = np.stack([rows.documents(key) for key in keys])
    numbered = np.where(found < 0, -1, found + (sources << SOURCE_BITS))
    known, inverse = np.unique(numbered, return_inverse=True)
    numbers = torch.from_numpy(inverse.reshape(numbered.shape) - int(known[0] < 0))
    if int(numbers.max()) == 0:
        raise ConfigError(
            f"sequences={sequences}: all pieces of {length} tokens are of one document, which "
            "gives no standard error; take more (sequences) or hold out more documents "
            "(data.validation_every)"
        )
    return ReportText(list(tokens.split(batch)), list(numbers.split(batch)))


@dataclass(frozen=True)
class Sums:
    """Of one model, by document; float64 (documents,) each."""

    loss: np.ndarray
    """Cross-entropy, in nats."""
    kl: np.ndarray
    """To the reference, in nats."""
    tokens: np.ndarray


@torch.no_grad()
def sums_by_document(models: Sequence[Logits], reference: Logits, text: ReportText) -> list[Sums]:
    """Cross-entropy of each model, and KL(reference || model), summed by document; the reference
    runs once for all."""
    totals = np.zeros((len(models), 3, text.document_count))
    for batch, documents in zip(text.batches, text.documents, strict=True):
        inputs, targets, counted = batch[:, :-1], batch[:, 1:], documents >= 0
        log_p = torch.log_softmax(reference(inputs).float(), -1)
        for model, found in zip(models, totals, strict=True):
            log_q = torch.log_softmax(model(inputs).float(), -1)
            values = (
                -log_q.gather(-1, targets[..., None])[..., 0],
                forward_kl(log_q, log_p),
                torch.ones_like(log_q[..., 0]),
            )
            for total, value in zip(found, values, strict=True):
                total += np.bincount(
                    documents[counted].numpy(), value.cpu()[counted].double().numpy(), len(total)
                )
    return [Sums(*found) for found in totals]


def stock_logits(model: Any) -> Logits:
    """Those of a model of transformers."""
    return lambda tokens: model(tokens, use_cache=False).logits


def mean_and_error(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Mean per token of what was summed by document, and its standard error over documents.

    The mean is a ratio of sums, so that long documents weigh more; the error is that of a ratio
    estimate with documents as units. For a paired difference give the difference of sums.
    """
    count, total = len(sums), tokens.sum()
    mean = sums.sum() / total
    residuals = sums - mean * tokens
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / total
    return float(mean), float(error)


def mean_over_seeds(runs: Sequence[np.ndarray], tokens: np.ndarray) -> tuple[float, float]:
    """Mean per token over several runs on the same documents, and its standard error over documents
    of the runs' average."""
    return mean_and_error(np.mean(np.stack(list(runs)), 0), tokens)
