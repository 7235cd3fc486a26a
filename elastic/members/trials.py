"""Which trials rank the layers, and which process makes which. No torch.

A trial runs the network without one of its layers. A round tries every candidate that is left; then
the least important is dropped, and the next round begins. All trials of a round share what comes
before their layer with the network of that round: going through its layers in order, a trial of
layer i costs the layers behind i alone, half the network on average.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Round:
    """One round of trials; layers by their index in the parent, in the network's order."""

    layers: tuple[int, ...]
    """Of the network at hand."""
    tried: tuple[int, ...]
    """Those of them that are left out, one at a time."""

    @classmethod
    def after(cls, count: int, candidates: Sequence[int], dropped: Collection[int]) -> "Round":
        """The round that follows when `dropped` of a parent's `count` layers are gone."""
        return cls(
            tuple(layer for layer in range(count) if layer not in dropped),
            tuple(sorted(set(candidates) - set(dropped))),
        )

    def share_out(self, rows: Sequence[int], processes: int) -> list[dict[int, list[int]]]:
        """For every process: batch -> the layers that it leaves out of passes over that batch.

        All trials of all batches in a row, batch by batch and in the network's order, are cut into
        stretches of about the same cost. By batches alone, processes beyond their number would
        wait; by layers alone, each would go through the whole network with every batch. What a
        trial finds does not depend on who makes it.

        Args:
            rows: sequences of every batch.
        """
        place = {layer: position for position, layer in enumerate(self.layers)}
        trials = [(batch, layer) for batch in range(len(rows)) for layer in self.tried]
        costs = [rows[batch] * (len(self.layers) - place[layer]) for batch, layer in trials]
        shares: list[dict[int, list[int]]] = [{} for _ in range(processes)]
        ends = list(accumulate(costs))
        for (batch, layer), cost, end in zip(trials, costs, ends, strict=True):
            process = (2 * end - cost) * processes // (2 * ends[-1])  # where its middle lies
            shares[process].setdefault(batch, []).append(layer)
        return shares

    def work(self, tried: Sequence[int], costs: Sequence[int]) -> int:
        """What the layers cost that run for trials of some of them, at least one and in order;
        `costs` are those of all layers of the parent."""
        before, whole = {}, 0
        for layer in self.layers:
            before[layer] = whole
            whole += costs[layer]
        return before[tried[-1]] + sum(whole - before[layer] - costs[layer] for layer in tried)


def rounds(
    count: int, candidates: Sequence[int], order: Sequence[int], method: str
) -> Iterator[Round]:
    """The rounds that find `order`, by `importance.depth_method`: what ranking costs, once its
    outcome is known or assumed."""
    for done in range(min(len(order), 1) if method == "one_pass" else len(order)):
        yield Round.after(count, candidates, order[:done])
