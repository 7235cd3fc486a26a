"""Tokens of one source on disk, document after document, in sealed parts.

A part is a directory: `tokens.npy`, `ends.npy`, `groups.npy` and `part.json`. The highest bit of a
token says that it is no target (a prompt, where the assistant's words alone are), so that there is
one file to read. What is read is compared with the seals beside it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from elastic.config.data import stored_bytes
from elastic.storage.arrays import StoredArray
from elastic.storage.files import atomic_directory, digest, write_json
from elastic.storage.seals import Seals

OPEN_PARTS = 256
"""Parts that are open at a time."""


def token_type(vocabulary: int) -> np.dtype:
    """The type of stored tokens: one bit more than an id needs."""
    return np.dtype(f"uint{8 * stored_bytes(vocabulary)}")


def no_target(dtype: np.dtype) -> int:
    """The bit of a token that is no target."""
    return 1 << (8 * dtype.itemsize - 1)


@dataclass(frozen=True)
class PartSummary:
    """What is in a part, and what was left out."""

    groups: int
    """Records that gave documents."""
    documents: int
    """Several of a record of messages that is split by turns."""
    tokens: int
    targets: int
    """Tokens that may be predicted; first tokens of documents are among them."""
    records: int
    """That were read, bad ones too."""
    characters: int
    empty: int = 0
    """Records that have no text."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Kind of fault -> records."""
    first_skipped: dict[str, str] = field(default_factory=dict)
    """Kind of fault -> the first of them, in words."""


class PartWriter:
    """Documents that become a part, in memory until they are written."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._ids = bytearray()  # grows in place
        self._ends: list[int] = []
        self._groups: list[int] = []
        self._targets = 0

    @property
    def tokens(self) -> int:
        return len(self._ids) // self.dtype.itemsize

    @property
    def documents(self) -> int:
        return len(self._ends)

    @property
    def targets(self) -> int:
        return self._targets

    @property
    def groups(self) -> int:
        return self._groups[-1] + 1 if self._groups else 0

    def add(self, ids: np.ndarray, targets: np.ndarray | None = None, new: bool = True) -> None:
        """A document (n,) and which of its tokens are targets; None is all. Of a `new` record, or
        one more of the last."""
        values = ids.astype(self.dtype)
        if targets is not None:
            values |= np.where(targets, 0, no_target(self.dtype)).astype(self.dtype)
        self._targets += len(ids) if targets is None else int(targets.sum())
        self._ids += values.tobytes()
        self._groups.append(self.groups if new else self.groups - 1)
        self._ends.append(self.tokens)

    def write(self, directory: Path, summary: PartSummary) -> None:
        """Write the part, whole or not at all; one that is there is replaced."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory, replace=True) as temporary:
            for name, values in (
                ("tokens.npy", np.frombuffer(self._ids, self.dtype)),
                ("ends.npy", np.array(self._ends, np.int64)),
                ("groups.npy", np.array(self._groups, np.int64)),
            ):
                np.save(temporary / name, values, allow_pickle=False)
            write_json(temporary / "part.json", asdict(summary))
            Seals.of(temporary).write()


