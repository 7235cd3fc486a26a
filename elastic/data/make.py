"""Text -> the tokens of all sources, by many processes."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError, DataConfig
from elastic.console import Bar
from elastic.data.bad import BadRecord
from elastic.data.known import FORMAT_VERSION, directory_digest
from elastic.data.parts import Encoding, Reading, be_a_worker, make_part
from elastic.data.prepared import PreparedData
from elastic.data.sources import PartTask, SourceFiles, tasks_of
from elastic.data.template import ChatTemplate, check_template, disagreement, spelled_tokens
from elastic.data.tokenizer import load_tokenizer, train_tokenizer
from elastic.data.tokens import PartSummary, TokenStore, total
from elastic.storage.files import atomic_directory, digest, write_json
from elastic.storage.seals import NAME as SEALS
from elastic.storage.seals import Seals

log = logging.getLogger(__name__)

INLINE_BYTES = 32 << 20
"""Text up to this size is tokenised by one process: others would take longer to start."""

BYTES_PER_TOKEN = 4
"""Of text, about."""

TRAINING_CHARACTERS = 200_000_000
"""Characters that a tokenizer is trained on at most."""


def make(
    config: DataConfig,
    directory: Path,
    source: tuple[str, str] | None,
    template: str | None,
    known: dict[str, Any],
    found: dict[str, SourceFiles],
    inline: bool,
    vocabulary: int | None,
) -> PreparedData:
    """Tokens from the text itself; parts that are there are kept."""
    tasks = {name: tasks_of(name, config.sources[name], found[name]) for name in config.sources}
    size = sum(task.bytes for each in tasks.values() for task in each)
    if inline:
        _require_few(config, sum(_expected(each) for each in tasks.values()))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SEALS).unlink(missing_ok=True)
    # An unusable tokenizer should stop the run before hours of reading do.
    tokenizer = None if source is None else load_tokenizer(*source)
    template = _template(config, tokenizer, template)
    if tokenizer is None:
        tokenizer = _trained(config, tasks, template)
    elif tokenizer.eos_token_id is None:
        raise ConfigError(
            "data.tokenizer: the tokenizer has no end-of-text token (eos_token), which separates "
            "documents; must be one that has, or train"
        )
    if template is not None:
        check_template(tokenizer, template, "data.chat_template")
        own = tokenizer.chat_template
        differs = disagreement(template, own) if isinstance(own, str) else None
        if differs is not None:
            log.warning("data.chat_template: %s", differs)
        tokenizer.chat_template = template
    with atomic_directory(directory / "tokenizer", replace=True) as temporary:
        tokenizer.save_pretrained(temporary)
    encoding = Encoding(
        directory / "tokenizer",
        directory_digest(directory / "tokenizer"),
        template,
        config.on_error == "skip",
        config.max_characters,
        tuple(known["versions"].values()),
    )
    made = _parts(config, tasks, encoding, directory / "parts", size, inline)
    stores = {}
    for name, parts in made.items():
        whole = total(summary for _, summary in parts)
        _describe(name, config, whole)
        stores[name] = TokenStore(
            [directory / "parts" / p for p, _ in parts], [s for _, s in parts]
        )
        if not whole.documents:
            raise ConfigError(f"data.sources.{name}: there is no text in it; must have some")
    fingerprint = digest([known, {name: [p for p, _ in parts] for name, parts in made.items()}])
    data = PreparedData(config, directory, tokenizer, stores, fingerprint, vocabulary)
    write_json(
        directory / "text.json",
        {name: each.with_checksums().to_json() for name, each in found.items()},
        None,
    )
    summary = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "known": known,
        "parts": {name: [part for part, _ in parts] for name, parts in made.items()},
    }
    write_json(directory / "data.json", summary)
    small = [path for path in (directory / "tokenizer").rglob("*") if path.is_file()]
    names = [path.relative_to(directory).as_posix() for path in small]
    Seals.of(directory, names=["data.json", "text.json", *names]).write()
    return data


Made = list[tuple[str, PartSummary]]
"""Names and summaries of a source's parts, in the order of its text."""


def _parts(
    config: DataConfig,
    tasks: dict[str, list[PartTask]],
    encoding: Encoding,
    directory: Path,
    size: int,
    inline: bool,
) -> dict[str, Made]:
    """Make all parts of all sources.

    Raises:
        ConfigError: what a process raises, too many bad records, or too many tokens.
    """
    made: dict[str, Made] = {}
    tokens = 0
    with (
        _processes(config, tasks, size) as run,
        Bar(
            desc="prepare",
            total=size or None,
            unit="B",
            unit_scale=True,
            disable=size < INLINE_BYTES,
        ) as bar,
    ):
        for name, own in tasks.items():
            wanted = config.sources[name].target_tokens
            # Of a part of the text, parts from all over it: files may be sorted.
            order = list(range(len(own)))
            if wanted is not None:
                order.sort(key=lambda n: digest([name, n]))
            found: dict[int, tuple[str, PartSummary]] = {}
            seen = total([])
            for number, result in zip(
                order, run([own[n] for n in order], encoding, directory), strict=False
            ):
                found[number] = result
                seen = total([seen, result[1]])
                tokens += result[1].tokens
                bar.update(own[number].bytes)
                _require_good(name, config, seen, least=100)
                if inline:
                    _require_few(config, tokens)
                if wanted is not None and seen.tokens >= wanted:
                    break
            made[name] = [found[number] for number in sorted(found)]
    return made


