"""What ranking computes, and what a device needs for it: `elastic.importance`, without torch."""

import math
from dataclasses import dataclass

from elastic.config import ParentShape, RunConfig
from elastic.members.architecture import Architecture, droppable_layers
from elastic.members.cost import layer_flops, layer_sizes
from elastic.members.cut import tensor_shapes
from elastic.members.trials import rounds
from elastic.plan.blocks import Execution, blocks_of
from elastic.plan.memory import execution_of, on_gpu
from elastic.routing.sizes import Sizes

GRAM_ROWS = 16_384
"""`elastic.importance.passes.GRAM_ROWS`, without torch."""
SQUARES = 10
"""Matrices (d, d) in float64 that the eigenproblem of a norm holds at most, its workspace too."""


@dataclass(frozen=True)
class RankingWork:
    """FLOPs, forward passes alone; totals over all processes."""

    width_tokens: int
    depth_tokens: int
    """Of every trial."""
    trials: int
    """Networks without one layer."""
    widths: int
    depth: int
    busiest: int
    """Of the process that has most to do, for which the others wait."""

    @property
    def flops(self) -> int:
        return self.widths + self.depth


def ranking_work(config: RunConfig, sizes: Sizes) -> RankingWork:
    """What ranking computes, if it drops the layers in the order that stands in for its outcome.

    Left out are the eigenproblems of the basis: two of (d, d) for a process and one for each of its
    norms, at what float64 runs at.
    """
    settings, shape = config.importance, sizes.space.shape
    processes, width = config.trainer.world_size, shape.hidden_size
    layers = layer_sizes(Architecture.full(shape))

    def passed(length: int) -> list[int]:
        """A sequence through each layer."""
        return [length * layer_flops(shape, width, layer, length) for layer in layers]

    norms = len(layers) + 1 if settings.rotates(shape.tied_head) else 0
    covariances = settings.sequence_length * norms * 2 * width**2
    sequence = sum(passed(settings.sequence_length)) + covariances
    busiest = sequence * _most(_rows(settings.samples, settings.batch_size), processes)

    count = sizes.space.max_dropped
    candidates = droppable_layers(shape, settings.drop_attention, settings.drop_ends, count)
    order = sizes.drop_order[:count] if settings.order == "scores" else ()
    costs = passed(settings.depth_sequence_length)
    rows = _rows(settings.depth_samples, settings.batch_size)
    error = min(settings.depth_positions, settings.depth_sequence_length) * 2 * width**2
    depth, trials = 0, 0
    if order:  # the head's matrix by itself, on every process; then the whole network
        gram, reference = 2 * shape.vocab_size * width**2, sum(costs) + error
        depth = processes * gram + settings.depth_samples * reference
        busiest += gram + _most(rows, processes) * reference
    for at in rounds(len(layers), candidates, order, settings.depth_method):
        trials += len(at.tried)
        shares = [
            sum(
                rows[batch] * (at.work(tried, costs) + len(tried) * error)
                for batch, tried in share.items()
            )
            for share in at.share_out(rows, processes)
        ]
        depth += sum(shares)
        busiest += max(shares)
    return RankingWork(
        settings.samples * settings.sequence_length,
        settings.depth_samples * settings.depth_sequence_length,
        trials,
        settings.samples * sequence,
        depth,
        busiest,
    )


def _rows(samples: int, batch: int) -> list[int]:
    """Sequences of every batch."""
    return [min(batch, samples - done) for done in range(0, samples, batch)]


def _most(rows: list[int], processes: int) -> int:
    """Sequences of the process with most batches."""
    return sum(rows[: -(-len(rows) // processes)])


@dataclass(frozen=True)
class RankingMemory:
    """Bytes on the device of each process."""

    weights: float
    """Matrices in the type of their products, all else in float32."""
    covariances: float
    """Of every norm of the stream, in float64; their diagonals where it is only sorted."""
    widths: float
    """More, while the text passes and is measured."""
    directions: float
    """More, while the basis is worked out."""
    depth: float
    """More, while layers are tried, without the covariances."""

    @property
    def peak(self) -> float:
        measured = self.covariances + max(self.widths, self.directions)
        return self.weights + max(measured, self.depth)


def ranking_memory(config: RunConfig, shape: ParentShape) -> RankingMemory:
    """What `elastic.importance` has on a device, whatever the number of processes."""
    settings, width = config.importance, shape.hidden_size
    rotates, square = settings.rotates(shape.tied_head), 8.0 * width**2
    run = execution_of(config, settings.sequence_length)
    narrow = run.compute
    weights = sum(
        math.prod(size) * (narrow if len(size) == 2 else 4)
        for name, size in tensor_shapes(shape).items()
        if name != "lm_head.weight" or not shape.tied_head
    )
    tokens = settings.batch_size * settings.sequence_length
    # Where its norm is observed a Mamba layer runs in pieces, as under masks.
    soft = frozenset({"mamba_heads"}) if run.kernels == "mamba_ssm" else frozenset[str]()
    passed = _pass(shape, run.kernels, narrow, settings.sequence_length, soft)
    scored = max(shape.intermediate_size * ("mlp" in shape.kinds), shape.hidden_size)
    measured = max(passed, scored * (2 * narrow + 8.0)) + 8.0 * width
    wide = 4 if on_gpu(config) else 8  # of what is multiplied for a covariance or a Gram matrix
    rows = min(max(shape.vocab_size, shape.intermediate_size), GRAM_ROWS) * width * wide
    tried = settings.batch_size * settings.depth_sequence_length
    positions = min(settings.depth_positions, settings.depth_sequence_length)
    states = 4.0 * settings.depth_samples * positions * width
    trial = _pass(shape, run.kernels, narrow, settings.depth_sequence_length, frozenset())
    return RankingMemory(
        weights=weights,
        covariances=(len(shape.pattern) + 1) * (square if rotates else 8.0 * width),
        widths=tokens * measured + (square if rotates else 0),
        directions=rows + SQUARES * square if rotates else 0.0,
        depth=max(states + square + tried * (trial + 8.0 * width), rows + 2 * square),
    )


def _pass(
    shape: ParentShape, kernels: str, narrow: int, length: int, soft: frozenset[str]
) -> float:
    """Bytes per token of the largest block of a forward pass, the residual stream in float32."""
    execution = Execution(kernels, 4, narrow, length, soft)
    blocks = blocks_of(shape, Architecture.full(shape), execution).values()
    return max(block.saved_bytes + block.forward_bytes for block in blocks)
