"""The plain twin of packing: every document of a batch in a call of its own."""

import torch
from torch import Tensor

from elastic.data import Batch, one_document
from elastic.parent import HybridParent, Member


def batch_of_documents(tokens: Tensor, start: int | None) -> Batch:
    """Rows (b, t + 1) whose documents each begin with the token `start`; None is one a row. A first
    token is no target of the document before it."""
    documents = torch.zeros_like(tokens)
    if start is not None:
        documents = (tokens == start).cumsum(-1)
    inputs = documents[:, :-1].int()
    counted = (documents[:, 1:] == documents[:, :-1]).flatten().nonzero()[:, 0]
    return Batch(tokens, inputs, None if len(counted) == inputs.numel() else counted)


def rows_of(tokens: Tensor) -> Batch:
    """Inputs (b, t), each row of which is one document; no target counts for anything."""
    return one_document(torch.cat([tokens, tokens[:, :1]], dim=1))


def pieces(documents: Tensor) -> list[tuple[int, slice]]:
    """Row and span of every document."""
    found = []
    for row, line in enumerate(documents):
        _, lengths = line.unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        found += [(row, slice(a, b)) for a, b in zip(starts, ends, strict=True)]
    return found


def separately(
    parent: HybridParent,
    tokens: Tensor,
    member: Member,
    documents: Tensor,
    own: int | None = None,
) -> Tensor:
    """(b, t, v) logits, every document in a call of its own."""
    rows: list[list[Tensor]] = [[] for _ in tokens]
    for row, span in pieces(documents):
        rows[row].append(parent.logits(tokens[row : row + 1, span], member, None, own)[0])
    return torch.stack([torch.cat(row) for row in rows])
