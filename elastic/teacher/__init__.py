"""Teachers: who says what the next token is, and where their weights or their words are kept."""

from elastic.teacher.base import Teacher, documents_in
from elastic.teacher.build import build_teacher, check_teacher
from elastic.teacher.cache.index import Contents, contents_of
from elastic.teacher.cached import StoredTeacher
from elastic.teacher.online import LiveTeacher
from elastic.teacher.streamed import StreamedTeacher

__all__ = [
    "Contents",
    "LiveTeacher",
    "StoredTeacher",
    "StreamedTeacher",
    "Teacher",
    "build_teacher",
    "check_teacher",
    "contents_of",
    "documents_in",
]
