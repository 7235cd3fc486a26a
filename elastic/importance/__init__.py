"""Importance: collect activation statistics, score, rank, and sort the parent once."""

from elastic.importance.rank import Calibration, Ranking, rank, read_ranking
from elastic.importance.score import Orders
from elastic.importance.sort import is_sorted, sort_checkpoint, sort_parent

__all__ = [
    "Calibration",
    "Orders",
    "Ranking",
    "is_sorted",
    "rank",
    "read_ranking",
    "sort_checkpoint",
    "sort_parent",
]
