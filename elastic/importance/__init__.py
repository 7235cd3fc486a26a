"""Importance: collect activation statistics, score, rank, and sort the parent once."""

from elastic.importance.rank import Ranking, rank
from elastic.importance.score import Orders
from elastic.importance.sort import sort_parent

__all__ = ["Orders", "Ranking", "rank", "sort_parent"]
