"""Resume checkpoints: what a run needs to go on as if it had never stopped."""

from elastic.training.resume.pieces import Pieces, load_state, local_pieces
from elastic.training.resume.store import CheckpointFailed, CheckpointStore, Saved, restore_random

__all__ = [
    "CheckpointFailed",
    "CheckpointStore",
    "Pieces",
    "Saved",
    "load_state",
    "local_pieces",
    "restore_random",
]
