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
from elastic.data import PackedTokens
from elastic.data.packing import Tokens
from elastic.losses.divergences import forward_kl

Logits = Callable[[Tensor], Tensor]
"""(b, t) tokens -> (b, t, v)."""


@dataclass(frozen=True)
class ReportText:
    """Windows of a text, and which document each of their targets is of."""

    batches: list[Tensor]
    """(b, t + 1) int64 each."""
    documents: list[Tensor]
    """(b, t) int64 each: number of the document of every target, from 0 in their order."""

    @property
    def tokens(self) -> int:
        """Targets."""
        return sum(each.numel() for each in self.documents)

    @property
    def document_count(self) -> int:
        return 1 + max(int(each.max()) for each in self.documents)


def report_text(
    tokens: Tokens,
    end: int | None,
    sequences: int,
    length: int,
    batch: int,
    vocabulary: int | None = None,
) -> ReportText:
    """Windows spread evenly over a text whose documents end with the token `end`.

    Args:
        sequences: at most so many windows of `length` targets, in batches of `batch`.
        end: None where documents are not marked: then each window counts as one.

    Raises:
        ConfigError: not even one window fits, or all of them are within one document; a token that
            a `vocabulary` of that size does not have.
    """
    windows = PackedTokens(
        tokens, length, setting="sequence_length", text="report text", vocabulary=vocabulary
    )
    count = min(sequences, len(windows))
    starts = [i * len(windows) // count for i in range(count)]
    chosen = torch.stack([windows[start] for start in starts])  # (n, t + 1)
    if end is None:
        numbers = torch.arange(count)[:, None].expand(-1, length)
    else:
        flat = np.asarray(tokens)
        before = np.cumsum(flat == end) - (flat == end)  # an end belongs to what it ends
        places = np.array(starts)[:, None] * length + 1 + np.arange(length)
        numbers = torch.from_numpy(before[places].astype(np.int64))
    _, numbers = torch.unique(numbers, return_inverse=True)
    if int(numbers.max()) == 0:
        raise ConfigError(
            f"sequences={sequences}: all windows of {length} tokens are within one document, which "
            "gives no standard error; take more (sequences) or hold out more documents "
            "(data.validation_every)"
        )
    return ReportText(list(chosen.split(batch)), list(numbers.split(batch)))


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
        inputs, targets = batch[:, :-1], batch[:, 1:]
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
                    documents.flatten().numpy(), value.flatten().double().cpu().numpy(), len(total)
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
