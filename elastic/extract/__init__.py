"""Cut a member out of an elastic checkpoint: to a directory, or into memory."""

from elastic.extract.compare import VerificationError
from elastic.extract.export import extract
from elastic.extract.loading import load
from elastic.extract.slice import OpenMember, open_member

__all__ = ["OpenMember", "VerificationError", "extract", "load", "open_member"]
