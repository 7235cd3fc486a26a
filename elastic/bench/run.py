"""bench run: the whole elastic training step under Lightning, teacher included: soft and frozen,
and with several budgets on one batch."""

import dataclasses
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from elastic.bench.measure import Timings, rounds, synchronise
from elastic.bench.result import Figures, Result, table
from elastic.bench.subjects import (
    balanced_members,
    drop_order,
    random_parent,
    random_tokens,
    shape_of,
)
from elastic.config import OptimConfig, RunBenchConfig, StageConfig, TrainerConfig
from elastic.data import Batch, one_document
from elastic.members.architecture import Space
from elastic.members.goals import Target
from elastic.members.search import Choice
from elastic.members.targets import smaller_budgets
from elastic.parent import HybridParent
from elastic.routing.curriculum import Stage, plan
from elastic.routing.family import Family
from elastic.routing.router import Router, RouterOptimizer
from elastic.teacher import OnlineTeacher
from elastic.training.module import ElasticModule

SEQUENCES = 64
"""Sequences in the random text."""


@dataclass(frozen=True)
class Variant:
    """How one fit trains."""

    frozen: bool
    passes: int
    """As `budgets_per_batch` in a stage."""
    budget: str | None = None
    """The only budget that is drawn; None draws by the stage's probabilities."""
    teacher: str = "replicated"


def measure(config: RunBenchConfig, device: torch.device) -> Result:
    """Fits of every variant in turns; a step's time is the median over those of a fit."""
    shape = shape_of(config.parent)
    choices = balanced_members(config.space, shape, config.shares)
    budgets = list(choices)
    variants = variants_of(budgets)
    bench = _Bench(config, choices, device)
    fits = {name: partial(bench.fit, variant) for name, variant in variants.items()}
    times = Timings(rounds(fits, config.repeats, "run"))
    for phase in ("soft", "frozen"):
        times.mean_of(phase, [f"{phase} {budget}" for budget in budgets])
    together = [name for name, variant in variants.items() if variant.budget is None]
    passes = {name: bench.stage(variants[name]).passes for name in together} | {"frozen": 1}
    per_budget_token = {
        "one" if name == "frozen" else name: times.median(name) / (config.batch_tokens * count)
        for name, count in passes.items()
    }
    over_one = {name: times.ratio(name, "frozen") / passes[name] for name in together}
    figures: Figures = {
        "frozen_over_soft": times.ratio("soft", "frozen"),
        "tokens_per_second": {
            name: config.batch_tokens / times.median(name) for name in ("soft", "frozen")
        },
        "seconds_per_1k_budget_tokens": {n: 1000 * s for n, s in per_budget_token.items()},
        "budget_token_over_one": over_one,
        "seconds_per_step": times.medians(),
    }
    rows = []
    for name in times.seconds:
        budget_tokens = config.batch_tokens * passes.get(name, 1)
        seconds = times.median(name)
        rows.append(
            (
                name,
                1000 * seconds,
                config.batch_tokens / seconds,
                1e6 * seconds / budget_tokens,
                times.ratio(name, "soft"),
            )
        )
    header = ("elastic step", "ms", "tokens/s", "ms per 1k budget-tokens", "over soft")
    return Result(figures, table(header, rows))


def variants_of(budgets: list[str]) -> dict[str, Variant]:
    """One budget per batch, soft and frozen, each budget by itself: its share of the draws must not
    be left to chance. Then several budgets per batch, frozen, under either teacher."""
    variants = {}
    for phase in ("soft", "frozen"):
        for budget in budgets:
            variants[f"{phase} {budget}"] = Variant(phase == "frozen", 1, budget)
    count = len(budgets)
    for passes in range(2, count + 1):
        variants[f"{passes} of {count}"] = Variant(True, passes)
    variants["all, in place"] = Variant(True, count, teacher="in_place")
    return variants


