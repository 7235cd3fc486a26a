"""Settings of training: objective, stages, data, optimizer, machines."""

from dataclasses import dataclass

from elastic.config.checks import check_names, one_of, require

TEACHERS = ("replicated", "zero3", "cpu_offload", "offline", "in_place")
"""Where the frozen parent is, or what stands in for it."""

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")
"""How processes share the work; zero1 to zero3 are DeepSpeed's (arXiv 1910.02054)."""

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
"""Ways to measure how far a student's next-token distribution is from the teacher's."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Weights of the loss terms (arXiv 2511.16664, section 3.4)."""

    distillation_weight: float = 1.0
    """Divergence from the teacher."""
    teacher: str = "replicated"
    """The frozen, unsorted parent: `replicated` on every device, `zero3` partitioned over the
    processes, `cpu_offload` in host memory and streamed block by block, or `offline`: its cached
    top-k log-probabilities, which `elastic cache-teacher` wrote. `in_place` is the full budget's
    pass over the same batch, which itself learns by cross-entropy alone."""
    teacher_cache: str | None = None
    """Directory that `elastic cache-teacher` wrote, for `offline`."""
    divergence: str = "forward_kl"
    """`forward_kl` is KL(teacher || student), `reverse_kl` KL(student || teacher), `jsd` the
    Jensen-Shannon divergence, both models weighing half."""
    top_k: int | None = None
    """Most probable tokens of the teacher that are told apart; all others count as one remainder.
    null is the whole vocabulary."""
    temperature: float = 1.0
    """Distillation temperature, for both models."""
    cross_entropy_weight: float = 0.0
    """Cross-entropy on the text itself."""
    budget_weight: float = 30.0
    """Half the square of the expected size's relative distance from the target."""
    budget_rate: float = 0.3
    """Growth per optimizer step of the price of a size that is off its target, per unit of that
    distance, which counts at most a tenth; 0 keeps the weight alone."""
    chunk_tokens: int = 2048
    """Tokens whose logits exist at one time."""

    def __post_init__(self) -> None:
        for name in ("distillation_weight", "cross_entropy_weight", "budget_weight", "budget_rate"):
            require(
                getattr(self, name) >= 0, f"objective.{name}", getattr(self, name), "at least 0"
            )
        require(
            self.distillation_weight + self.cross_entropy_weight > 0,
            "objective.distillation_weight",
            self.distillation_weight,
            "positive, or objective.cross_entropy_weight must be",
        )
        one_of("objective.teacher", self.teacher, TEACHERS)
        require(
            self.teacher != "in_place" or self.cross_entropy_weight > 0,
            "objective.cross_entropy_weight",
            self.cross_entropy_weight,
            "positive with objective.teacher=in_place: the full budget has nothing else to learn",
        )
        require(
            self.teacher != "offline" or self.teacher_cache is not None,
            "objective.teacher_cache",
            self.teacher_cache,
            "the directory that elastic cache-teacher wrote, with objective.teacher=offline",
        )
        require(
            self.teacher != "offline" or self.top_k is not None,
            "objective.top_k",
            self.top_k,
            "the cache's number of tokens with objective.teacher=offline",
        )
        one_of("objective.divergence", self.divergence, DIVERGENCES)
        if self.top_k is not None:
            require(self.top_k > 0, "objective.top_k", self.top_k, "positive, or null")
        require(self.temperature > 0, "objective.temperature", self.temperature, "positive")
        require(self.chunk_tokens > 0, "objective.chunk_tokens", self.chunk_tokens, "positive")


