"""objective.teacher -> a teacher."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from elastic.config import ObjectiveConfig
from elastic.config.checks import require
from elastic.parent import HybridParent
from elastic.teacher.base import Teacher
from elastic.teacher.cache.index import CacheContents
from elastic.teacher.cached import CachedTeacher
from elastic.teacher.online import OnlineTeacher
from elastic.teacher.streamed import HostWeights, PartitionedWeights, StreamedTeacher


def check_teacher(teacher: str, world_size: int) -> None:
    """Raise ConfigError for a teacher that so many processes cannot have."""
    require(
        teacher != "zero3" or world_size > 1,
        "objective.teacher",
        teacher,
        "replicated or cpu_offload in one process, which has no other to share the weights with",
    )


def build_teacher(
    objective: ObjectiveConfig,
    parent: HybridParent | None,
    precision: str,
    world_size: int,
    rank: int = 0,
    wanted: CacheContents | None = None,
    places: Mapping[str, np.ndarray] | None = None,
) -> Teacher:
    """The frozen teacher of a run; nothing of it is on a device or partitioned before its `start`.

    Args:
        parent: the unsorted parent, in float32 on the host; copied. An offline teacher needs none.
        precision: as trainer.precision.
        rank: of this process; the first looks at every file of a cache.
        wanted: what a cache must hold; an offline teacher's alone.
        places: as `cache_places`; the same.

    Raises:
        ConfigError: one process cannot partition the weights, or the cache is not this run's.
    """
    check_teacher(objective.teacher, world_size)
    if objective.teacher == "offline":
        assert objective.teacher_cache is not None
        assert wanted is not None and places is not None
        return CachedTeacher(Path(objective.teacher_cache), wanted, places, thorough=rank == 0)
    assert parent is not None and wanted is None
    if objective.teacher == "replicated":
        return OnlineTeacher(parent, precision)
    kind = PartitionedWeights if objective.teacher == "zero3" else HostWeights
    return StreamedTeacher(parent, precision, kind)
