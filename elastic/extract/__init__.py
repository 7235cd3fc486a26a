"""Cut a member out of an elastic checkpoint: to a directory, or into memory."""

from elastic.extract.export import extract, load
from elastic.extract.slice import OpenMember, open_member
from elastic.extract.verify import VerificationError

__all__ = ["OpenMember", "VerificationError", "extract", "load", "open_member"]