def read_summary(directory: Path) -> PartSummary | None:
    """Of a part that is there and whole, by its sizes and its small file; None of another."""
    try:
        seals = Seals.read(directory)
        if seals is None:
            return None
        seals.check_sizes()
        seals.check("part.json", "ends.npy", "groups.npy")
        return PartSummary(**json.loads((directory / "part.json").read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


class TokenStore:
    """The documents of one source, numbered through all its parts."""

    def __init__(self, directories: Sequence[Path], summaries: Sequence[PartSummary]) -> None:
        self.directories, self.summaries = tuple(directories), tuple(summaries)
        self.token_offsets = np.cumsum([0, *(each.tokens for each in summaries)])
        self.document_offsets = np.cumsum([0, *(each.documents for each in summaries)])
        self.group_offsets = np.cumsum([0, *(each.groups for each in summaries)])
        self._open: dict[int, StoredArray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a loading process opens files for itself

    @property
    def tokens(self) -> int:
        return int(self.token_offsets[-1])

    @property
    def documents(self) -> int:
        return int(self.document_offsets[-1])

    @property
    def groups(self) -> int:
        """Records behind the documents."""
        return int(self.group_offsets[-1])

    @cached_property
    def digest(self) -> str:
        """Checksum of all tokens and borders, by the seals."""
        found = []
        for directory in self.directories:
            seals = Seals.read(directory)
            assert seals is not None
            found += [seals.files[name].digest for name in ("ends.npy", "groups.npy", "tokens.npy")]
        return digest(found)

    @cached_property
    def _marked(self) -> bool:
        """Whether any token is no target."""
        return any(each.targets != each.tokens for each in self.summaries)

    def ends(self, part: int) -> np.ndarray:
        """(documents,) int64, ends of a part's documents from its beginning on."""
        return StoredArray(self.directories[part] / "ends.npy")[:]

    def group_numbers(self, part: int) -> np.ndarray:
        """(documents,) int64, the record of each of a part's documents, over the source."""
        groups = StoredArray(self.directories[part] / "groups.npy")[:]
        return groups + self.group_offsets[part]

    def places(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths (n,) int64 of documents, whose numbers ascend."""
        starts, lengths = np.empty(len(documents), np.int64), np.empty(len(documents), np.int64)
        parts = np.searchsorted(self.document_offsets, documents, "right") - 1
        for part in np.unique(parts).tolist():
            here = parts == part
            ends = self.ends(part)
            number = documents[here] - self.document_offsets[part]
            begins = np.where(number > 0, ends[np.maximum(number, 1) - 1], 0)
            starts[here] = begins + self.token_offsets[part]
            lengths[here] = ends[number] - begins
        return starts, lengths

    def document_of(self, places: np.ndarray) -> np.ndarray:
        """Numbers (n,) int64 of the documents of some tokens, by their places."""
        found = np.empty(len(places), np.int64)
        parts = np.searchsorted(self.token_offsets, places, "right") - 1
        for part in np.unique(parts).tolist():
            here = parts == part
            number = np.searchsorted(
                self.ends(part), places[here] - self.token_offsets[part], "right"
            )
            found[here] = number + self.document_offsets[part]
        return found

    def targets(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(n,) int64: tokens of pieces that are predicted and count; the first one never is."""
        if not self._marked:
            return np.maximum(lengths - 1, 0)
        found = np.empty(len(starts), np.int64)
        parts = np.searchsorted(self.token_offsets, starts, "right") - 1
        for part in np.unique(parts).tolist():
            here = parts == part
            tokens = self._part(part)[:]
            counted = np.concatenate([[0], np.cumsum(tokens < no_target(tokens.dtype))])
            first = starts[here] - self.token_offsets[part]
            found[here] = counted[first + lengths[here]] - counted[first + 1]
        return found

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids (length,) int64 of consecutive tokens of one part, and which are targets; None where
        all are.

        Raises:
            SealBroken: they are not what was written.
        """
        part = int(np.searchsorted(self.token_offsets, start, "right")) - 1
        first = start - int(self.token_offsets[part])
        values = self._part(part)[first : first + length]
        if not self._marked:
            return values.astype(np.int64), None
        bit = no_target(values.dtype)
        return (values & (bit - 1)).astype(np.int64), values < bit

    def _part(self, part: int) -> StoredArray:
        if part not in self._open:
            if len(self._open) >= OPEN_PARTS:
                del self._open[next(iter(self._open))]
            self._open[part] = StoredArray(self.directories[part] / "tokens.npy")
        return self._open[part]


def total(summaries: Iterable[PartSummary]) -> PartSummary:
    """All parts of a source together."""
    numbers = dict.fromkeys(
        ("groups", "documents", "tokens", "targets", "records", "characters", "empty"), 0
    )
    skipped: dict[str, int] = {}
    first: dict[str, str] = {}
    for each in summaries:
        for name in numbers:
            numbers[name] += getattr(each, name)
        for kind, count in each.skipped.items():
            skipped[kind] = skipped.get(kind, 0) + count
            first.setdefault(kind, each.first_skipped[kind])
    return PartSummary(**numbers, skipped=skipped, first_skipped=first)
