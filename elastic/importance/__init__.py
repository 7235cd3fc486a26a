"""Importance: collect activation statistics, score, rank, and sort the parent once."""

from elastic.importance.rank import Ranking, rank, read_orders
from elastic.importance.score import Orders
from elastic.importance.sort import sort_parent

__all__ = ["Orders", "Ranking", "rank", "read_orders", "sort_parent"]
