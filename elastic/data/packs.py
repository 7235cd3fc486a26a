"""Documents -> packed sequences: which pieces of which documents share a row.

A row of `sequence_length` inputs has one token more, the last target. A document that is longer is
cut into pieces that share one token with their neighbours, so that no target is lost. No piece sees
another, whatever they share (`Batch.documents`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastic.data.tokens import TokenStore


@dataclass(frozen=True)
class Pieces:
    """Consecutive tokens of documents."""

    starts: np.ndarray
    """(n,) int64, places of the first tokens in their source."""
    lengths: np.ndarray
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, order: np.ndarray) -> "Pieces":
        return Pieces(self.starts[order], self.lengths[order])


@dataclass(frozen=True)
class Packed:
    """Rows of pieces, of one slice of a source."""

    rows: np.ndarray
    """(rows + 1,) int64: row r has the pieces from rows[r] to rows[r + 1]."""
    starts: np.ndarray
    """(pieces,) int64, as in `Pieces`."""
    lengths: np.ndarray
    """(pieces,) int32."""
    targets: np.ndarray
    """(rows,) int32, tokens of a row that are predicted and count."""

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def tokens(self) -> np.ndarray:
        """(rows,) int64, of each row; the rest is padding."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return ends[self.rows[1:]] - ends[self.rows[:-1]]

    def only(self, kept: np.ndarray) -> "Packed":
        """Some of the rows, by a mask (rows,)."""
        counts = np.diff(self.rows)
        pieces = np.repeat(kept, counts)
        rows = np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64)
        return Packed(rows, self.starts[pieces], self.lengths[pieces], self.targets[kept])

    def full(self, sequence_length: int) -> "Packed":
        """The rows without padding."""
        return self.only(self.tokens == sequence_length + 1)


def pack(
    store: TokenStore,
    documents: np.ndarray,
    sequence_length: int,
    packing: str,
) -> Packed:
    """Pack some documents of a source.

    Args:
        documents: (n,) int64, their numbers, ascending.
        packing: as `data.packing`.
    """
    starts, lengths = store.places(documents)
    if packing == "concat":
        pieces, rows = _concatenated(starts, lengths, sequence_length)
    else:
        whole = _cut(starts, lengths, sequence_length)
        whole = whole.take(np.flatnonzero(store.targets(whole.starts, whole.lengths)))
        if packing == "best_fit":
            order, rows = best_fit(whole.lengths, sequence_length + 1)
            pieces = whole.take(order)
        else:
            pieces, rows = whole, np.arange(len(whole) + 1)
    counts = np.concatenate([[0], np.cumsum(store.targets(pieces.starts, pieces.lengths))])
    targets = counts[rows[1:]] - counts[rows[:-1]]
    packed = Packed(rows, pieces.starts, pieces.lengths.astype(np.int32), targets.astype(np.int32))
    return packed if targets.all() else packed.only(targets > 0)  # others teach nothing


def _cut(starts: np.ndarray, lengths: np.ndarray, length: int) -> Pieces:
    """Documents as pieces of at most length + 1 tokens, neighbours sharing one."""
    counts = np.maximum(-(-(lengths - 1) // length), 0)  # a document of one token has no target
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * length
    return Pieces(starts[document] + first, np.minimum(lengths[document] - first, length + 1))


def _concatenated(
    starts: np.ndarray, lengths: np.ndarray, length: int
) -> tuple[Pieces, np.ndarray]:
    """All documents one after another, cut every `length` tokens; the rows' pieces."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    count = max(-(-(total - 1) // length), 0)
    row_start = np.arange(count, dtype=np.int64) * length
    row_end = np.minimum(row_start + length + 1, total)
    # A piece begins where a row or a document does.
    first = np.searchsorted(ends, row_start, "right")
    last = np.searchsorted(ends, row_end, "left")  # the document of a row's last token
    counts = last - first + 1
    rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    row = np.repeat(np.arange(count), counts)
    document = first[row] + np.arange(len(row)) - rows[row]
    begins = ends - lengths
    piece_start = np.maximum(row_start[row], begins[document])
    piece_end = np.minimum(row_end[row], ends[document])
    place = starts[document] + piece_start - begins[document]
    return Pieces(place, piece_end - piece_start), rows


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: longest pieces first, each where it leaves least room (as in arXiv
    2404.10830, section 3).

    Returns the order of the pieces, row after row, and the (rows + 1,) places where rows begin. A
    function of its arguments: of rows that are as full, the one that was opened last is taken.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, rows = 0, 0  # rooms: bit r is set where a row has room for r tokens
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of[index] = row
        left = room - length
        if left > 1:  # a piece has two tokens at least
            with_room[left].append(row)
            rooms |= 1 << left
    # Within a row the longest piece comes first.
    by_row = order[np.argsort(row_of[order], kind="stable")]
    begins = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return by_row, begins.astype(np.int64)


def joined(slices: Sequence[Packed]) -> Packed:
    """The rows of several slices, one after another."""
    offsets = np.cumsum([0, *(len(each.starts) for each in slices)])
    rows = [each.rows[1:] + offset for each, offset in zip(slices, offsets[:-1], strict=True)]
    return Packed(
        np.concatenate([[0], *rows]).astype(np.int64),
        *(
            np.concatenate([getattr(each, name) for each in slices])
            for name in ("starts", "lengths", "targets")
        ),
    )
