"""Teachers: the frozen parent, and where its weights or its cached predictions are kept."""

from elastic.teacher.base import Teacher, documents_in
from elastic.teacher.build import build_teacher, check_teacher
from elastic.teacher.cache.index import CacheContents, cache_contents
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
    "check_teacher",
    "documents_in",
]
