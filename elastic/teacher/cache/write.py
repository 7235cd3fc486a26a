"""Write the teacher's top-k log-probabilities for a run's text: resumable, by any number of
workers."""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from elastic.config import CacheTeacherConfig, ConfigError
from elastic.console import Bar
from elastic.data import PreparedData, check_vocabulary, prepare_data
from elastic.losses import check_objective
from elastic.parent.ssd import resolve_kernels
from elastic.parent.stock import read_config, read_shape
from elastic.parent.weights import load_parent, locate
from elastic.routing.curriculum import Stage, plan
from elastic.routing.text import stage_texts
from elastic.storage.files import refuse_inside, run_folders
from elastic.teacher import OnlineTeacher, cache_contents
from elastic.teacher.base import SPLITS
from elastic.teacher.cache.compute import TopKWriter, Windows
from elastic.teacher.cache.index import INDEX, CacheContents, CacheIndex, text_of
from elastic.teacher.cache.shards import ShardSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One file to write."""

    shards: ShardSet
    number: int

    @property
    def bytes(self) -> int:
        return self.shards.bytes(self.number)

    @property
    def tokens(self) -> int:
        return len(self.shards.rows(self.number)) * self.shards.sequence_length


def write_cache(config: CacheTeacherConfig) -> None:
    """Write what this worker has to and is not there yet.

    Raises:
        ConfigError: there is no teacher yet, the cache is of another run, or does not fit the disk.
    """
    source = teacher_directory(config)
    shape = read_shape(read_config(source))
    check_objective(config.objective, shape.vocab_size)
    device = _device(config)
    kernels = resolve_kernels(config.parent.kernels, device)
    data = _text(config)
    check_vocabulary(data.tokenizer, shape.vocab_size)
    stages = plan(config.curriculum.stages, config.trainer)
    contents = cache_contents(config, stages, data, source, shape.vocab_size)
    directory = Path(config.objective.teacher_cache or "")
    run_dir = Path(config.run_dir)
    refuse_inside("objective.teacher_cache", directory, source, *run_folders(run_dir))
    index = index_for(directory, config, contents)
    tasks = _tasks(directory, index, list(contents.stages))
    missing = [task.shards.fault(task.number) is not None for task in tasks]
    needed = sum(task.bytes for task, absent in zip(tasks, missing, strict=True) if absent)
    _require_space(directory, needed)
    _publish(directory, index, config.cache.worker)
    worker = slice(config.cache.worker, None, config.cache.workers)
    mine = [task for task, absent in zip(tasks[worker], missing[worker], strict=True) if absent]
    _describe(config, contents, source)
    log.info(
        "%d of %d files are missing, %s bytes; worker %d of %d writes %d files",
        sum(missing), len(tasks), f"{needed:,}", config.cache.worker, config.cache.workers,
        len(mine),
    )  # fmt: skip
    if mine:
        teacher = OnlineTeacher(load_parent(source, kernels), config.trainer.precision)
        _write(config, stages, data, teacher, device, mine)
    left = sum(task.shards.fault(task.number) is not None for task in tasks)
    log.info("%s", f"{left} files left to other workers" if left else "the cache is complete")


def teacher_directory(config: CacheTeacherConfig) -> Path:
    """Where the unsorted parent of a run is, trained if it has pretrain stages."""
    if any(stage.mode == "pretrain" for stage in config.curriculum.stages.values()):
        trained = Path(config.run_dir) / "parent"
        if not trained.is_dir():
            raise ConfigError(
                f"run_dir={config.run_dir}: there is no trained parent in it; run elastic train "
                "with these settings first, which stops after its pretrain stages, or use a "
                "curriculum without them and set parent.path"
            )
        return trained
    assert config.parent.path is not None  # a random parent has a pretrain stage
    return locate(config.parent.path)


def index_for(directory: Path, config: CacheTeacherConfig, contents: CacheContents) -> CacheIndex:
    """The index of a cache that covers this run too; nothing is written.

    Raises ConfigError when the cache is of another run, or written in another way.
    """
    settings = config.cache
    index = CacheIndex(contents, settings.shard_sequences, settings.log_probs)
    # Before the index is looked for: another worker may write it, and then files, at any moment.
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    if (directory / INDEX).is_file():
        stored = CacheIndex.read(directory)
        stored.require_same(directory, contents)
        for name in ("shard_sequences", "log_probs"):
            there, wanted = getattr(stored, name), getattr(settings, name)
            if there != wanted:
                raise ConfigError(
                    f"cache.{name}={wanted}: objective.teacher_cache={directory} was begun with "
                    f"{there}; must be that, or set another objective.teacher_cache"
                )
        return replace(index, contents=_both(stored.contents, contents))
    if not all(name.startswith(".") for name in names):  # a worker may be about to write the index
        raise ConfigError(
            f"objective.teacher_cache={directory}: not empty, and not a cache; choose another "
            "directory"
        )
    return index


def _publish(directory: Path, index: CacheIndex, worker: int) -> None:
    """Write the index where it is not there yet; workers may do so at the same moment."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / INDEX).is_file() and CacheIndex.read(directory) == index:
        return
    index.write(directory, worker)
    if CacheIndex.read(directory) != index:
        raise ConfigError(
            f"objective.teacher_cache={directory}: another worker has begun it with other "
            "settings; start all workers with the same"
        )


