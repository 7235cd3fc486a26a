"""What a teacher cache holds, so that no run reads one that is not its own."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from elastic.config import ConfigError, RunConfig
from elastic.data import PreparedData, StageText, TextDataModule, stage_text
from elastic.routing.curriculum import Stage
from elastic.routing.text import stage_texts
from elastic.storage.files import digest, write_json

FORMAT_VERSION = 3
INDEX = "cache.json"
SAMPLES = 64
"""Pieces of a large file that stand for the whole of it."""
PIECE, SMALL_FILE = 4096, 1 << 24
"""Bytes."""


@dataclass(frozen=True)
class StageEntry:
    """The text of one stage."""

    sequence_length: int
    train: int
    """Different sequences of the training text, in the order of their first use."""
    validation: int
    """Rows of the validation text."""
    order: str
    """Hash of all that the order depends on."""


@dataclass(frozen=True)
class CacheContents:
    """Teacher, cut, text and stages of a cache."""

    teacher: str
    """Hash of the teacher's checkpoint: see `checkpoint_fingerprint`."""
    top_k: int
    temperature: float
    vocabulary: int
    seed: int
    text: str
    """`PreparedData.digest`."""
    tokenizer: str
    stages: dict[str, StageEntry]


_WAYS = {
    "teacher": ("the teacher", "use the parent that the cache was written for"),
    "top_k": ("objective.top_k", "set that"),
    "temperature": ("objective.temperature", "set that"),
    "vocabulary": ("the parent's vocabulary", "use the parent that the cache was written for"),
    "tokenizer": ("data.tokenizer", "set that"),
    "text": ("the text", "restore data.*, its files, or the versions of its libraries"),
    "seed": ("seed", "set that"),
}
"""Field -> its setting or name, and what to do; in the order in which they are checked."""


@dataclass(frozen=True)
class CacheIndex:
    """`cache.json`: contents, and how the files hold them."""

    contents: CacheContents
    shard_sequences: int
    log_probs: str

    def key(self, stage: str) -> str:
        """Key in the header of every file of a stage, so that no file of another cache is read."""
        contents = asdict(self.contents)
        order = contents.pop("stages")[stage]["order"]
        return digest([FORMAT_VERSION, contents, order, self.shard_sequences, self.log_probs])

    def write(self, directory: Path, worker: int) -> None:
        """Write atomically, though another worker, even one of the same process id on another
        machine, does so too."""
        mine = directory / f".{INDEX}.{worker}"
        write_json(mine, {"format_version": FORMAT_VERSION, **asdict(self)})
        os.replace(mine, directory / INDEX)

    @classmethod
    def read(cls, directory: Path) -> "CacheIndex":
        """Raises ConfigError when there is none, or none that can be read."""
        path = directory / INDEX
        if not path.is_file():
            raise ConfigError(
                f"objective.teacher_cache={directory}: {INDEX} is not there; must be a directory "
                "that elastic cache-teacher has written, with the settings of this run"
            )
        try:
            value = json.loads(path.read_bytes())
            version = value.pop("format_version")
            if version != FORMAT_VERSION:
                raise ConfigError(
                    f"objective.teacher_cache={directory}: format_version={version}, this version "
                    f"reads {FORMAT_VERSION}; write another cache with elastic cache-teacher"
                )
            contents = value.pop("contents")
            stages = {n: StageEntry(**stage) for n, stage in contents.pop("stages").items()}
            return cls(CacheContents(**contents, stages=stages), **value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"objective.teacher_cache={directory}: {INDEX} is damaged ({error!r}); restore it, "
                "or write another cache with elastic cache-teacher"
            ) from error

    def require_same(self, directory: Path, wanted: CacheContents) -> None:
        """Raise ConfigError unless every stage is of the same teacher, cut, text and order.

        See `require_covers` for how much of a stage is there.
        """
        for field, (name, way) in _WAYS.items():
            stored, mine = getattr(self.contents, field), getattr(wanted, field)
            if stored != mine:
                raise ConfigError(
                    f"objective.teacher_cache={directory}: {name} is {mine} here and {stored} in "
                    f"the cache; {way}, or write another cache with elastic cache-teacher"
                )
        for name, stage in wanted.stages.items():
            stored_stage = self.contents.stages.get(name)
            if stored_stage is None:
                continue
            for field, setting in (
                ("sequence_length", f"curriculum.stages.{name}.sequence_length"),
                ("validation", "data.validation_sequences, as far as the text allows,"),
                ("order", f"the order of the text in stage {name}"),
            ):
                stored, mine = getattr(stored_stage, field), getattr(stage, field)
                if stored != mine:
                    raise ConfigError(
                        f"objective.teacher_cache={directory}: {setting} is {mine} here and "
                        f"{stored} in the cache; set that, or write another cache with "
                        "elastic cache-teacher"
                    )

    def require_covers(self, directory: Path, wanted: CacheContents) -> None:
        """Raise ConfigError unless every sequence of every stage has a place."""
        for name, stage in wanted.stages.items():
            stored = self.contents.stages.get(name)
            there = 0 if stored is None else stored.train
            if there < stage.train:
                raise ConfigError(
                    f"objective.teacher_cache={directory}: has {there} sequences of length "
                    f"{stage.sequence_length} for stage {name}, this run reads {stage.train}; "
                    "run elastic cache-teacher again with the settings of this run"
                )


