"""Stages as pure functions: tokens seen -> where we are, which budget, which learning rate. No
torch."""

import bisect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.config import StageConfig, TrainerConfig
from elastic.config.checks import require
from elastic.members.goals import Target

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, without their whole parts, fill the line from 0 to 1 most evenly."""

ALWAYS = 1 - 1e-9
"""A budget that is more probable than this is in every draw; so rounding never draws one twice."""


@dataclass(frozen=True)
class Stage:
    """One stage with everything worked out."""

    name: str
    index: int
    config: StageConfig
    steps: int
    """Optimizer steps: the tokens, rounded up to whole steps."""
    accumulation: int
    """Forward passes per process and optimizer step: micro-batches times `passes`."""
    micro_batches: int
    """Of each draw, per process."""
    batch_sequences: int
    """Sequences per forward pass and process."""
    tokens_before: int
    """Tokens of all stages of this mode before this one."""
    tokens_of_mode: int
    """Tokens of all stages of this mode."""
    steps_before: int
    """Optimizer steps of all stages before this one, whatever their mode."""
    warm_at: float
    """Share of the tokens of this mode at which its warmup, in its first stage, is over."""

    @property
    def passes(self) -> int:
        """Forward passes over each micro-batch, one for each budget that it trains."""
        return self.config.budgets_per_batch

    @property
    def tokens(self) -> int:
        return self.steps * self.config.batch_tokens

    def progress(self, step: int) -> float:
        """Share of all tokens of this mode that were seen before optimizer step `step` of the
        stage."""
        return (self.tokens_before + step * self.config.batch_tokens) / self.tokens_of_mode


@dataclass(frozen=True)
class Pass:
    """One forward pass over a micro-batch."""

    budget: str
    weight: float
    """Of its loss, in the mean over all passes of an optimizer step; 1 on average."""


Passes = Sequence[Sequence[Pass]]


def plan(stages: Mapping[str, StageConfig], trainer: TrainerConfig) -> list[Stage]:
    """Work the configured stages out, in order."""
    steps = {n: math.ceil(stage.tokens / stage.batch_tokens) for n, stage in stages.items()}
    seen = {"pretrain": 0, "elastic": 0}
    totals = dict(seen)
    for name, stage in stages.items():
        totals[stage.mode] += steps[name] * stage.batch_tokens
    warm: dict[str, float] = {}
    planned: list[Stage] = []
    for index, (name, stage) in enumerate(stages.items()):
        warm.setdefault(stage.mode, stage.warmup_steps * stage.batch_tokens / totals[stage.mode])
        sequences = stage.batch_tokens // (stage.sequence_length * trainer.world_size * stage.draws)
        micro = _micro_sequences(stage, trainer, sequences)
        planned.append(
            Stage(
                name=name,
                index=index,
                config=stage,
                steps=steps[name],
                accumulation=stage.budgets_per_batch * stage.draws * (sequences // micro),
                micro_batches=sequences // micro,
                batch_sequences=micro,
                tokens_before=seen[stage.mode],
                tokens_of_mode=totals[stage.mode],
                steps_before=sum(earlier.steps for earlier in planned),
                warm_at=warm[stage.mode],
            )
        )
        seen[stage.mode] += planned[-1].tokens
    return planned


def budget_probabilities(stage: StageConfig, budgets: Sequence[str]) -> dict[str, float]:
    """How much each budget counts in a stage; alike unless it says otherwise."""
    if stage.budget_probabilities is None:
        return {name: 1 / len(budgets) for name in budgets}
    return {name: stage.budget_probabilities.get(name, 0.0) for name in budgets}


def inclusion(probabilities: Mapping[str, float], count: int) -> dict[str, float]:
    """How probable it is that a budget is among the `count` different ones of a draw.

    In proportion to `probabilities`, which sum to 1, but at most 1: what is above it goes to the
    others. The values sum to `count`; so many probabilities must be positive.
    """
    found = dict.fromkeys(probabilities, 0.0)
    free = {name: share for name, share in probabilities.items() if share > 0}
    while free:
        left = count - sum(found.values())
        factor = left / sum(free.values())
        always = [name for name, share in free.items() if factor * share > ALWAYS]
        if not always:
            return found | {name: factor * share for name, share in free.items()}
        for name in always:
            found[name] = 1.0
            del free[name]
    return found


def _micro_sequences(stage: StageConfig, trainer: TrainerConfig, sequences: int) -> int:
    """Sequences per forward pass: as many as are allowed and divide those of a draw."""
    if trainer.micro_batch_tokens is None:
        return sequences
    most = min(sequences, trainer.micro_batch_tokens // stage.sequence_length)
    return max(count for count in range(1, most + 1) if sequences % count == 0)


def check_budgets(
    stages: Mapping[str, StageConfig], targets: Mapping[str, Target], in_place: bool
) -> None:
    """Stop what only sizes can show; `targets` largest first.

    Raises:
        ConfigError: an in-place teacher that is not the whole parent, or not in every batch.
    """
    largest = next(iter(targets))
    require(
        not in_place or targets[largest].whole,
        "objective.teacher",
        "in_place",
        f"replicated unless one budget is the whole parent; budgets.{largest} asks for "
        f"{targets[largest]}",
    )
    for name, stage in stages.items():
        if not in_place or stage.mode == "pretrain":
            continue
        probabilities = budget_probabilities(stage, list(targets))
        teacher = "the teacher of the others (objective.teacher=in_place)"
        require(
            probabilities[largest] > 0,
            f"curriculum.stages.{name}.budget_probabilities",
            dict(stage.budget_probabilities or {}),
            f"positive for {largest}, {teacher}",
        )
        count = sum(share > 0 for share in probabilities.values())
        require(
            inclusion(probabilities, stage.budgets_per_batch)[largest] == 1,
            f"curriculum.stages.{name}.budgets_per_batch",
            stage.budgets_per_batch,
            f"so many that every draw trains {largest}, {teacher}: {count} trains all that are "
            "drawn",
        )


def draw_seed(seed: int, purpose: str, *where: int) -> int:
    """Seed of one draw: the same on every process, and after a resume. `where` tells the draws of a
    purpose apart."""
    text = "/".join(map(str, (seed, purpose, *where)))
    return random.Random(text).getrandbits(63)


def draw_budgets(
    probabilities: Mapping[str, float], count: int, draws: int, seed: int, stage: int, step: int
) -> list[list[str]]:
    """The `count` different budgets of each draw of an optimizer step, in the order of
    `probabilities`: a function of its arguments.

    Those that are in every draw (`inclusion`) apart, they are stratified, by systematic sampling.
    A draw takes equally spaced points on the line of cumulative probabilities, and so do the draws
    of a step, so that each budget comes as often as its probability says, rounded up or down. From
    step to step the points move on by the golden section, so that what was rounded evens out. The
    order of the draws is random.
    """
    shares = inclusion(probabilities, count)
    always = {name for name, share in shares.items() if share == 1}
    names = [name for name in shares if name not in always]
    start = random.Random(draw_seed(seed, "budget", stage)).random()
    offset = (start + step * GOLDEN) % 1.0
    ends = list(itertools.accumulate(shares[name] for name in names))
    points = count - len(always)
    picks = []
    for draw in range(draws):
        first = (draw + offset) / draws
        taken = always | {
            names[min(bisect.bisect_right(ends, ends[-1] * (k + first) / points), len(names) - 1)]
            for k in range(points)
        }
        picks.append([name for name in shares if name in taken])
    random.Random(draw_seed(seed, "budget", stage, step)).shuffle(picks)
    return picks


def step_passes(stage: Stage, probabilities: Mapping[str, float], seed: int, step: int) -> Passes:
    """The passes over the micro-batches of every draw of an optimizer step, largest budget first;
    (draws, passes).

    `probabilities` are those of every budget, largest first. However many budgets a draw trains,
    the gradient is on average the mean of theirs, weighted by these.
    """
    count = stage.passes
    shares = inclusion(probabilities, count)
    drawn = draw_budgets(probabilities, count, stage.config.draws, seed, stage.index, step)
    return [[Pass(n, count * probabilities[n] / shares[n]) for n in names] for names in drawn]


def learning_rate_factor(stage: Stage, step: int, held_until: float) -> float:
    """Share of the peak at optimizer step `step` of a stage: linear warmup, the peak, and from
    `held_until` a cosine down to `final_lr_ratio`.

    One schedule over all stages of a mode. `held_until` is a share of their tokens: 0 begins the
    cosine after the warmup, 1 holds the peak to the end.
    """
    warmup = stage.config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    start = max(held_until, stage.warm_at)
    passed = (stage.progress(step) - start) / max(1 - start, 1e-9)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(passed, 0.0), 1.0)))
    return stage.config.final_lr_ratio + (1 - stage.config.final_lr_ratio) * cosine