Runner = Callable[[list[PartTask], Encoding, Path], Iterator[tuple[str, PartSummary]]]


@contextmanager
def _processes(config: DataConfig, tasks: dict[str, list[PartTask]], size: int) -> Iterator[Runner]:
    """How parts are made: here one after another, or by several processes."""
    count = min(config.workers or os.cpu_count() or 1, sum(map(len, tasks.values())))
    if count <= 1 or size <= INLINE_BYTES:
        yield lambda own, encoding, directory: (make_part(t, encoding, directory) for t in own)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=be_a_worker) as pool:

        def run(
            own: list[PartTask], encoding: Encoding, directory: Path
        ) -> Iterator[tuple[str, PartSummary]]:
            waiting = {}
            for number in range(len(own)):
                for ahead in range(number, min(number + 2 * count, len(own))):
                    if ahead not in waiting:
                        waiting[ahead] = pool.submit(make_part, own[ahead], encoding, directory)
                yield waiting.pop(number).result()

        try:
            yield run
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _expected(tasks: list[PartTask]) -> int:
    """About how many tokens a source will have."""
    tokens = sum(task.bytes for task in tasks) // BYTES_PER_TOKEN
    wanted = [task.config.target_tokens for task in tasks if task.config.target_tokens is not None]
    return min([tokens, *wanted])


def _require_few(config: DataConfig, tokens: int) -> None:
    """A cluster does not wait for one machine to read the world."""
    if tokens > config.prepare_inline_tokens:
        raise ConfigError(
            f"data.prepare_inline_tokens={config.prepare_inline_tokens}: about {tokens:,} tokens "
            "or more are to be prepared first; run elastic prepare with the settings of this run, "
            "or raise it to have them prepared by the run itself"
        )


def _require_good(name: str, config: DataConfig, seen: PartSummary, least: int) -> None:
    """Refuse a source of whose first records, `least` at any rate, too many are bad."""
    bad = sum(seen.skipped.values())
    if seen.records >= least and bad > config.max_skip_fraction * max(seen.records, 1):
        kind = max(seen.skipped, key=lambda each: seen.skipped[each])
        raise ConfigError(
            f"data.max_skip_fraction={config.max_skip_fraction:g}: {bad:,} of {seen.records:,} "
            f"records of data.sources.{name} cannot be read, {seen.skipped[kind]:,} of them "
            f"{kind}: {seen.first_skipped[kind]}; must be put right, or allow more"
        )


def _describe(name: str, config: DataConfig, whole: PartSummary) -> None:
    """Say what was left out, if it may be."""
    _require_good(name, config, whole, least=0)
    for kind, count in sorted(whole.skipped.items()):
        log.warning(
            "data.sources.%s: %d records are left out, %s: %s",
            name, count, kind, whole.first_skipped[kind],
        )  # fmt: skip
    if whole.empty:
        log.warning(
            "data.sources.%s: %d of %d documents are empty and left out",
            name, whole.empty, whole.records,
        )  # fmt: skip


def _trained(
    config: DataConfig, tasks: dict[str, list[PartTask]], template: str | None
) -> PreTrainedTokenizerBase:
    """A tokenizer made for the training text of all sources."""
    controls = [] if template is None else spelled_tokens(template)
    skips = config.on_error == "skip"
    chat = None
    if template is not None:  # one that knows bytes and control tokens renders as any other
        chat = ChatTemplate.of(train_tokenizer([], 256 + 8 + len(controls), controls), template)

    def texts() -> Iterator[str]:
        for own in tasks.values():
            count = sum(1 for task in own for _ in Reading(task, skips, config.max_characters))
            every = config.held_out_every(count)
            left = TRAINING_CHARACTERS // len(tasks)
            read = (each for task in own for each in Reading(task, skips, config.max_characters))
            for number, document in enumerate(read, start=1):
                if number % max(every, 2) == 0:
                    continue
                if left <= 0:
                    break
                left -= document.characters
                if document.text is not None:
                    yield document.text
                    continue
                assert chat is not None and document.messages is not None
                with suppress(BadRecord):  # the part that it is in will say so, or count it
                    yield chat.render(document.messages, document.tools)

    return train_tokenizer(texts(), config.tokenizer_vocab, controls)


def _template(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, given: str | None
) -> str | None:
    """The template of the run: the one that was given, or the tokenizer's own; None where there is
    no chat."""
    if not config.chat:
        return None
    own = None if tokenizer is None else tokenizer.chat_template
    template = given if given is not None else own
    if not isinstance(template, str):
        raise ConfigError(
            f"data.chat_template=null: the tokenizer {config.tokenizer} has no single template of "
            "its own; must be a file, or chatml"
        )
    return template
