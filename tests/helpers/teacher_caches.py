"""A run that reads a cache, small: a random parent, real text of two sources, two stages, one of
several epochs."""

from dataclasses import dataclass
from pathlib import Path

from helpers.runs import SMALL_PARENT, SMALL_SPACE, STDLIB, stage
from helpers.strategies import random_parent
from hydra import compose, initialize_config_dir

from elastic.cli.command import CONF
from elastic.config import CacheTeacherConfig, parse
from elastic.data import PreparedData, TextDataModule, prepare_data
from elastic.parent.stock import read_config, read_shape
from elastic.parent.weights import save_parent
from elastic.routing.curriculum import Stage, plan
from elastic.routing.text import stage_texts
from elastic.teacher import CacheContents, CachedTeacher, cache_contents, cache_places
from elastic.teacher.cache.index import text_of


@dataclass(frozen=True)
class Case:
    """Settings of one run and what they mean."""

    config: CacheTeacherConfig
    overrides: list[str]
    data: PreparedData
    stages: dict[str, Stage]
    """All of them, by name; those of mode elastic have a teacher."""
    teacher: Path

    @property
    def cache(self) -> Path:
        return Path(self.config.objective.teacher_cache or "")

    def wanted(self) -> CacheContents:
        vocabulary = read_shape(read_config(self.teacher)).vocab_size
        stages = list(self.stages.values())
        return cache_contents(self.config, stages, self.data, self.teacher, vocabulary)

    def read(self, cache: Path, wanted: CacheContents | None = None) -> CachedTeacher:
        """A cache, as this run reads it."""
        places = cache_places(self.config, list(self.stages.values()), self.data)
        return CachedTeacher(cache, wanted or self.wanted(), places, thorough=True)

    def reader(self) -> CachedTeacher:
        return self.read(self.cache)

    def text(self, stage: str) -> TextDataModule:
        return text_of(self.config, stage, stage_texts(self.stages.values()), self.data)

    def sequences(self, stage: str) -> int:
        """Of the whole stage."""
        return self.stages[stage].tokens // self.stages[stage].config.sequence_length


def case_of(run_dir: Path, cache: Path, *changes: str) -> Case:
    """A case with its text and its parent in `run_dir`, and with some settings changed."""
    overrides = [
        f"run_dir='{run_dir}'",
        *SMALL_PARENT,
        *SMALL_SPACE,
        f"data.path='{STDLIB}/email/mime/[abmnt]*.py'",  # so little text that it comes thrice
        f"+data.sources.more={{kind: files, path: '{STDLIB}/ctypes/macholib/*.py', weight: 1}}",
        "+data.sources.files.weight=2",
        "data.validation_every=2",
        "curriculum.stages.pretrain.tokens=512",
        *stage("pretrain", 1),
        *stage("short", 7, length=32, batch=1024),
        *stage("long", 2, length=64, batch=512),
        "objective.top_k=7",
        "objective.temperature=1.5",
        f"objective.teacher_cache='{cache}'",
        "cache.shard_sequences=20",
        "cache.batch_tokens=192",
        "cache.log_probs=float32",
        *changes,
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = parse(compose("cache_teacher", overrides), CacheTeacherConfig)
    data = prepare_data(config.data, run_dir, None)
    parent = run_dir / "parent"
    if not parent.exists():
        assert config.parent.shape is not None
        parent.mkdir(parents=True)
        save_parent(random_parent(config.parent.shape), parent)
    stages = plan(config.curriculum.stages, config.trainer)
    return Case(config, overrides, data, {stage.name: stage for stage in stages}, parent)
