"""Whether a stage fits into a device's memory and, where it does not, the smallest change with
which it would: found by trying the changes, the cheapest first."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from elastic.config import ConfigError, ParentShape, PlanConfig, StageConfig
from elastic.config.training import STRATEGIES
from elastic.members.architecture import Architecture, Space
from elastic.plan.blocks import soft_axes
from elastic.plan.memory import (
    Pass,
    Run,
    Static,
    held_parameters,
    host_memory,
    on_gpu,
    pass_memory,
    router_weights,
    static_memory,
)
from elastic.plan.training import stage_work
from elastic.routing.curriculum import Stage, plan

GIB = 2**30
SMALL_CHUNK = 512
"""Tokens of a chunk of the loss that are still enough for its matrix products."""
CHANGES = (
    "trainer.micro_batch_tokens", "objective.chunk_tokens", "trainer.strategy",
    "parent.activation_checkpointing", "objective.teacher=zero3", "trainer.offload_optimizer",
    "objective.teacher=cpu_offload", "GPUs",
)  # fmt: skip
"""What may be changed, the cheapest first. Smaller passes and chunks cost efficiency, a higher ZeRO
stage traffic, checkpointing a third more compute, a teacher that is shared out traffic in every
pass, and host memory is the slowest of all; more GPUs cost money. `offline` and `in_place` teachers
change the loss and are left to people."""


def limit_of(config: PlanConfig) -> float:
    """Bytes that a process can have: of its GPU, or its part of a node's memory."""
    if on_gpu(config):
        return (config.plan.gpu_gib - config.plan.reserve_gib) * GIB
    return config.plan.node_gib / config.trainer.devices * GIB


@dataclass(frozen=True)
class Setup:
    """What decides over memory."""

    gpus: int
    strategy: str
    offload: bool
    checkpointing: bool
    teacher: str
    micro_batch_tokens: int | None
    chunk_tokens: int


@dataclass(frozen=True)
class Fit:
    """Memory of one setup, in bytes."""

    static: Static
    passes: dict[str, dict[str, Pass]]
    """stage -> run -> what a pass adds."""
    host: Mapping[str, float]
    """Bytes of a node's own memory, while a stage starts and while it runs."""
    limit: float
    node_limit: float
    """Of a node's own memory, in bytes; infinite where processes are planned, not GPUs: their
    limit is a part of it already."""

    def stage_peak(self, stage: str) -> float:
        return self.static.total + max(one.peak for one in self.passes[stage].values())

    @property
    def peak(self) -> float:
        peaks = [self.stage_peak(stage) for stage in self.passes]
        return max(*peaks, self.static.total + self.static.step)

    @property
    def worst(self) -> str:
        """Where the peak is."""
        if self.static.total + self.static.step >= self.peak:
            return "optimizer step"
        stage = max(self.passes, key=self.stage_peak)
        run = max(self.passes[stage], key=lambda name: self.passes[stage][name].peak)
        return f"{stage}, {run}: {self.passes[stage][run].worst}"

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit and max(self.host.values()) <= self.node_limit


