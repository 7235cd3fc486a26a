"""What each bench reads; the figures that they print are explained in docs/performance.md."""

from dataclasses import dataclass

from elastic.config.budgets import BudgetConfig
from elastic.config.checks import one_of, require
from elastic.config.model import ParentConfig, RouterConfig, SpaceConfig
from elastic.config.training import DIVERGENCES, ObjectiveConfig

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
"""As in trainer.precision."""


@dataclass(kw_only=True)
class BenchConfig:
    """What every bench reads."""

    json: str | None = None
    """File that the figures are written to; null only prints them."""
    device: str = "auto"
    """`auto` takes a GPU where there is one."""
    repeats: int = 5
    """Timed rounds; every round runs each variant once."""
    warmup: int = 1
    """Rounds before these that are not timed; of `run`, steps at the start of every fit."""
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        self.positive("repeats")
        for name in ("warmup", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")

    def positive(self, *names: str) -> None:
        """Raise `ConfigError` unless these numbers, or all in these lists, are positive."""
        for name in names:
            value = getattr(self, name)
            numbers = value if isinstance(value, list) else [value]
            require(bool(numbers) and min(numbers) > 0, name, value, "positive")

    def check_parent(self, parent: ParentConfig) -> None:
        """Raise `ConfigError` for a parent that comes from a checkpoint."""
        path, allowed = parent.path, "null: a bench runs on random weights of parent.shape"
        require(path is None, "parent.path", path, allowed)


@dataclass(kw_only=True)
class StepBenchConfig(BenchConfig):
    """One training step: whole, sliced, masked, and that of stock transformers."""

    parent: ParentConfig
    space: SpaceConfig
    shares: list[float]
    """Sizes of the members, as shares of the parent's parameters."""
    sequences: int = 4
    """Sequences per step."""
    sequence_length: int = 512
    """Tokens per sequence."""
    precision: str = "32-true"
    chunk_tokens: int = 2048
    """Tokens whose logits exist at one time."""
    stock_chunks: list[int]
    """Chunks of the scan that stock transformers is timed with; its best counts."""
    memory: bool = True
    """Measure peak memory too, each variant in a process of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parent(self.parent)
        self.positive("sequences", "sequence_length", "chunk_tokens", "stock_chunks", "shares")
        require(max(self.shares) < 1, "shares", self.shares, "below 1: the parent is measured too")
        require(len(set(self.shares)) == len(self.shares), "shares", self.shares, "different")
        one_of("precision", self.precision, PRECISIONS)


@dataclass(kw_only=True)
class RunBenchConfig(BenchConfig):
    """The elastic training step under Lightning: soft, frozen, and several budgets at once."""

    parent: ParentConfig
    space: SpaceConfig
    router: RouterConfig
    objective: ObjectiveConfig
    shares: list[float]
    """Sizes of the budgets, as shares of the parent's parameters, largest first."""
    sequence_length: int = 512
    """Tokens per sequence."""
    batch_tokens: int = 2048
    """Tokens per optimizer step."""
    precision: str = "32-true"
    steps: int = 3
    """Timed optimizer steps of every fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parent(self.parent)
        self.positive("sequence_length", "batch_tokens", "steps", "shares")
        require(
            self.warmup > 0, "warmup", self.warmup, "at least 1: the first step of a fit is slow"
        )
        require(
            self.batch_tokens % self.sequence_length == 0,
            "batch_tokens",
            self.batch_tokens,
            f"a multiple of sequence_length={self.sequence_length}",
        )
        descending = all(a > b for a, b in zip(self.shares, self.shares[1:], strict=False))
        require(
            descending and len(self.shares) >= 2 and self.shares[0] == 1,
            "shares",
            self.shares,
            "two or more, descending from 1: the full budget teaches",
        )
        one_of("precision", self.precision, PRECISIONS)
        require(
            self.objective.teacher == "replicated",
            "objective.teacher",
            self.objective.teacher,
            "replicated: the in-place teacher is measured beside it",
        )


@dataclass(kw_only=True)
class ScanShape:
    """Sizes of one scan."""

    batch: int
    time: int
    heads: int
    channels: int
    """Per head."""
    groups: int
    state: int

    def check(self, where: str) -> None:
        """Raise `ConfigError` for sizes that are no scan; `where` is the shape's key."""
        for name, value in vars(self).items():
            require(value > 0, f"{where}.{name}", value, "positive")
        require(
            self.heads % self.groups == 0,
            f"{where}.heads",
            self.heads,
            f"a multiple of groups={self.groups}",
        )


@dataclass(kw_only=True)
class ScanBenchConfig(BenchConfig):
    """The chunked scan, forward and backward, beside that of stock transformers."""

    shapes: dict[str, ScanShape]
    """Sizes by name."""
    chunks: list[int]
    """Chunks that both scans are timed with."""
    dtype: str = "float32"
    """Of x, B and C."""
    memory: bool = True
    """Measure peak memory too, each variant in a process of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.shapes), "shapes", dict(self.shapes), "at least one shape")
        for name, shape in self.shapes.items():
            shape.check(f"shapes.{name}")
        self.positive("chunks")
        one_of("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(kw_only=True)
class LossBenchConfig(BenchConfig):
    """Distillation in chunks beside its dense twin, forward and backward."""

    tokens: int = 4096
    vocabulary: int = 131_072
    hidden: int = 256
    divergence: str = "forward_kl"
    chunk_tokens: int = 256
    """Tokens whose logits exist at one time."""
    memory: bool = True
    """Measure peak memory too, each variant in a process of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("tokens", "vocabulary", "hidden", "chunk_tokens")
        one_of("divergence", self.divergence, DIVERGENCES)


@dataclass(kw_only=True)
class ProfileBenchConfig(BenchConfig):
    """Where the time of one training step goes, and how fast it multiplies."""

    parent: ParentConfig
    space: SpaceConfig
    share: float = 1.0
    """Size of the member that is trained, sliced, as a share of the parent's parameters."""
    teacher: bool = True
    """Distil from a frozen copy of the parent; false trains on the text alone."""
    sequences: int = 4
    """Sequences per step."""
    sequence_length: int = 512
    """Tokens per sequence."""
    precision: str = "32-true"
    chunk_tokens: int = 2048
    """Tokens whose logits exist at one time."""
    square: int = 2048
    """Rows and columns of the matrices that the machine's rate is measured with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parent(self.parent)
        self.positive("sequences", "sequence_length", "chunk_tokens", "square")
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        one_of("precision", self.precision, PRECISIONS)


@dataclass(kw_only=True)
class ExtractBenchConfig(BenchConfig):
    """Cutting members out of a checkpoint of random weights, beside copying as many bytes."""

    parent: ParentConfig
    space: SpaceConfig
    budgets: dict[str, BudgetConfig]
    """The family; every member smaller than the parent is cut."""
    scale: float = 1.0
    """Factor on every width of the parent and of the space; bytes fall with its square."""
    dir: str = "."
    """Where a directory for the checkpoint and what is cut of it is made, and removed again."""
    shard_bytes: int = 4_500_000_000
    """Largest shard of the checkpoint."""
    verify: bool = True
    """Verify every member once."""
    sort: bool = True
    """Sort the whole checkpoint too."""
    keep: bool = False
    """Leave the directory behind, with the checkpoint and the last of the cuts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parent(self.parent)
        self.positive("shard_bytes")
        require(0 < self.scale <= 1, "scale", self.scale, "in (0, 1]")
        for name, budget in self.budgets.items():
            budget.check(f"budgets.{name}")
            require(
                budget.architecture is None,
                f"budgets.{name}.architecture",
                budget.architecture,
                "null: scale changes every width",
            )
            asked = list(budget.asked)
            require(
                asked == ["params"],
                f"budgets.{name}",
                asked,
                "params alone: the shares of it are kept at every scale",
            )
        smaller = [name for name, budget in self.budgets.items() if budget.params != 1]
        require(bool(smaller), "budgets", dict(self.budgets), "at least one below the parent")


@dataclass(kw_only=True)
class DataBenchConfig(BenchConfig):
    """Text to tokens, and tokens to batches beside a training step."""

    parent: ParentConfig
    megabytes: float = 100
    """Text that is tokenised; and a tenth of it, to see whether memory grows."""
    vocabulary: int = 1024
    """Of the tokenizer, which is trained here."""
    sequences: int = 8
    """Sequences per batch."""
    sequence_length: int = 256
    """Tokens per sequence."""
    steps: int = 20
    """Batches, and training steps, of every round."""
    loader_workers: list[int]
    """Processes that load batches; 0 is none."""
    dir: str | None = None
    """Where the text is written; null is the system's place for temporary files."""
    memory: bool = True
    """Measure peak memory too, in a process of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parent(self.parent)
        self.positive("megabytes", "sequences", "sequence_length", "steps")
        most = self.parent.shape.vocab_size if self.parent.shape else 260
        allowed = f"from 260 to parent.shape.vocab_size={most}"
        require(260 <= self.vocabulary <= most, "vocabulary", self.vocabulary, allowed)
        workers = self.loader_workers
        require(min(workers, default=-1) >= 0, "loader_workers", workers, "at least 0")


BENCHES: dict[str, type[BenchConfig]] = {
    "step": StepBenchConfig,
    "run": RunBenchConfig,
    "scan": ScanBenchConfig,
    "loss": LossBenchConfig,
    "profile": ProfileBenchConfig,
    "extract": ExtractBenchConfig,
    "data": DataBenchConfig,
}
"""Name of every bench, and what it reads."""
