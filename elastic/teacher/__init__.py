"""Teachers: the frozen parent, and where its weights or its cached predictions are kept."""

from elastic.teacher.base import Teacher
from elastic.teacher.build import build_teacher, check_teacher
from elastic.teacher.cache.index import CacheContents, cache_contents, cache_places
from elastic.teacher.cached import CachedTeacher
from elastic.teacher.online import OnlineTeacher
from elastic.teacher.streamed import StreamedTeacher

__all__ = [
    "CacheContents",
    "CachedTeacher",
    "OnlineTeacher",
    "StreamedTeacher",
    "Teacher",
    "build_teacher",
    "cache_contents",
    "cache_places",
    "check_teacher",
]