def _draws(stage: StageConfig, gpus: int) -> int:
    """Draws of a step, of which every GPU has as many sequences."""
    return math.gcd(stage.draws, max(1, stage.batch_tokens // (stage.sequence_length * gpus)))


class Fitter:
    """Memory of setups of one run; what was worked out is kept."""

    def __init__(
        self,
        config: PlanConfig,
        shape: ParentShape,
        space: Space,
        members: Mapping[str, Architecture],
    ) -> None:
        self.config, self.shape, self.space, self.members = config, shape, space, dict(members)
        self.limit = limit_of(config)
        self.node_limit = config.plan.node_gib * GIB if on_gpu(config) else math.inf
        self.parameters = held_parameters(shape)
        self._statics: dict[tuple, Static] = {}
        self._router = router_weights(config, self.space)
        self._passes: dict[tuple, Pass] = {}

    @property
    def configured(self) -> Setup:
        """The setup that the run would have."""
        trainer, objective = self.config.trainer, self.config.objective
        return Setup(
            gpus=trainer.world_size,
            strategy=trainer.strategy,
            offload=trainer.offload_optimizer,
            checkpointing=self.config.parent.activation_checkpointing,
            teacher=objective.teacher,
            micro_batch_tokens=trainer.micro_batch_tokens,
            chunk_tokens=objective.chunk_tokens,
        )

    def settings(self, setup: Setup) -> PlanConfig:
        """The run's settings with this setup; on more GPUs than have a sequence of every draw, with
        fewer draws.

        Raises:
            ConfigError: they contradict each other.
        """
        config = self.config
        devices = math.gcd(setup.gpus, config.trainer.devices)
        if setup.teacher == "zero3" and setup.gpus == 1:
            raise ConfigError("objective.teacher=zero3: one GPU has no other to share with")
        return replace(
            config,
            trainer=replace(
                config.trainer,
                devices=devices,
                num_nodes=setup.gpus // devices,
                strategy=setup.strategy,
                offload_optimizer=setup.offload,
                micro_batch_tokens=setup.micro_batch_tokens,
            ),
            parent=replace(config.parent, activation_checkpointing=setup.checkpointing),
            objective=replace(
                config.objective, teacher=setup.teacher, chunk_tokens=setup.chunk_tokens
            ),
            curriculum=replace(
                config.curriculum,
                stages={
                    name: replace(stage, draws=_draws(stage, setup.gpus))
                    for name, stage in config.curriculum.stages.items()
                },
            ),
        )

    def fit(self, setup: Setup) -> Fit:
        """Memory of a setup; raises as `settings` does."""
        config = self.settings(setup)
        key = (setup.gpus, setup.strategy, setup.offload, setup.teacher, setup.checkpointing)
        if key not in self._statics:
            self._statics[key] = static_memory(config, self.shape, self._router)
        passes = {
            stage.name: {
                run.name: self._pass(config, setup, stage, run) for run in self.runs(stage)
            }
            for stage in self.stages(config)
        }
        host = host_memory(config, self.shape)
        return Fit(self._statics[key], passes, host, self.limit, self.node_limit)

    def stages(self, config: PlanConfig) -> list[Stage]:
        return plan(config.curriculum.stages, config.trainer)

    def runs(self, stage: Stage) -> list[Run]:
        """The ways in which a stage runs the parent."""
        whole = Architecture.full(self.shape)
        if stage.config.mode == "pretrain":
            return [Run("parent", whole)]
        soft = stage_work(self.config, self.shape, stage, self.members).soft_share
        runs = []
        if soft > 0:
            axes = soft_axes(self.space.elastic_axes, self.shape.kinds)
            runs.append(Run("soft", whole, axes))
        if soft < 1:
            runs += [Run(name, member) for name, member in self.members.items()]
        return runs

    def _pass(self, config: PlanConfig, setup: Setup, stage: Stage, run: Run) -> Pass:
        live = setup.teacher not in ("offline", "in_place") and stage.config.mode == "elastic"
        zero = config.trainer.zero_stage > 0
        key = (
            stage.name, stage.batch_sequences, run.name, zero, setup.checkpointing, live,
            setup.chunk_tokens,
        )  # fmt: skip
        if key not in self._passes:
            length = stage.config.sequence_length
            sequences = stage.batch_sequences
            self._passes[key] = pass_memory(config, self.shape, run, sequences, length, live)
        return self._passes[key]

    def smallest_change(self, setup: Setup) -> tuple[Setup, list[str]] | None:
        """The setup with the cheapest changes with which it fits, and what they are called; None if
        nothing helps."""
        for changed, names in self._variants(setup):
            try:
                if self.fit(changed).fits:
                    return changed, names
            except ConfigError:
                continue
        return None

    def _variants(self, setup: Setup) -> Iterator[tuple[Setup, list[str]]]:
        """Setups with something changed: by the dearest change, then by the next dearest, and so
        on, so that nothing dear is taken where cheap changes together do."""
        longest = max(stage.sequence_length for stage in self.config.curriculum.stages.values())
        micro, stages = setup.micro_batch_tokens, STRATEGIES.index(setup.strategy)
        counts = sorted({*self.config.plan.gpus, self.config.trainer.world_size})
        options: dict[str, list[tuple[float, str, Any]]] = {
            "micro_batch_tokens": [(0, f"{CHANGES[0]}={longest}", longest)]
            if micro is None or micro > longest
            else [],
            "chunk_tokens": [(1, f"{CHANGES[1]}={SMALL_CHUNK}", SMALL_CHUNK)]
            if setup.chunk_tokens > SMALL_CHUNK
            else [],
            "strategy": [
                (2 + position / 10, f"{CHANGES[2]}={name}", name)
                for position, name in enumerate(STRATEGIES)
                if position > stages and name.startswith("zero")
            ],
            "checkpointing": [] if setup.checkpointing else [(3, f"{CHANGES[3]}=true", True)],
            "teacher": [(4, CHANGES[4], "zero3"), (6, CHANGES[6], "cpu_offload")]
            if setup.teacher == "replicated"
            else [],
            "offload": [] if setup.offload else [(5, f"{CHANGES[5]}=true", True)],
            "gpus": [
                (7 + position / 10, f"{count} GPUs", count)
                for position, count in enumerate(counts)
                if count > setup.gpus
            ],
        }
        found = []
        for taken in itertools.product(*([None, *values] for values in options.values())):
            chosen = [(name, o) for name, o in zip(options, taken, strict=True) if o is not None]
            costs = sorted((option[0] for _, option in chosen), reverse=True)
            if chosen:
                found.append((costs, chosen))
        for _, chosen in sorted(found, key=lambda entry: entry[0]):
            values = {name: option[2] for name, option in chosen}
            yield replace(setup, **values), [option[1] for _, option in chosen]
