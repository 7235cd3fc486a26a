"""Settings of `python -m elastic.plan`: the run to plan, and what is assumed of the machines."""

from dataclasses import dataclass, field

from elastic.config.checks import require
from elastic.config.commands import RunConfig


@dataclass(kw_only=True)
class PlanSettings:
    """What a plan assumes and covers."""

    contexts: list[int] = field(default_factory=lambda: [8192, 131_072])
    """Tokens already read where members are compared."""
    batch: int = 1
    """Sequences that share the weights where members are compared."""
    gpus: list[int] = field(default_factory=lambda: [8, 64, 512])
    """Numbers of GPUs beside the configured one."""
    gpu_gib: float = 79.6
    """Memory of a GPU that a process can have; an 80 GB card has about that."""
    reserve_gib: float = 4.0
    """Of it, for CUDA, NCCL and what the allocator cannot use."""
    node_gib: float = 2000.0
    """Host memory of a node."""
    gpu_tflops: float = 989.0
    """Peak of a GPU's matrix products; an H100's in dense bfloat16."""
    utilisation: float = 0.4
    """Share of that peak at which all FLOPs of training run, recomputed ones included."""
    tokens_per_core_second: float = 400_000
    """Speed at which one core prepares text."""
    price_per_gpu_hour: float | None = None
    """What one GPU costs per hour, in any currency; null leaves the cost out."""

    def __post_init__(self) -> None:
        for name in ("batch", "gpu_gib", "node_gib", "gpu_tflops", "tokens_per_core_second"):
            require(getattr(self, name) > 0, f"plan.{name}", getattr(self, name), "positive")
        for name in ("contexts", "gpus"):
            values = getattr(self, name)
            require(min(values, default=1) > 0, f"plan.{name}", values, "positive")
        price = self.price_per_gpu_hour
        require(price is None or price >= 0, "plan.price_per_gpu_hour", price, "at least 0")
        require(0 < self.utilisation <= 1, "plan.utilisation", self.utilisation, "in (0, 1]")
        require(
            0 <= self.reserve_gib < self.gpu_gib,
            "plan.reserve_gib",
            self.reserve_gib,
            f"at least 0 and below plan.gpu_gib={self.gpu_gib:g}",
        )


@dataclass(kw_only=True)
class PlanConfig(RunConfig):
    """Everything `python -m elastic.plan` reads: the run, and how to plan it."""

    plan: PlanSettings
    json: str | None = None
    """File that gets all figures."""