@dataclass(kw_only=True)
class StageConfig:
    """One stage of the curriculum."""

    mode: str = "elastic"
    """`elastic` trains all budgets together; `pretrain` the parent alone, by cross-entropy."""
    tokens: int
    """Length of the stage; rounded up to whole steps."""
    sequence_length: int
    """Tokens per sequence."""
    batch_tokens: int
    """Tokens per optimizer step, over all processes."""
    budget_probabilities: dict[str, float] | None = None
    """How much each budget counts in the mean gradient; null counts all alike."""
    draws: int = 1
    """Equal slices of a step's batch, each of which draws for itself, by strata: with 3 draws of 3
    budgets that are as probable, every step trains each of them."""
    budgets_per_batch: int = 1
    """Different budgets that a draw trains on its slice, each by its probability times this; where
    that is above 1 a budget is always trained, and its loss weighted by it."""
    model_lr: float
    """Peak learning rate of the weights."""
    router_lr: float = 1e-3
    """Peak learning rate of the routers."""
    warmup_steps: int = 0
    """Optimizer steps of linear warmup; of the first stage of a mode alone. The peak is held until
    the choices are final, and the cosine runs from there to the end of the last stage."""
    final_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    weights: dict[str, float] | None = None
    """Share of each of `data.sources` in this stage's sequences, as `weight` there; one that is not
    named has none. null takes the sources' own."""

    def check(self, where: str) -> None:
        """Raise `ConfigError` for a value that cannot work; `where` is the stage's key."""
        one_of(f"{where}.mode", self.mode, ("pretrain", "elastic"))
        for name in ("tokens", "sequence_length", "batch_tokens", "draws", "model_lr", "router_lr"):
            require(getattr(self, name) > 0, f"{where}.{name}", getattr(self, name), "positive")
        require(self.warmup_steps >= 0, f"{where}.warmup_steps", self.warmup_steps, "at least 0")
        ratio = self.final_lr_ratio
        require(0 <= ratio <= 1, f"{where}.final_lr_ratio", ratio, "in [0, 1]")
        nearest = max(1, round(self.batch_tokens / self.sequence_length)) * self.sequence_length
        require(
            self.batch_tokens % self.sequence_length == 0,
            f"{where}.batch_tokens",
            self.batch_tokens,
            f"a multiple of sequence_length={self.sequence_length}; the nearest is {nearest}",
        )
        sequences = self.batch_tokens // self.sequence_length
        require(
            sequences % self.draws == 0,
            f"{where}.draws",
            self.draws,
            f"a divisor of the {sequences} sequences of a step",
        )
        require(
            self.mode == "elastic" or self.draws == 1,
            f"{where}.draws",
            self.draws,
            "1: a pretrain stage has no budgets",
        )
        passes = self.budgets_per_batch
        require(passes >= 1, f"{where}.budgets_per_batch", passes, "at least 1")
        require(
            self.mode == "elastic" or passes == 1,
            f"{where}.budgets_per_batch",
            passes,
            "1: a pretrain stage has no budgets",
        )
        if self.weights is not None:
            require(
                min(self.weights.values(), default=-1) >= 0 and sum(self.weights.values()) > 0,
                f"{where}.weights",
                dict(self.weights),
                "non-negative, and one of them positive",
            )
        probabilities = self.budget_probabilities
        if probabilities is not None:
            key, shown = f"{where}.budget_probabilities", dict(probabilities)
            require(self.mode == "elastic", key, shown, "null: a pretrain stage has no budgets")
            total = sum(probabilities.values())
            require(
                min(probabilities.values(), default=-1) >= 0 and abs(total - 1) < 1e-6,
                key,
                shown,
                f"non-negative and sum to 1 (the sum is {total:g})",
            )


