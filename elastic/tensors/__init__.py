"""Tensors on disk: any part of one is read by byte ranges, shards are written block by block.

Nothing is memory-mapped while data moves, so that resident memory is that of a few blocks whatever
the size of the checkpoint.
"""

from elastic.tensors.ahead import ahead
from elastic.tensors.reading import BLOCK_BYTES, StoredTensor, TensorStore, assembled
from elastic.tensors.writing import Pending, write_shards

__all__ = [
    "BLOCK_BYTES",
    "Pending",
    "StoredTensor",
    "TensorStore",
    "ahead",
    "assembled",
    "write_shards",
]
