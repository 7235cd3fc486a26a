"""One part of a source -> its tokens on disk: what a preparing process does."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError, SourceConfig
from elastic.data.bad import BadRecord
from elastic.data.chat import ChatEncoder
from elastic.data.encode import encode_texts, text_of
from elastic.data.messages import messages_of, tools_of
from elastic.data.readers import Record, records
from elastic.data.sources import PartTask
from elastic.data.tokenizer import load_tokenizer, vocabulary_size
from elastic.data.tokens import PartSummary, PartWriter, read_summary, token_type
from elastic.data.units import Unit, kind_of
from elastic.storage.files import digest
from elastic.storage.seals import damage

PART_VERSION = 1
"""Of a part; raise it when the same text no longer gives the same tokens."""

BATCH_CHARACTERS = 1 << 20
"""Characters that are tokenised at a time: a few long documents must not fill the memory."""


@dataclass(frozen=True)
class Encoding:
    """How records become tokens; small enough to be sent to every process."""

    tokenizer: Path
    """Its directory."""
    tokenizer_digest: str
    template: str | None
    """The chat template itself; None where no source has messages."""
    skips: bool
    """Whether bad records are counted and left out; else the first one stops."""
    max_characters: int
    libraries: tuple[str, ...]
    """Versions of what makes the tokens."""


@dataclass(frozen=True)
class Document:
    """What a record is before it is tokenised."""

    place: "Place"
    text: str | None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    characters: int = 0


def part_key(task: PartTask, encoding: Encoding) -> str:
    """Hash of all that a part's tokens depend on, contents of files included."""
    config = task.config
    known: list[Any] = [PART_VERSION, encoding.tokenizer_digest, encoding.libraries]
    known += [encoding.skips, encoding.max_characters, config.kind]
    if config.kind == "arithmetic":
        known += [config.problems, list(config.difficulties)]
    else:
        known += [[kind_of(unit.path).reader, unit.key()] for unit in task.units]
        known += [config.text if config.messages is None else None, config.messages, config.tools]
        known += [{name: list(values) for name, values in config.where.items()}]
    if config.chat:
        known += [encoding.template, config.loss_on, config.reasoning]
    return digest(known)


def make_part(task: PartTask, encoding: Encoding, parts: Path) -> tuple[str, PartSummary]:
    """Write a part into the directory of all parts, unless it is there and whole; its name and
    summary.

    Raises:
        ConfigError: a record cannot be read and must, or too many cannot.
    """
    name = part_key(task, encoding)
    found = read_summary(parts / name)
    if found is not None and damage(parts / name) is None:
        return name, found
    tokenizer = _tokenizer(encoding.tokenizer)
    writer = PartWriter(token_type(vocabulary_size(tokenizer)))
    reading = Reading(task, encoding.skips, encoding.max_characters)
    batch: list[Document] = []
    size = 0
    for document in reading:
        batch.append(document)
        size += document.characters
        if size >= BATCH_CHARACTERS:
            _encode(batch, task.config, encoding, tokenizer, writer, reading)
            batch, size = [], 0
    _encode(batch, task.config, encoding, tokenizer, writer, reading)
    summary = PartSummary(
        groups=writer.groups,
        documents=writer.documents,
        tokens=writer.tokens,
        targets=writer.targets,
        records=reading.records,
        characters=reading.characters,
        empty=reading.empty,
        skipped=reading.skipped,
        first_skipped=reading.first_skipped,
    )
    writer.write(parts / name, summary)
    return name, summary


