"""Documents on disk without a tokenizer: what is packed, ordered and batched in tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from elastic.config import DataConfig, SourceConfig
from elastic.data import PreparedData
from elastic.data.tokens import PartSummary, PartWriter, TokenStore, read_summary, token_type
from elastic.storage.files import digest


@dataclass(frozen=True)
class Document:
    """Its tokens, and which of them are targets."""

    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    new: bool = True

    def __len__(self) -> int:
        return len(self.ids)


Parts = Sequence[Sequence[Document]]


def numbered(lengths: Sequence[int], first: int = 0) -> list[Document]:
    """Documents of these lengths; no token comes twice."""
    ends = np.cumsum([first, *lengths])
    return [
        Document(tuple(range(ends[n], ends[n + 1])), (True,) * length)
        for n, length in enumerate(lengths)
    ]


@st.composite
def parts_of(
    draw: st.DrawFn, longest: int = 40, marked: bool | None = None, most: int = 12
) -> list[list[Document]]:
    """Parts of documents with tokens that come once; some parts are empty, some documents have one
    token, and with marks some have no target."""
    lengths = st.lists(st.integers(1, longest), max_size=most)
    drawn = draw(st.lists(lengths, min_size=1, max_size=3))
    marks = draw(st.booleans()) if marked is None else marked
    parts, first = [], 0
    for each in drawn:
        parts.append(numbered(each, first))
        first += sum(each)
    if not marks:
        return parts
    seed = draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    return [
        [Document(d.ids, tuple((random.random(len(d)) < random.random()).tolist())) for d in part]
        for part in parts
    ]


def write_part(directory: Path, documents: Sequence[Document], vocabulary: int) -> PartSummary:
    writer = PartWriter(token_type(vocabulary))
    _add(writer, documents)
    summary = _sum(writer)
    writer.write(directory, summary)
    return summary


def _add(writer: PartWriter, documents: Sequence[Document]) -> None:
    for each in documents:
        writer.add(np.array(each.ids), np.array(each.targets, bool), each.new)


def _sum(writer: PartWriter) -> PartSummary:
    return PartSummary(
        groups=writer.groups,
        documents=writer.documents,
        tokens=writer.tokens,
        targets=writer.targets,
        records=writer.groups,
        characters=writer.tokens,
    )


def store_of(directory: Path, parts: Parts, vocabulary: int = 1 << 15) -> TokenStore:
    """The documents of one source, in parts."""
    paths = [directory / f"part-{number}" for number in range(len(parts))]
    for path, documents in zip(paths, parts, strict=True):
        write_part(path, documents, vocabulary)
    summaries = [read_summary(path) for path in paths]
    assert all(summaries)
    return TokenStore(paths, [each for each in summaries if each is not None])


class MemoryStore(TokenStore):
    """The same documents without a disk, where the disk is not what is tested."""

    def __init__(self, parts: Parts) -> None:
        self.writers = [PartWriter(token_type(1 << 15)) for _ in parts]
        for writer, documents in zip(self.writers, parts, strict=True):
            _add(writer, documents)
        super().__init__([Path(f"{n}") for n in range(len(parts))], list(map(_sum, self.writers)))

    @cached_property
    def digest(self) -> str:
        return digest([[each._ends, bytes(each._ids).hex()] for each in self.writers])

    def ends(self, part: int) -> np.ndarray:
        return np.array(self.writers[part]._ends, np.int64)

    def group_numbers(self, part: int) -> np.ndarray:
        return np.array(self.writers[part]._groups, np.int64) + self.group_offsets[part]

    def _part(self, part: int) -> Any:
        writer = self.writers[part]
        return np.frombuffer(writer._ids, writer.dtype)


def prepared(
    *stores: TokenStore, directory: Path = Path("nowhere"), **settings: Any
) -> PreparedData:
    """Sources a, b, ... without a tokenizer."""
    names = [chr(97 + number) for number in range(len(stores))]
    weights = settings.pop("weights", [None] * len(stores))
    named = {
        name: SourceConfig(kind="stdlib", weight=weight)
        for name, weight in zip(names, weights, strict=True)
    }
    config = DataConfig(sources=named, **({"validation_every": 5} | settings))
    return PreparedData(config, directory, None, dict(zip(names, stores, strict=True)), "")  # type: ignore[arg-type]


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
