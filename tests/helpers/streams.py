"""Rows of a stream of text that processes read."""

from collections.abc import Callable


def every(batch: int, rank: int = 0, world_size: int = 1) -> Callable[[int], range]:
    """Batches of one size, one after another, shared between processes."""

    def rows(micro_step: int) -> range:
        first = (micro_step * world_size + rank) * batch
        return range(first, first + batch)

    return rows