def _both(stored: CacheContents, wanted: CacheContents) -> CacheContents:
    """Contents that cover two runs of the same order."""
    stages = dict(stored.stages)
    for name, stage in wanted.stages.items():
        there = stages.get(name, stage)
        stages[name] = replace(stage, train=max(stage.train, there.train))
    return replace(wanted, stages=stages)


def _device(config: CacheTeacherConfig) -> torch.device:
    """A GPU of this machine, by the worker's number, unless the settings say cpu."""
    wanted = config.trainer.accelerator
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu: no GPU is visible; must be cpu or auto here")
    return torch.device("cuda", config.cache.worker % torch.cuda.device_count())


def _text(config: CacheTeacherConfig) -> PreparedData:
    source = None if config.parent.path is None else str(locate(config.parent.path))
    return prepare_data(config.data, Path(config.run_dir), source)


def _tasks(directory: Path, index: CacheIndex, stages: list[str]) -> list[Task]:
    """All files of some stages; validation first, which is small and soon worth looking at."""
    shard_sets = [
        ShardSet.of(directory, index, stage, split)
        for split in reversed(SPLITS)
        for stage in stages
    ]
    return [Task(shards, number) for shards in shard_sets for number in range(shards.count())]


def _require_space(directory: Path, needed: int) -> None:
    """Raise ConfigError when the disk cannot take so many bytes, those of all workers."""
    disk = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise ConfigError(
            f"objective.teacher_cache={directory}: {needed:,} bytes are to be written and {free:,} "
            "are free; must be on a larger disk, or lower objective.top_k or the stages' tokens"
        )


def _describe(config: CacheTeacherConfig, contents: CacheContents, source: Path) -> None:
    log.info(
        "teacher %s: top %d of %d tokens at temperature %g, in %s, to %s",
        source, contents.top_k, contents.vocabulary, contents.temperature,
        config.cache.log_probs, config.objective.teacher_cache,
    )  # fmt: skip
    for name, stage in contents.stages.items():
        log.info(
            "stage %s: %d different sequences of %d tokens, and %d for validation",
            name, stage.train, stage.sequence_length, stage.validation,
        )  # fmt: skip


def _write(
    config: CacheTeacherConfig,
    stages: list[Stage],
    data: PreparedData,
    teacher: OnlineTeacher,
    device: torch.device,
    tasks: list[Task],
) -> None:
    """Write files, one after the other."""
    names = {task.shards.stage for task in tasks}
    known = stage_texts(stages)
    texts = {
        text.name: Windows(text_of(config, text.name, known, data), text.sequences)
        for text in known
        if text.name in names
    }
    writer = TopKWriter(teacher, device, config.objective, config.cache.batch_tokens)
    tokens = sum(task.tokens for task in tasks)
    with Bar(desc="teacher", total=tokens, unit="tok", unit_scale=True) as bar:
        for task in tasks:
            shards, text = task.shards, texts[task.shards.stage]
            _clear(shards.path(task.number))
            slots = shards.rows(task.number)
            shards.write(task.number, writer.rows(shards, slots, text, bar.update))


def _clear(path: Path) -> None:
    """Remove what a killed worker left half-written under this name."""
    for left in path.parent.glob(f".{path.name}.tmp-*"):
        left.unlink(missing_ok=True)