@dataclass(kw_only=True)
class CurriculumConfig:
    """Stages in the order in which they run."""

    stages: dict[str, StageConfig]
    start: str = "parent"
    """Weights that the members begin with: `parent`, the ranked and sorted parent's, or `random`,
    to see what those are worth; the parent teaches either way."""

    def __post_init__(self) -> None:
        one_of("curriculum.start", self.start, ("parent", "random"))
        check_names("curriculum.stages", self.stages)
        for name, stage in self.stages.items():
            stage.check(f"curriculum.stages.{name}")
        modes = [stage.mode for stage in self.stages.values()]
        require(
            "elastic" in modes,
            "curriculum.stages",
            list(self.stages),
            "at least one stage of mode elastic",
        )
        for (name, stage), before in zip(self.stages.items(), [None, *modes], strict=False):
            require(
                stage.mode != before or stage.warmup_steps == 0,
                f"curriculum.stages.{name}.warmup_steps",
                stage.warmup_steps,
                f"0: another {stage.mode} stage comes before, and there is no second warmup",
            )
        require(
            modes == sorted(modes, key=("pretrain", "elastic").index),
            "curriculum.stages",
            list(self.stages),
            "ordered: every pretrain stage before the first elastic one",
        )


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW."""

    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    """Largest norm of the gradient over all weights and routers."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "positive")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        require(self.gradient_clip > 0, "optim.gradient_clip", self.gradient_clip, "positive")


@dataclass(kw_only=True)
class TrainerConfig:
    """Machines and intervals."""

    accelerator: str = "auto"
    devices: int = 1
    """Processes per node."""
    num_nodes: int = 1
    strategy: str = "single"
    """`single` process; `ddp`; or DeepSpeed, which partitions over the processes: `zero1` the
    optimizer's state, `zero2` the gradients too, `zero3` the weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory and step there; zero1 to zero3 only."""
    precision: str = "32-true"
    """32-true, bf16-mixed, or bf16-true, which only zero1 to zero3 have: they keep float32 masters
    of the weights."""
    micro_batch_tokens: int | None = None
    """At most so many tokens per forward pass and process; null is the whole batch. Passes are made
    equal."""
    validate_every: int = 200
    """Optimizer steps between validations of every budget."""
    checkpoint_every: int = 200
    """Optimizer steps between resume checkpoints."""
    keep_checkpoints: int = 2
    """Resume checkpoints kept, beside one at the end of every stage."""
    max_bad_steps: int = 10
    """Steps in a row that may be skipped because loss or gradient is not finite."""
    patience: int = 30
    """Seconds without a heartbeat after which a process counts as hung."""
    log_every: int = 10
    """Optimizer steps between logged rows."""

    def __post_init__(self) -> None:
        one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        one_of("trainer.strategy", self.strategy, STRATEGIES)
        one_of("trainer.precision", self.precision, ("32-true", "bf16-mixed", "bf16-true"))
        for name in (
            "devices num_nodes validate_every checkpoint_every keep_checkpoints max_bad_steps "
            "patience log_every"
        ).split():
            require(getattr(self, name) > 0, f"trainer.{name}", getattr(self, name), "positive")
        require(
            self.zero_stage > 0 or not self.offload_optimizer,
            "trainer.offload_optimizer",
            self.offload_optimizer,
            f"false with trainer.strategy={self.strategy}; zero1, zero2 and zero3 can",
        )
        require(
            self.zero_stage > 0 or self.precision != "bf16-true",
            "trainer.precision",
            self.precision,
            f"32-true or bf16-mixed with trainer.strategy={self.strategy}: without float32 masters "
            "a step is lost in rounding, and norms, A_log and D never move; zero1, zero2 and zero3 "
            "keep masters",
        )
        if self.micro_batch_tokens is not None:
            require(
                self.micro_batch_tokens > 0,
                "trainer.micro_batch_tokens",
                self.micro_batch_tokens,
                "positive",
            )
        if self.strategy == "single":
            require(
                self.world_size == 1,
                "trainer.strategy",
                "single",
                f"ddp, zero1, zero2 or zero3 when there are {self.world_size} processes",
            )

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def zero_stage(self) -> int:
        """1 to 3 with DeepSpeed, else 0."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0


@dataclass(kw_only=True)
class LoggerConfig:
    """Where metrics go; `metrics.csv` in the run directory is always written."""

    wandb: bool = False
    """Also log to Weights & Biases; WANDB_MODE=offline keeps it local."""
    project: str = "elastic"
    entity: str | None = None
    group: str | None = None
