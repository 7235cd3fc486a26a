"""Draws: which budgets the batch of a step trains, and in which forward passes. No torch.

A step's batch is cut into a fixed number of equal draws. Each is given to one budget: counts
follow the budgets' shares by largest remainder, and what is left over is carried into the next
steps, so that a step has every budget as nearly in proportion as it can. Draws of one budget are
put together into one pass where a process may take that many sequences. Nothing here knows the
processes but that limit: budgets, their sequences and their noise are the same on any number.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from elastic.config import StageConfig, TrainerConfig

PARENT = "parent"
"""Name of the only member in a pretrain stage."""

PRECISION = 10_000
"""Shares are rounded to multiples of its inverse where that makes their pattern repeat."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of every process, over its part of some sequences of a step's batch."""

    budget: str
    weight: float
    """Of its loss, in the mean over all passes of an optimizer step; they sum to their number."""
    first: int
    """Place of its first sequence in the step's batch."""
    sequences: int
    """Over all processes, which share them evenly, in order."""
    noise: tuple[int, int]
    """Draw and noise group whose noise the router has."""


@dataclass(frozen=True)
class Passes:
    """Passes of all steps of a stage; they repeat after some steps."""

    cycle: tuple[tuple[Pass, ...], ...]
    turns: int
    """Passes over each sequence, one for each budget that it trains; they follow each other."""

    def of(self, step: int) -> tuple[Pass, ...]:
        """Passes of an optimizer step; their number is the same for every step."""
        return self.cycle[step % len(self.cycle)]

    @property
    def per_step(self) -> int:
        return len(self.cycle[0])

    @property
    def most_sequences(self) -> int:
        """In one pass, over all processes."""
        return max(each.sequences for step in self.cycle for each in step)


def plan_passes(stage: StageConfig, trainer: TrainerConfig, shares: Mapping[str, float]) -> Passes:
    """Passes of a stage in which budgets, largest first, are drawn by their shares.

    `all` has the gradient that `one` has on average. `sandwich` (arXiv 1903.05134) always takes
    both ends, and draws what is between.
    """
    most = None
    if trainer.micro_batch_tokens is not None:
        most = trainer.micro_batch_tokens // stage.sequence_length
    how = "pretrain" if stage.mode == "pretrain" else stage.budgets_per_batch
    sequences = stage.batch_tokens // stage.sequence_length
    sizes = sequences, trainer.world_size, stage.draws, stage.noise_groups, most
    return _plan_passes(how, tuple(shares.items()), sizes)


@lru_cache(maxsize=256)
def _plan_passes(
    how: str, shares: tuple[tuple[str, float], ...], sizes: tuple[int, int, int, int, int | None]
) -> Passes:
    sequences, processes, draws, groups, most = sizes
    kinds, chances = _kinds(how, shares)
    unit = sequences // (draws * processes)  # sequences of a draw on one process
    parts = 1
    if most is not None:  # a draw that is too large for a pass is split evenly
        parts = next(n for n in range(1, unit + 1) if unit % n == 0 and unit // n <= most)
    # From here on in units: equal parts of a draw, of which a pass takes `limit` at most.
    limit = draws * parts if most is None else most // (unit // parts)
    steps = [_chunks(counts, parts, groups, limit) for counts in apportion(chances, draws)]
    count = max(len(chunks) for chunks in steps)
    share, turns = sequences // (draws * parts), len(kinds[0])
    cycle = []
    for chunks in steps:
        passes = []
        for kind, first, units, noise in _split_to(chunks, count):
            for budget, weight in kinds[kind]:
                part = weight * count * units / (draws * parts)
                passes.append(Pass(budget, part, first * share, units * share, noise))
        cycle.append(tuple(passes))
    return Passes(tuple(cycle), turns)


Kinds = tuple[tuple[tuple[str, float], ...], ...]
"""What a draw may train: budgets and the weights of their losses, whose mean is 1."""


def _kinds(how: str, shares: tuple[tuple[str, float], ...]) -> tuple[Kinds, tuple[float, ...]]:
    """What a draw may train, and how often it does."""
    if how == "pretrain":
        return (((PARENT, 1.0),),), (1.0,)
    taken = tuple((name, share) for name, share in shares if share > 0)
    if how == "all":
        return (tuple((name, share * len(taken)) for name, share in taken),), (1.0,)
    if how == "one":
        return tuple(((name, 1.0),) for name, _ in taken), tuple(share for _, share in taken)
    (largest, _), *between, (smallest, _) = shares
    middle = [(name, share) for name, share in between if share > 0]
    total = sum(share for _, share in middle)
    kinds = tuple(((largest, 1.0), (name, 1.0), (smallest, 1.0)) for name, _ in middle)
    return kinds, tuple(share / total for _, share in middle)


@lru_cache(maxsize=256)
def apportion(shares: tuple[float, ...], draws: int) -> tuple[tuple[int, ...], ...]:
    """How many of a step's draws each share gets, step by step, until the pattern repeats.

    By largest remainder; a tie goes to the last, the smallest budget, which has most to learn. What
    one got too much or too little counts in the next step.
    """
    exact = [Fraction(share).limit_denominator(1000) for share in shares]  # a third is one
    if sum(exact) != 1 or math.lcm(*(share.denominator for share in exact)) > PRECISION:
        parts = [round(share * PRECISION) for share in shares]
        parts[parts.index(max(parts))] += PRECISION - sum(parts)
        exact = [Fraction(part, PRECISION) for part in parts]
    credit = [Fraction(0)] * len(shares)
    steps: list[tuple[int, ...]] = []
    while not steps or any(credit):
        due = [share * draws + owed for share, owed in zip(exact, credit, strict=True)]
        counts = [max(0, math.floor(value)) for value in due]
        while sum(counts) != draws:
            change = 1 if sum(counts) < draws else -1
            may = [i for i in range(len(due)) if change > 0 or counts[i] > 0]
            counts[max(may, key=lambda i: (change * (due[i] - counts[i]), i))] += change
        credit = [value - count for value, count in zip(due, counts, strict=True)]
        steps.append(tuple(counts))
    return tuple(steps)


Chunk = tuple[int, int, int, tuple[int, int]]
"""Kind, first unit, number of units, and the draw and group whose noise it has."""


def _chunks(counts: Sequence[int], parts: int, groups: int, limit: int) -> list[Chunk]:
    """The fewest passes of a step: each of one kind, of one noise group, and within the limit."""
    chunks: list[Chunk] = []
    draw = 0
    for kind, count in enumerate(counts):
        first_draw = draw
        for group, size in enumerate(_even(count, min(groups, count))):
            unit = draw * parts
            for units in _even(size * parts, -(-size * parts // limit)):
                chunks.append((kind, unit, units, (first_draw, group)))
                unit += units
            draw += size
    return chunks


def _split_to(chunks: list[Chunk], count: int) -> list[Chunk]:
    """As many chunks as are asked for: the largest is halved until there are."""
    chunks = list(chunks)
    while len(chunks) < count:
        at = max(range(len(chunks)), key=lambda i: (chunks[i][2], -i))
        kind, first, units, noise = chunks[at]
        half = -(-units // 2)
        rest = kind, first + half, units - half, noise
        chunks[at : at + 1] = [(kind, first, half, noise), rest]
    return chunks


def _even(total: int, parts: int) -> list[int]:
    """`total` in so many parts that differ by one at most; none of nothing."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def draw_seed(seed: int, purpose: str, *place: int) -> int:
    """Seed of one draw, a function of its arguments: the same on every rank, and after a resume."""
    text = "/".join(map(str, (seed, purpose, *place)))
    return random.Random(text).getrandbits(63)
