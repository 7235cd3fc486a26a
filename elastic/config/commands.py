"""Everything that each command reads."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from elastic.config.budgets import BudgetConfig
from elastic.config.checks import ConfigError, check_names, one_of, require
from elastic.config.data import DataConfig
from elastic.config.model import (
    ImportanceConfig,
    NormsConfig,
    ParentConfig,
    RouterConfig,
    SpaceConfig,
)
from elastic.config.tasks import DIFFICULTIES, TASKS
from elastic.config.training import (
    CurriculumConfig,
    LoggerConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainerConfig,
)

RESERVED = ("parent", "temperature", "scale")
"""Names that metrics have for something else, and no budget can have."""


@dataclass(kw_only=True)
class RunConfig:
    """Settings of `elastic train`."""

    name: str
    """Name of the experiment."""
    run_dir: str
    """Where everything is written."""
    resume: bool = True
    """Go on where `run_dir` stopped; false refuses a directory that is not empty."""
    keep_stages: bool = False
    """Keep the elastic checkpoint of every stage's end, as `elastic-<stage>`."""
    seed: int = 0
    parent: ParentConfig
    budgets: dict[str, BudgetConfig]
    space: SpaceConfig
    importance: ImportanceConfig
    norms: NormsConfig
    router: RouterConfig
    objective: ObjectiveConfig
    curriculum: CurriculumConfig
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    logger: LoggerConfig

    @property
    def members_given(self) -> bool:
        """Whether settings give the members, and no router decides."""
        return any(budget.architecture is not None for budget in self.budgets.values())

    def __post_init__(self) -> None:
        require(bool(self.budgets), "budgets", dict(self.budgets), "at least one budget")
        check_names("budgets", self.budgets, RESERVED)
        for name, budget in self.budgets.items():
            budget.check(f"budgets.{name}")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(
            self.curriculum.start == "parent" or not self.norms.own,
            "norms.own",
            self.norms.own,
            "false with curriculum.start=random: own norms start from the parent's energies",
        )
        for name, stage in self.curriculum.stages.items():
            where = f"curriculum.stages.{name}"
            _check_listed(f"{where}.budget_probabilities", stage.budget_probabilities, self.budgets)
            given = stage.budget_probabilities
            drawn = sum(given.get(n, 0) > 0 for n in self.budgets) if given else len(self.budgets)
            require(
                stage.budgets_per_batch <= drawn,
                f"{where}.budgets_per_batch",
                stage.budgets_per_batch,
                f"at most {drawn}, the budgets that are drawn in this stage",
            )
            micro, processes = self.trainer.micro_batch_tokens, self.trainer.world_size
            require(
                micro is None or micro >= stage.sequence_length,
                "trainer.micro_batch_tokens",
                micro,
                f"at least one sequence of {where}, {stage.sequence_length} tokens",
            )
            unit = stage.sequence_length * processes
            require(
                stage.batch_tokens % unit == 0,
                f"{where}.batch_tokens",
                stage.batch_tokens,
                f"a multiple of {unit} = 1 sequence x {processes} processes; the nearest is "
                f"{max(1, round(stage.batch_tokens / unit)) * unit}",
            )
            each = stage.batch_tokens // unit
            require(
                each % stage.draws == 0,
                f"{where}.draws",
                stage.draws,
                f"a divisor of {each}, the sequences that each of {processes} process(es) has in a "
                "step",
            )
            for source in stage.weights or {}:
                require(
                    source in self.data.sources,
                    f"{where}.weights",
                    source,
                    f"of data.sources: {', '.join(self.data.sources)}",
                )
        groups, processes = self.router.noise_groups, self.trainer.world_size
        require(
            processes % groups == 0,
            "router.noise_groups",
            groups,
            f"a divisor of the number of processes, {processes}",
        )
        require(
            self.trainer.strategy != "zero3" or self.parent.activation_checkpointing,
            "parent.activation_checkpointing",
            self.parent.activation_checkpointing,
            "true with trainer.strategy=zero3: gathered weights would otherwise stay until the "
            "backward pass; zero2 needs none",
        )
        if self.data.tokenizer == "parent" and self.parent.path is None:
            raise ConfigError(
                "data.tokenizer=parent: a parent built from parent.shape has none; "
                "must be train, or a path or hub id"
            )
        pretrains = any(stage.mode == "pretrain" for stage in self.curriculum.stages.values())
        if self.parent.path is None and not pretrains:
            raise ConfigError(
                "curriculum.stages: a parent built from parent.shape is random; "
                "must start with a pretrain stage, or set parent.path"
            )


def _check_listed(
    key: str, probabilities: Mapping[str, float] | None, budgets: Collection[str]
) -> None:
    """A stage that lists probabilities lists every budget: another would silently never be drawn.

    Raises:
        ConfigError: it lists others. Its message has settings that can be given as they stand: the
            shares that are listed, in proportion, and 0 for a budget that is not.
    """
    if probabilities is None:
        return
    unknown = [name for name in probabilities if name not in budgets]
    unlisted = [name for name in budgets if name not in probabilities]
    if not unknown and not unlisted:
        return
    wrong = [f"{name} is no budget (those are {', '.join(budgets)})" for name in unknown]
    wrong += [f"the budget {name} is not listed and would never be drawn" for name in unlisted]
    shares = _shares({name: probabilities.get(name, 0.0) for name in budgets})
    listed = ",".join(f"{name}:{share:g}" for name, share in shares.items())
    removed = "".join(f" '~{key}.{name}'" for name in unknown)
    raise ConfigError(
        f"{key}={dict(probabilities)}: {'; '.join(wrong)}; give each budget a share, 0 for never: "
        f"'+{key}={{{listed}}}'{removed}, or draw all alike: {key}=null"
    )


