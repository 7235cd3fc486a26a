"""objective.teacher -> a teacher."""

from pathlib import Path

from elastic.config import ObjectiveConfig
from elastic.config.checks import require
from elastic.parent import HybridParent
from elastic.teacher.base import Teacher
from elastic.teacher.cache.index import Contents
from elastic.teacher.cached import StoredTeacher
from elastic.teacher.online import LiveTeacher
from elastic.teacher.streamed import HostHome, SharedHome, StreamedTeacher


def check_teacher(teacher: str, world_size: int) -> None:
    """Raise ConfigError for a teacher that so many processes cannot have."""
    require(
        teacher != "zero3" or world_size > 1,
        "objective.teacher",
        teacher,
        "replicated or cpu_offload in one process: there is nobody to share the weights with",
    )


def build_teacher(
    objective: ObjectiveConfig,
    parent: HybridParent | None,
    precision: str,
    document_start: int | None,
    world_size: int,
    rank: int = 0,
    wanted: Contents | None = None,
) -> Teacher:
    """The frozen teacher of a run; nothing of it is on a device or shared out before its `start`.

    Args:
        parent: the unsorted parent, in float32 on the host; copied. A stored teacher needs none.
        precision: as trainer.precision.
        document_start: the token that begins a document, where documents are apart.
        rank: of this process; the first looks at every file of a store.
        wanted: what a store must hold; a stored teacher's alone.

    Raises:
        ConfigError: one process has nobody to share with, or the store is not this run's.
    """
    check_teacher(objective.teacher, world_size)
    if objective.teacher == "stored":
        assert objective.store is not None and wanted is not None
        return StoredTeacher(Path(objective.store), wanted, thorough=rank == 0)
    assert parent is not None and wanted is None
    if objective.teacher == "replicated":
        return LiveTeacher(parent, precision, document_start)
    home = SharedHome if objective.teacher == "zero3" else HostHome
    return StreamedTeacher(parent, precision, document_start, home)
