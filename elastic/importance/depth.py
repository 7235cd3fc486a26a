"""Which layers matter least: trials without one layer each, and the error of the logits.

The error of a trial is sum ||full - reduced||^2 / sum ||full||^2 over all logits at the chosen
positions (arXiv 2511.16664, section 3.1). Logits are linear in the final hidden states h, so that
||h W^T - g W^T||^2 = (h - g) G (h - g)^T with G = W^T W: G is worked out once, and no logits exist.
Trials share what comes before their layer, and processes share the trials: `members.trials`.
Shapes: s samples, n positions of each, b batch, t time, d hidden.
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elastic.cluster.place import ALONE, Place, add_up
from elastic.config import ImportanceConfig
from elastic.console import Bar
from elastic.data import Batch
from elastic.importance.passes import enter, gram, products, require_finite, through
from elastic.members.architecture import droppable_layers
from elastic.members.trials import Round
from elastic.parent import HybridParent

log = logging.getLogger(__name__)


def rank_layers(
    parent: HybridParent,
    calibration: Batch,
    config: ImportanceConfig,
    count: int,
    generator: torch.Generator,
    place: Place = ALONE,
) -> tuple[list[int], list[dict[int, float]]]:
    """Layers to bypass, least important first, by the normalised MSE of the logits.

    `iterative` bypasses each remaining layer on trial, drops the one that changes the original
    logits least, and repeats on the reduced model; `one_pass` ranks all by their first trial. The
    logits are compared at random positions, the same for every trial. With `order=random` nothing
    is tried.

    Args:
        parent: where it is to run, as `passes.make_ready` leaves it.
        calibration: (samples, t), the same on every process.
        place: makes a part of the trials.

    Returns `count` layer indices, and the error of every trial per round; whatever the number of
    processes, the same.

    Raises:
        ConfigError: fewer than `count` layers may be dropped.
        ValueError: logits are not finite.
    """
    shape = parent.shape
    candidates = droppable_layers(shape, config.drop_attention, config.drop_ends, count)
    order: list[int] = []
    rounds: list[dict[int, float]] = []
    if not count:
        return order, rounds
    if config.order == "random":
        mixed = torch.randperm(len(candidates), generator=generator).tolist()
        return [candidates[position] for position in mixed[:count]], rounds
    trials = Trials(parent, calibration, config, generator, place)
    one_pass = config.depth_method == "one_pass"
    total = sum(len(candidates) - done for done in range(1 if one_pass else count))
    with trials.bar(total):
        while len(order) < count:
            start = time.monotonic()
            errors = trials.errors(Round.after(len(shape.kinds), candidates, order))
            rounds.append(errors)
            ranked = sorted(errors, key=lambda layer: (errors[layer], layer))
            order.extend(ranked[:count] if one_pass else ranked[:1])
            log.info(
                "depth ranking: %d of %d layers, next is %s %d (error %.4f), %.1f s",
                len(order),
                count,
                shape.kinds[ranked[0]],
                ranked[0],
                errors[ranked[0]],
                time.monotonic() - start,
            )
    return order, rounds


def walk(
    parent: HybridParent, batch: Batch, layers: Sequence[int], tried: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """The residual stream (b, t, d) behind the last of `layers`, without each of `tried` in turn.

    What comes before a layer runs once for all trials; no more than two streams exist. Both
    sequences are in the network's order.
    """
    x, left = enter(parent, batch.inputs), list(tried)
    for position, layer in enumerate(layers):
        if left and left[0] == layer:
            yield layer, through(parent, x, layers[position + 1 :], batch.documents)
            del left[0]
            if not left:
                return
        x = through(parent, x, [layer], batch.documents)


class Trials:
    """Errors of trials of one parent on one text; arguments as of `rank_layers`."""

    @torch.no_grad()
    def __init__(
        self,
        parent: HybridParent,
        calibration: Batch,
        config: ImportanceConfig,
        generator: torch.Generator,
        place: Place,
    ) -> None:
        self.parent, self.place = parent, place
        calibration = calibration.first(config.depth_samples)
        tokens = calibration.inputs
        time_steps = tokens.shape[1]
        chosen = torch.stack(
            [
                torch.randperm(time_steps, generator=generator)[: config.depth_positions]
                for _ in tokens
            ]
        ).to(tokens.device)  # (s, n)
        self.batches = calibration.split(config.batch_size)
        self.positions = chosen.split(config.batch_size)
        self.gram = gram(parent.head_weight())  # (d, d) float64
        self.references, scale = self._references(*chosen.shape)
        require_finite(place, [("logits", scale)])
        self.scale = float(scale)
        self._bar: Bar | None = None

    def bar(self, trials: int) -> Bar:
        """Progress over so many trials, of all batches together; as far as this process makes
        them."""
        hidden = self.place.rank > 0 or not sys.stderr.isatty()
        share = -(-trials * len(self.batches) // self.place.world_size)
        self._bar = Bar(total=share, desc="rank depth", disable=hidden)
        return self._bar

    @torch.no_grad()
    def errors(self, at: Round) -> dict[int, float]:
        """Normalised error without each layer that a round tries.

        Every trial of every batch is one sum, made by one process, and these are added batch by
        batch: the processes' number changes no bit.

        Raises:
            ValueError: logits are not finite.
        """
        column = {layer: number for number, layer in enumerate(at.tried)}
        found = self.gram.new_zeros(len(self.batches), len(column))
        rows = [len(batch) for batch in self.batches]
        share = at.share_out(rows, self.place.world_size)[self.place.rank]
        with products(self.parent):
            for number, tried in share.items():
                for layer, x in walk(self.parent, self.batches[number], at.layers, tried):
                    change = self._picked(x, number) - self.references[number]
                    found[number, column[layer]] = self._energy(change)
                    if self._bar is not None:
                        self._bar.update()
        add_up(found)
        totals = found.sum(0) / self.scale
        kinds = self.parent.shape.kinds
        require_finite(
            self.place,
            (
                (f"logits without {kinds[layer]} layer {layer}", totals[number])
                for layer, number in column.items()
            ),
        )
        return dict(zip(at.tried, totals.tolist(), strict=True))

    def _references(self, samples: int, positions: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Final hidden states (b, n, d) float32 of the whole network, batch by batch, and the sum
        of the squares of all their logits; a batch is the work of one process."""
        states = self.gram.new_zeros(samples, positions, len(self.gram), dtype=torch.float32)
        found = states.split([len(batch) for batch in self.batches])
        squares = self.gram.new_zeros(len(found))
        layers = range(len(self.parent.shape.kinds))
        with products(self.parent):
            for number in range(self.place.rank, len(found), self.place.world_size):
                batch = self.batches[number]
                x = enter(self.parent, batch.inputs)
                x = through(self.parent, x, layers, batch.documents)
                found[number].copy_(self._picked(x, number))
                squares[number] = self._energy(found[number])
        add_up(states)
        add_up(squares)
        return found, squares.sum()

    def _picked(self, x: Tensor, number: int) -> Tensor:
        """Of the stream (b, t, d) behind the last layer: hidden states (b, n, d) float32 at the
        positions of a batch."""
        places = self.positions[number][..., None].expand(-1, -1, x.shape[-1])
        states: Tensor = self.parent.backbone.norm_f(x.gather(1, places))
        return states

    def _energy(self, states: Tensor) -> Tensor:
        """Sum of the squares of the logits of hidden states (b, n, d), float64."""
        wide = states.double()
        return ((wide @ self.gram) * wide).sum()
