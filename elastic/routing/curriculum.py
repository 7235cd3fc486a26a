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
    passes: int
    """Forward passes over each micro-batch, one for each budget that it trains."""
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
    """Of its loss, in the mean over all passes of an optimizer step; they sum to their number."""


Passes = Sequence[Sequence[Pass]]


def plan(
    stages: Mapping[str, StageConfig], trainer: TrainerConfig, budgets: Sequence[str]
) -> list[Stage]:
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
        passes = _pass_count(stage, budgets)
        planned.append(
            Stage(
                name=name,
                index=index,
                config=stage,
                steps=steps[name],
                accumulation=passes * stage.draws * (sequences // micro),
                passes=passes,
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
    """How often each budget is drawn in a stage; uniform unless it says otherwise."""
    if stage.budget_probabilities is None:
        return {name: 1 / len(budgets) for name in budgets}
    return {name: stage.budget_probabilities.get(name, 0.0) for name in budgets}


def _micro_sequences(stage: StageConfig, trainer: TrainerConfig, sequences: int) -> int:
    """Sequences per forward pass: as many as are allowed and divide those of a draw."""
    if trainer.micro_batch_tokens is None:
        return sequences
    most = min(sequences, trainer.micro_batch_tokens // stage.sequence_length)
    return max(count for count in range(1, most + 1) if sequences % count == 0)


def _pass_count(stage: StageConfig, budgets: Sequence[str]) -> int:
    if stage.budgets_per_batch == "all":
        return sum(share > 0 for share in budget_probabilities(stage, budgets).values())
    return {"one": 1, "sandwich": 3}[stage.budgets_per_batch]


def check_budgets(
    stages: Mapping[str, StageConfig], targets: Mapping[str, Target], in_place: bool
) -> None:
    """Stop what only sizes can show; `targets` largest first.

    Raises:
        ConfigError: a sandwich with nothing to draw for its middle; an in-place teacher that is not
            in every batch.
    """
    largest, *between = list(targets)[:-1] or list(targets)
    require(
        not in_place or targets[largest].whole,
        "objective.teacher",
        "in_place",
        f"replicated unless one budget is the whole parent; budgets.{largest} asks for "
        f"{targets[largest]}",
    )
    for name, stage in stages.items():
        if stage.budget_probabilities is None:
            continue
        where = f"curriculum.stages.{name}.budget_probabilities", dict(stage.budget_probabilities)
        probabilities = budget_probabilities(stage, list(targets))
        require(
            stage.budgets_per_batch != "sandwich" or any(probabilities[n] > 0 for n in between),
            *where,
            f"positive for one of {', '.join(between)}: a sandwich draws between the ends",
        )
        require(
            not in_place or stage.budgets_per_batch != "all" or probabilities[largest] > 0,
            *where,
            f"positive for {largest}, the teacher of the others (objective.teacher=in_place)",
        )


def draw_seed(seed: int, purpose: str, *where: int) -> int:
    """Seed of one draw: the same on every process, and after a resume. `where` tells the draws of a
    purpose apart."""
    text = "/".join(map(str, (seed, purpose, *where)))
    return random.Random(text).getrandbits(63)


def draw_budgets(
    probabilities: Mapping[str, float], draws: int, seed: int, stage: int, step: int
) -> list[str]:
    """The budgets of the draws of an optimizer step: a function of its arguments.

    They are stratified, by systematic sampling: equally spaced points on the line of cumulative
    probabilities, so that each budget comes as often as its probability says, rounded up or down.
    From step to step the points move on by the golden section, so that what was rounded evens out.
    The order is random.
    """
    names = list(probabilities)
    start = random.Random(draw_seed(seed, "budget", stage)).random()
    offset = (start + step * GOLDEN) % 1.0
    ends = list(itertools.accumulate(probabilities.values()))
    picks = [
        names[min(bisect.bisect_right(ends, ends[-1] * (k + offset) / draws), len(names) - 1)]
        for k in range(draws)
    ]
    random.Random(draw_seed(seed, "budget", stage, step)).shuffle(picks)
    return picks


def step_passes(stage: Stage, probabilities: Mapping[str, float], seed: int, step: int) -> Passes:
    """The passes over the micro-batches of every draw of an optimizer step, largest budget first;
    (draws, passes).

    `probabilities` are those of every budget, largest first. `all` has the gradient that `one` has
    on average. `sandwich` (arXiv 1903.05134) always takes both ends.
    """
    draws, kind = stage.config.draws, stage.config.budgets_per_batch
    if kind == "one":
        drawn = draw_budgets(probabilities, draws, seed, stage.index, step)
        return [[Pass(name, 1.0)] for name in drawn]
    if kind == "all":
        taken = {name: share for name, share in probabilities.items() if share > 0}
        return [[Pass(name, share * len(taken)) for name, share in taken.items()]] * draws
    largest, *between, smallest = probabilities
    middles = {name: probabilities[name] for name in between}
    drawn = draw_budgets(middles, draws, seed, stage.index, step)
    return [[Pass(name, 1.0) for name in (largest, middle, smallest)] for middle in drawn]


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