class StepTimes(Callback):
    """Seconds from the end of one optimizer step to the end of the next, whatever lies between."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        assert isinstance(module, ElasticModule)
        if module.between_steps:
            synchronise(self.device)
            self.ends.append(self.clock())

    def median(self, warmup: int) -> float:
        """Of the steps after the first `warmup`."""
        pairs = zip(self.ends[warmup - 1 :], self.ends[warmup:], strict=False)
        return statistics.median(end - start for start, end in pairs)


class _Bench:
    """What all fits share: parent, teacher, text, and the family before and after the freeze."""

    def __init__(
        self, config: RunBenchConfig, choices: dict[str, Choice], device: torch.device
    ) -> None:
        self.config, self.device = config, device
        self.shape = shape_of(config.parent)
        self.space = Space.build(config.space, self.shape)
        self.targets = {
            name: Target.params(self.shape, choice.params) for name, choice in choices.items()
        }
        self.parent: HybridParent = random_parent(config.parent, config.seed, device)
        self.teacher = OnlineTeacher(self.parent, config.precision)
        self.families = {frozen: self._family() for frozen in (False, True)}
        self.families[True].freeze(choices)
        text = random_tokens(self.shape.vocab_size, SEQUENCES, config.sequence_length, config.seed)
        self.text = text

    def _family(self) -> Family:
        """Never frozen by schedule: its router learns until it is frozen by hand."""
        config = self.config
        router_config = dataclasses.replace(config.router, freeze_at=1.0, settled_steps=0)
        generator = torch.Generator().manual_seed(config.seed)
        smaller = smaller_budgets(self.targets)
        router = Router(self.space, len(smaller), router_config, generator)
        return Family(
            self.space,
            drop_order(self.space),
            self.targets,
            router.to(self.device),
            router_config,
            config.space,
            config.objective,
        )

    def stage(self, variant: Variant) -> Stage:
        """One stage of the warm-up and the timed steps."""
        config = self.config
        stage = StageConfig(
            tokens=(config.warmup + config.steps) * config.batch_tokens,
            sequence_length=config.sequence_length,
            batch_tokens=config.batch_tokens,
            budgets_per_batch=variant.passes,
            model_lr=1e-4,
        )
        (planned,) = plan({"bench": stage}, TrainerConfig())
        return planned

    def fit(self, variant: Variant) -> float:
        """Median seconds of an optimizer step."""
        config, stage = self.config, self.stage(variant)
        objective = config.objective
        if variant.teacher == "in_place":
            weight = (
                objective.cross_entropy_weight or 1.0
            )  # the full budget learns from nothing else
            objective = dataclasses.replace(
                objective, teacher="in_place", cross_entropy_weight=weight
            )
        share = 1 / len(self.targets)
        probabilities = {
            name: share if variant.budget is None else float(name == variant.budget)
            for name in self.targets
        }
        module = ElasticModule(
            self.parent,
            self.families[variant.frozen],
            None if variant.teacher == "in_place" else self.teacher,
            RouterOptimizer(self.families[variant.frozen].router, OptimConfig()),
            stage,
            probabilities,
            objective,
            OptimConfig(),
            config.seed,
        )
        times = StepTimes(self.device, time.perf_counter)
        with _quiet():
            trainer = L.Trainer(
                accelerator="cpu" if self.device.type == "cpu" else "gpu",
                devices=1,
                precision=config.precision,  # type: ignore[arg-type]
                max_steps=stage.steps,
                max_epochs=-1,
                accumulate_grad_batches=stage.accumulation,
                limit_val_batches=0,
                callbacks=[times],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            batches: Any = self._batches(stage)
            trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
        return times.median(config.warmup)

    def _batches(self, stage: Stage) -> list[Batch]:
        """One micro-batch after another, each as often as it is passed."""
        rows = [
            torch.arange(start, start + stage.batch_sequences) % len(self.text)
            for start in range(0, stage.steps * self._sequences(stage), stage.batch_sequences)
        ]
        return [one_document(self.text[some]) for some in rows for _ in range(stage.passes)]

    @staticmethod
    def _sequences(stage: Stage) -> int:
        """Of an optimizer step."""
        return stage.config.batch_tokens // stage.config.sequence_length


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning logs much about a fit, for every one."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