def cache_contents(
    config: RunConfig, stages: Sequence[Stage], data: PreparedData, teacher: Path, vocabulary: int
) -> CacheContents:
    """What the cache of a run must hold; `teacher` is the checkpoint of the unsorted parent.

    Stages of mode pretrain have no teacher and are left out.
    """
    assert config.objective.top_k is not None
    texts = stage_texts(stages)
    return CacheContents(
        teacher=checkpoint_fingerprint(teacher),
        top_k=config.objective.top_k,
        temperature=config.objective.temperature,
        vocabulary=vocabulary,
        seed=config.seed,
        text=data.digest,
        tokenizer=config.data.tokenizer,
        stages={
            stage.name: _stage_contents(config, stage, texts, data)
            for stage in stages
            if stage.config.mode == "elastic"
        },
    )


def cache_places(
    config: RunConfig, stages: Sequence[Stage], data: PreparedData
) -> dict[str, np.ndarray]:
    """For every elastic stage the place in the cache of each of its sequences, in their order:
    (sequences,) int64."""
    texts = stage_texts(stages)
    return {
        text.name: data.order(texts, text.name, config.seed).first_uses(text.sequences)[1]
        for text, stage in zip(texts, stages, strict=True)
        if stage.config.mode == "elastic"
    }


def text_of(
    config: RunConfig, stage: str, texts: Sequence[StageText], data: PreparedData
) -> TextDataModule:
    """The rows of a stage, one per batch."""
    return stage_text(data, texts, stage, seed=config.seed, batch_sequences=1, step_sequences=1)


def _stage_contents(
    config: RunConfig, stage: Stage, texts: Sequence[StageText], data: PreparedData
) -> StageEntry:
    text = text_of(config, stage.name, texts, data)
    order, count = text.stream.order, stage.tokens // stage.config.sequence_length
    return StageEntry(
        sequence_length=stage.config.sequence_length,
        train=len(order.first_uses(count)[0]),
        validation=len(text.validation),
        order=digest([config.seed, stage.name, stage.config.sequence_length, order.known()]),
    )


def window_bytes(window: np.ndarray) -> bytes:
    """A row's tokens (t + 1,) as bytes, the same on every machine."""
    return window.astype("<i8").tobytes()


def _spread(count: int) -> list[int]:
    """Numbers below `count`, evenly, both ends included; at most `SAMPLES`."""
    many = min(count, SAMPLES)
    return sorted({i * (count - 1) // max(many - 1, 1) for i in range(many)})


def checkpoint_fingerprint(directory: Path) -> str:
    """Hash of a checkpoint: config.json and, of every file of weights, its name, size and contents;
    of a large one the header and samples all over, since training moves every weight."""
    total = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= SMALL_FILE:
                total.update(file.read())
                continue
            header = int.from_bytes(file.read(8), "little")
            total.update(file.read(min(header, SMALL_FILE)))
            for place in _spread(size - PIECE + 1):
                file.seek(place)
                total.update(file.read(PIECE))
    return total.hexdigest()[:16]