class Reading:
    """The documents of a task in order; counts what it leaves out."""

    def __init__(self, task: PartTask, skips: bool, max_characters: int) -> None:
        self.task, self.skips, self.max_characters = task, skips, max_characters
        self.records, self.characters, self.empty = 0, 0, 0
        self.skipped: dict[str, int] = {}
        self.first_skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[Document]:
        for place, record in self._records():
            self.records += 1
            try:
                document = self._document(place, record)
            except BadRecord as bad:
                self.leave_out(place, bad)
                continue
            if document is not None:
                self.characters += document.characters
                yield document

    def leave_out(self, place: "Place", bad: BadRecord) -> None:
        """Count a bad record.

        Raises:
            ConfigError: it must not be left out.
        """
        if self.task.config.kind == "stdlib":
            return  # a few files declare another encoding
        setting = f"data.sources.{self.task.source}"
        if not self.skips:
            raise ConfigError(
                f"{setting}: {place.words()}: {bad.reason}; must be put right, or set "
                "data.on_error=skip, which leaves such records out and counts them"
            )
        self.skipped[bad.kind] = self.skipped.get(bad.kind, 0) + 1
        self.first_skipped.setdefault(bad.kind, f"{place.words()}: {bad.reason}")

    def _records(self) -> Iterator[tuple["Place", Record]]:
        config = self.task.config
        if config.kind == "arithmetic":
            from elastic.data.arithmetic import FAMILIES, problems

            asked = (0, FAMILIES, config.difficulties, config.problems, "train")
            for number, problem in enumerate(problems(*asked), start=1):
                yield Place(None, number), problem.record()
            return
        main = config.messages or config.text
        more = ([config.tools] if config.tools else []) + list(config.where)
        for unit in self.task.units:
            for number, record in records(unit, (main,), more, self.max_characters):
                yield Place(unit, number), record

    def _document(self, place: "Place", record: Record) -> Document | None:
        """A record as a document; None for one that the filter or emptiness leaves out."""
        if isinstance(record, BadRecord):
            raise record
        config = self.task.config
        if isinstance(record, str):
            return self._text(place, record)
        if not all(_matches(record.get(name), wanted) for name, wanted in config.where.items()):
            self.records -= 1  # not one of this source's
            return None
        if not config.chat:
            return self._text(place, record[config.text])
        tools = None if config.tools is None else tools_of(record.get(config.tools))
        messages = messages_of(record[config.messages or "messages"])
        size = sum(len(str(message)) for message in messages)
        return Document(place, None, messages, tools, size)

    def _text(self, place: "Place", value: Any) -> Document | None:
        if value == "":
            self.empty += 1
            return None
        column = self.task.config.text
        text = text_of({column: value}, column)
        return Document(place, text, characters=len(text))


@dataclass(frozen=True)
class Place:
    """Where a record is."""

    unit: Unit | None
    number: int

    def words(self) -> str:
        """Lines before it are counted now, which only what is wrong is worth."""
        return f"problem {self.number}" if self.unit is None else self.unit.place(self.number)


def _matches(value: Any, wanted: list[str]) -> bool:
    """Whether a record's field has one of some values: as itself, in a list, or between commas."""
    if isinstance(value, str):
        found = {value, *(part.strip() for part in value.split(","))}
    elif isinstance(value, list):
        found = {str(part) for part in value}
    else:
        found = set() if value is None else {str(value)}
    return bool(found & set(wanted))


def _encode(
    batch: list[Document],
    config: SourceConfig,
    encoding: Encoding,
    tokenizer: PreTrainedTokenizerBase,
    writer: PartWriter,
    reading: Reading,
) -> None:
    if not batch:
        return
    if not config.chat:
        assert tokenizer.eos_token_id is not None
        texts = [document.text or "" for document in batch]
        for ids in encode_texts(tokenizer, texts, int(tokenizer.eos_token_id)):
            writer.add(ids)
        return
    assert encoding.template is not None
    encoder = _encoder(encoding.tokenizer, encoding.template, config.reasoning, config.loss_on)
    rows = encoder.encode_batch([(each.messages or [], each.tools) for each in batch])
    for document, row in zip(batch, rows, strict=True):
        if isinstance(row, BadRecord):
            reading.leave_out(document.place, row)
            continue
        for number, encoded in enumerate(row):
            writer.add(encoded.ids, encoded.loss, new=number == 0)


@lru_cache(maxsize=2)
def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(directory)


@lru_cache(maxsize=8)
def _encoder(directory: Path, template: str, reasoning: str, loss_on: str) -> ChatEncoder:
    how: Any = reasoning, loss_on  # the settings have been checked
    return ChatEncoder(_tokenizer(directory), template, *how)


def be_a_worker() -> None:
    """Set a preparing process up: one thread each, and Ctrl-C is for the first process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