def _shares(weights: dict[str, float]) -> dict[str, float]:
    """Weights in proportion, to four decimals that sum to 1; all alike where all are 0."""
    total = sum(weights.values())
    if total == 0:
        weights, total = dict.fromkeys(weights, 1.0), float(len(weights))
    shares = {name: round(weight / total, 4) for name, weight in weights.items()}
    largest = max(shares, key=lambda name: shares[name])
    shares[largest] = round(shares[largest] + 1 - sum(shares.values()), 4)
    return shares


@dataclass(kw_only=True)
class CacheConfig:
    """How `elastic cache-teacher` writes its cache."""

    shard_sequences: int = 64
    """Sequences per file; a worker holds one file's in memory, and loses no more when killed."""
    log_probs: str = "float16"
    """Type of the cached log-probabilities; or float32."""
    batch_tokens: int = 8192
    """Tokens per forward pass of the teacher, rounded down to whole sequences; at least one."""
    worker: int = 0
    """Number of this process among `workers`; each writes files of its own."""
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("shard_sequences", "batch_tokens", "workers"):
            require(getattr(self, name) > 0, f"cache.{name}", getattr(self, name), "positive")
        one_of("cache.log_probs", self.log_probs, ("float16", "float32"))
        require(
            0 <= self.worker < self.workers,
            "cache.worker",
            self.worker,
            f"at least 0 and below cache.workers={self.workers}",
        )


@dataclass(kw_only=True)
class CacheTeacherConfig(RunConfig):
    """Everything `elastic cache-teacher` reads: the run that the cache is for, so that the
    order of its text is that run's, and how to write."""

    cache: CacheConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.objective.teacher == "offline",
            "objective.teacher",
            self.objective.teacher,
            "offline: the cache is for such a run",
        )


@dataclass(kw_only=True)
class PrepareConfig(RunConfig):
    """Everything `elastic prepare` reads: the run whose text it is."""

    preview: int = 0
    """Sequences of every stage to print, as training sees them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.preview >= 0, "preview", self.preview, "at least 0")


@dataclass(kw_only=True)
class ExtractConfig:
    """Settings of `elastic extract`."""

    checkpoint: str
    """Directory of the elastic checkpoint."""
    budget: str
    """Name of the member to cut."""
    output: str
    """Directory to create."""
    export: str = "native"
    """How a member whose layers of one kind differ in size is stored: `native` refuses it, `padded`
    fills up with zeros to the widest, `per_layer` keeps the sizes, for a model of this package.
    Others are native in any case."""
    dtype: str = "source"
    """`source` keeps the stored type; float32, bfloat16 or float16 convert, but never round A_log,
    D and dt_bias."""
    allow_dt_limit: bool = False
    """Store a parent with another `time_step_limit` than the published none as `native` or `padded`
    too: stock transformers then computes something else, and the result is verified against the
    model of this package."""
    verify: bool = True
    """Re-open the result with stock transformers and compare its logits with the masked
    parent's."""
    max_shard_bytes: int = 1_000_000_000
    """Largest safetensors file written."""

    def __post_init__(self) -> None:
        one_of("export", self.export, ("native", "padded", "per_layer"))
        one_of("dtype", self.dtype, ("source", "float32", "bfloat16", "float16"))
        require(self.max_shard_bytes > 0, "max_shard_bytes", self.max_shard_bytes, "positive")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything `python -m elastic.evaluate` reads."""

    run_dir: str
    """Run whose elastic checkpoint and report text are used."""
    stage: str | None = None
    """Measure the checkpoint that a run with `keep_stages` has kept at the end of this stage; null
    is the run's last one."""
    members: str | None = None
    """Directory with one extracted checkpoint per budget, named after it; what is not there is cut
    in memory."""
    sequences: int = 64
    """Sequences of that text."""
    sequence_length: int = 512
    """Tokens per sequence."""
    batch_size: int = 8
    prompts: list[str] = field(default_factory=list)
    """Beginnings that the smallest member continues."""
    new_tokens: int = 48
    """Tokens generated after each prompt."""
    tasks: list[str] = field(default_factory=list)
    """What every member and the parent answer besides: `arithmetic`, for a run on conversations."""
    problems: int = 32
    """Problems of a task per family and difficulty, none of which any run was trained on; fewer
    where there are no more."""
    difficulties: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Of the problems, from 1 to 8."""
    answer_tokens: int = 384
    """Tokens that an answer may have, with its thoughts; one that is longer is wrong."""
    output: str | None = None
    """Where the JSON goes; null is `run_dir`/family.json."""

    def __post_init__(self) -> None:
        require(all(self.prompts), "prompts", self.prompts, "texts of at least a character each")
        positive = ("sequences", "sequence_length", "batch_size", "new_tokens")
        for name in (*positive, "problems", "answer_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for task in self.tasks:
            one_of("tasks", task, TASKS)
        require(bool(self.difficulties), "difficulties", self.difficulties, "at least one")
        for name in ("tasks", "difficulties"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), name, given, "different ones")
        for difficulty in self.difficulties:
            least, most = DIFFICULTIES[0], DIFFICULTIES[-1]
            require(
                difficulty in DIFFICULTIES, "difficulties", difficulty, f"from {least} to {most}"
            )
