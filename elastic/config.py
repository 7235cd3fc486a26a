"""Every setting of a run: typed, with units, validated in one place.

`parse` is the one gate from Hydra to the library: past it there is no `DictConfig`, and whatever is
unknown, of the wrong type or impossible has stopped with one line. This module imports no torch, so
that a typing mistake is reported in a second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

KINDS = {"M": "mamba", "-": "mlp", "*": "attention"}
"""Letters of a layer pattern, and the kind of block each one stands for."""

AXES = ("hidden", "ffn", "mamba_heads", "mamba_head_dim", "attention_heads", "depth")
"""Everything that can shrink."""

LAYERED_AXES = ("ffn", "mamba_heads", "attention_heads")
"""Axes that may be set layer by layer (heterogeneous); the others are set once."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. The message is one line."""


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: must be {allowed}")


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    _require(value in allowed, key, value, "one of " + ", ".join(allowed))


@dataclass(kw_only=True)
class ParentShape:
    """Sizes of a Nemotron-H parent; defaults are those of the published family."""

    pattern: str
    """One letter per layer: M Mamba-2, - MLP, * attention."""
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int = 4
    conv_bias: bool = True
    tied_head: bool = False
    """Share the LM head with the embedding. Checkpoints store both either way: stock transformers
    never ties Nemotron-H."""
    norm_eps: float = 1e-5
    time_step_min: float = 1e-3
    """Lower bound of the SSM step; stock transformers clamps to it."""
    max_position_embeddings: int = 131_072
    """Longest context advertised, in tokens; nothing in the network depends on it."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(KINDS))
        _require(
            bool(self.pattern) and not unknown,
            "parent.shape.pattern",
            self.pattern,
            "a non-empty string of M (Mamba-2), - (MLP) and * (attention)"
            + ("; E (mixture of experts) is not supported yet" if "E" in unknown else ""),
        )
        for name in (
            "hidden_size vocab_size intermediate_size num_attention_heads num_key_value_heads "
            "head_dim mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel "
            "max_position_embeddings"
        ).split():
            _require(
                getattr(self, name) > 0, f"parent.shape.{name}", getattr(self, name), "positive"
            )
        _require(self.norm_eps > 0, "parent.shape.norm_eps", self.norm_eps, "positive")
        _require(
            self.time_step_min >= 0, "parent.shape.time_step_min", self.time_step_min, "at least 0"
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "parent.shape.num_attention_heads",
            self.num_attention_heads,
            f"a multiple of num_key_value_heads={self.num_key_value_heads}",
        )
        _require(
            self.mamba_num_heads % self.n_groups == 0,
            "parent.shape.mamba_num_heads",
            self.mamba_num_heads,
            f"a multiple of n_groups={self.n_groups}",
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of every layer, in order."""
        return tuple(KINDS[letter] for letter in self.pattern)


@dataclass(kw_only=True)
class ParentConfig:
    """Where the parent comes from, and how it is executed."""

    path: str | None = None
    """Local directory or hub id of a Nemotron-H checkpoint (safetensors); null builds `shape`."""
    shape: ParentShape | None = None
    """Sizes of a parent that is trained here from a random start; null reads them from `path`."""
    kernels: str = "auto"
    """SSM scan: `auto` takes mamba_ssm on a GPU where it is installed, else plain torch."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more compute."""

    def __post_init__(self) -> None:
        _one_of("parent.kernels", self.kernels, ("auto", "torch", "mamba_ssm"))
        if (self.path is None) == (self.shape is None):
            raise ConfigError(
                "parent: set exactly one of parent.path (a checkpoint) and parent.shape (sizes to train), "
                f"got path={self.path} and shape={'set' if self.shape else None}"
            )


@dataclass(kw_only=True)
class BudgetConfig:
    """Target size of one member."""

    params: float
    """Parameters: a share of the parent's when at most 1, else a count."""

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.params) and self.params > 0,
            "budgets.*.params",
            self.params,
            "positive: a share of the parent up to 1, or a number of parameters",
        )


@dataclass(kw_only=True)
class SpaceConfig:
    """Choices per axis, largest (the parent's own size) first; null leaves the axis alone."""

    hidden: list[int] | None = None
    """Hidden sizes."""
    ffn: list[int] | None = None
    """MLP widths."""
    mamba_heads: list[int] | None = None
    """Mamba heads over all SSM groups; every group keeps the same number."""
    mamba_head_dim: list[int] | None = None
    """Channels per Mamba head."""
    attention_heads: list[int] | None = None
    """Query heads over all KV groups; every group keeps the same number."""
    depth: list[int] | None = None
    """Numbers of layers kept."""
    heterogeneous: list[str] = field(default_factory=list)
    """Axes set layer by layer: any of ffn, mamba_heads, attention_heads."""
    tolerance: float = 0.01
    """Largest relative distance of a member's exact size from its budget."""
    nested: bool = True
    """A smaller budget is never larger than the next larger one on any axis or layer."""

    def __post_init__(self) -> None:
        for axis in self.heterogeneous:
            _one_of("space.heterogeneous", axis, LAYERED_AXES)
            _require(
                getattr(self, axis) is not None,
                "space.heterogeneous",
                axis,
                "an axis that has choices",
            )
        _require(0 < self.tolerance < 1, "space.tolerance", self.tolerance, "between 0 and 1")
        for axis in AXES:
            choices = getattr(self, axis)
            if choices is None:
                continue
            _require(
                len(choices) > 0,
                f"space.{axis}",
                choices,
                "a non-empty list, or null to leave the axis alone",
            )
            _require(min(choices) > 0, f"space.{axis}", choices, "positive")
            descending = all(a > b for a, b in zip(choices, choices[1:], strict=False))
            _require(
                descending, f"space.{axis}", choices, "strictly descending, the parent's size first"
            )


@dataclass(kw_only=True)
class ImportanceConfig:
    """How components are ranked before the weights are sorted (arXiv 2511.16664, section 3.1)."""

    samples: int = 1024
    """Calibration sequences for the width scores."""
    sequence_length: int = 8192
    """Tokens per calibration sequence."""
    batch_size: int = 1
    """Calibration sequences per forward pass."""
    ffn_score: str = "post_activation"
    """`post_activation` scores the input of the second MLP matrix, `pre_activation` is the paper's form."""
    aggregation: str = "sum"
    """Over tokens: `sum` of absolute values (the paper), or `mean_l2`: mean over time, L2 over sequences."""
    depth_method: str = "iterative"
    """`iterative` drops the least important layer and ranks again; `one_pass` ranks once."""
    depth_samples: int = 64
    """Calibration sequences for the depth ranking."""
    depth_positions: int = 256
    """Random positions per sequence at which logits are compared."""
    drop_attention: bool = False
    """Whether attention layers may be dropped."""
    drop_ends: bool = False
    """Whether the first and the last layer may be dropped."""

    def __post_init__(self) -> None:
        for name in (
            "samples",
            "sequence_length",
            "batch_size",
            "depth_samples",
            "depth_positions",
        ):
            _require(getattr(self, name) > 0, f"importance.{name}", getattr(self, name), "positive")
        _one_of("importance.ffn_score", self.ffn_score, ("post_activation", "pre_activation"))
        _one_of("importance.aggregation", self.aggregation, ("sum", "mean_l2"))
        _one_of("importance.depth_method", self.depth_method, ("iterative", "one_pass"))


@dataclass(kw_only=True)
class RouterConfig:
    """The routers and their schedules (arXiv 2511.16664, section 3.3). Shares are of all elastic tokens."""

    hidden_units: int = 256
    """Width of each router's hidden layer."""
    full_bias: float = 3.0
    """Head start of the full-size choice, in logits, so that training begins near the parent."""
    temperature_start: float = 1.0
    """Gumbel-softmax temperature at the first elastic token."""
    temperature_end: float = 0.05
    """Temperature when the schedule ends; the decay is geometric."""
    scale_start: float = 1.0
    """Factor on the logits at the first elastic token."""
    scale_end: float = 10.0
    """Factor on the logits when the schedule ends; the growth is linear."""
    freeze_at: float = 0.5
    """Share of the elastic tokens after which the choices are final and steps run sliced; schedules end here."""
    settled_steps: int = 0
    """Freeze earlier once every choice has been the same, with probability over 0.9, for this many
    optimizer steps; 0 never does."""
    hard_probability: float = 0.004
    """Share of the draws that are hard (straight-through) instead of soft."""

    def __post_init__(self) -> None:
        _require(self.hidden_units > 0, "router.hidden_units", self.hidden_units, "positive")
        _require(
            0 < self.temperature_end <= self.temperature_start,
            "router.temperature_end",
            self.temperature_end,
            f"in (0, router.temperature_start={self.temperature_start}]",
        )
        _require(self.scale_start > 0, "router.scale_start", self.scale_start, "positive")
        _require(self.scale_end > 0, "router.scale_end", self.scale_end, "positive")
        _require(0 < self.freeze_at <= 1, "router.freeze_at", self.freeze_at, "in (0, 1]")
        _require(self.settled_steps >= 0, "router.settled_steps", self.settled_steps, "at least 0")
        _require(
            0 <= self.hard_probability <= 1,
            "router.hard_probability",
            self.hard_probability,
            "in [0, 1]",
        )


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Weights of the loss terms (arXiv 2511.16664, section 3.4)."""

    distillation_weight: float = 1.0
    """Forward KL from the frozen, unsorted parent."""
    temperature: float = 1.0
    """Distillation temperature, for both models."""
    cross_entropy_weight: float = 0.0
    """Cross-entropy on the text itself."""
    budget_weight: float = 1.0
    """Relative distance of the expected size from the target."""
    identity_weight: float = 10.0
    """Pull of the full budget towards the full-size choices."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""

    def __post_init__(self) -> None:
        for name in (
            "distillation_weight",
            "cross_entropy_weight",
            "budget_weight",
            "identity_weight",
        ):
            _require(
                getattr(self, name) >= 0, f"objective.{name}", getattr(self, name), "at least 0"
            )
        _require(
            self.distillation_weight + self.cross_entropy_weight > 0,
            "objective.distillation_weight",
            self.distillation_weight,
            "positive, or objective.cross_entropy_weight must be",
        )
        _require(self.temperature > 0, "objective.temperature", self.temperature, "positive")
        _require(self.chunk_tokens > 0, "objective.chunk_tokens", self.chunk_tokens, "positive")


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
    """How often each budget is drawn; null draws all alike."""
    model_lr: float
    """Peak learning rate of the weights."""
    router_lr: float = 1e-2
    """Peak learning rate of the routers."""
    warmup_steps: int = 60
    """Optimizer steps of linear warmup."""
    final_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""

    def __post_init__(self) -> None:
        _one_of("curriculum.stages.*.mode", self.mode, ("pretrain", "elastic"))
        for name in ("tokens", "sequence_length", "batch_tokens", "model_lr", "router_lr"):
            _require(
                getattr(self, name) > 0,
                f"curriculum.stages.*.{name}",
                getattr(self, name),
                "positive",
            )
        _require(
            self.warmup_steps >= 0,
            "curriculum.stages.*.warmup_steps",
            self.warmup_steps,
            "at least 0",
        )
        _require(
            0 <= self.final_lr_ratio <= 1,
            "curriculum.stages.*.final_lr_ratio",
            self.final_lr_ratio,
            "in [0, 1]",
        )
        _require(
            self.batch_tokens % self.sequence_length == 0,
            "curriculum.stages.*.batch_tokens",
            self.batch_tokens,
            f"a multiple of sequence_length={self.sequence_length}; the nearest is "
            f"{max(1, round(self.batch_tokens / self.sequence_length)) * self.sequence_length}",
        )
        probabilities = self.budget_probabilities
        if probabilities is not None:
            _require(
                self.mode == "elastic",
                "curriculum.stages.*.budget_probabilities",
                probabilities,
                "null here: a pretrain stage has no budgets",
            )
            total = sum(probabilities.values())
            _require(
                min(probabilities.values(), default=-1) >= 0 and abs(total - 1) < 1e-6,
                "curriculum.stages.*.budget_probabilities",
                dict(probabilities),
                f"non-negative and sum to 1 (the sum is {total:g})",
            )


@dataclass(kw_only=True)
class CurriculumConfig:
    """Stages in the order in which they run."""

    stages: dict[str, StageConfig]

    def __post_init__(self) -> None:
        modes = [stage.mode for stage in self.stages.values()]
        _require(
            "elastic" in modes,
            "curriculum.stages",
            list(self.stages),
            "at least one stage of mode elastic",
        )
        _require(
            modes == sorted(modes, key=("pretrain", "elastic").index),
            "curriculum.stages",
            list(self.stages),
            "ordered: every pretrain stage before the first elastic one",
        )


@dataclass(kw_only=True)
class DataConfig:
    """Text, tokenizer and packing."""

    source: str = "stdlib"
    """`stdlib` is the source code of this Python's own library; `files` are local text, jsonl or
    parquet files; `hub` is a data set by its hub id."""
    path: str | None = None
    """For `files` a glob, for `hub` the data set's id."""
    subset: str | None = None
    """For `hub`: the configuration of the data set."""
    split: str = "train"
    """For `hub`: the split."""
    text_column: str = "text"
    """Column of the text in jsonl, parquet and hub data."""
    validation_every: int = 17
    """Every n-th document is held out for validation."""
    validation_sequences: int = 32
    """Fixed validation sequences per budget during training."""
    tokenizer: str = "train"
    """`train` builds a byte-level BPE on the text; `parent` takes the parent's; else a path or hub id."""
    tokenizer_vocab: int = 1024
    """Vocabulary of a tokenizer that is trained here."""

    def __post_init__(self) -> None:
        _one_of("data.source", self.source, ("stdlib", "files", "hub"))
        _require(
            (self.source == "stdlib") == (self.path is None),
            "data.path",
            self.path,
            "set for data.source=files and data.source=hub, and null for stdlib",
        )
        _require(
            self.validation_every >= 2, "data.validation_every", self.validation_every, "at least 2"
        )
        _require(
            self.validation_sequences > 0,
            "data.validation_sequences",
            self.validation_sequences,
            "positive",
        )
        _require(
            self.tokenizer_vocab >= 260,
            "data.tokenizer_vocab",
            self.tokenizer_vocab,
            "at least 260: 256 bytes and the special tokens",
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
            _require(
                0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)"
            )
        _require(self.eps > 0, "optim.eps", self.eps, "positive")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _require(self.gradient_clip > 0, "optim.gradient_clip", self.gradient_clip, "positive")


@dataclass(kw_only=True)
class TrainerConfig:
    """Machines and intervals."""

    accelerator: str = "auto"
    devices: int = 1
    """Processes per node."""
    num_nodes: int = 1
    strategy: str = "single"
    """`single` process, or `ddp`."""
    precision: str = "32-true"
    """32-true, bf16-mixed or bf16-true."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass and process; null is the whole batch. The budget is drawn per forward pass."""
    validate_every: int = 200
    """Optimizer steps between validations of every budget."""
    checkpoint_every: int = 200
    """Optimizer steps between resume checkpoints."""
    log_every: int = 10
    """Optimizer steps between logged rows."""

    def __post_init__(self) -> None:
        _one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        _one_of("trainer.strategy", self.strategy, ("single", "ddp"))
        _one_of("trainer.precision", self.precision, ("32-true", "bf16-mixed", "bf16-true"))
        for name in ("devices", "num_nodes", "validate_every", "checkpoint_every", "log_every"):
            _require(getattr(self, name) > 0, f"trainer.{name}", getattr(self, name), "positive")
        if self.micro_batch_tokens is not None:
            _require(
                self.micro_batch_tokens > 0,
                "trainer.micro_batch_tokens",
                self.micro_batch_tokens,
                "positive",
            )
        if self.strategy == "single":
            _require(
                self.world_size == 1,
                "trainer.strategy",
                "single",
                f"ddp when there are {self.world_size} processes",
            )

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes


@dataclass(kw_only=True)
class LoggerConfig:
    """Where metrics go; `metrics.csv` in the run directory is always written."""

    wandb: bool = False
    """Also log to Weights & Biases; WANDB_MODE=offline keeps it local."""
    project: str = "elastic"
    entity: str | None = None
    group: str | None = None


@dataclass(kw_only=True)
class RunConfig:
    """Everything `train.py` reads."""

    name: str
    """Name of the experiment."""
    run_dir: str
    """Where everything is written."""
    resume: bool = True
    """Go on where `run_dir` stopped; false refuses a directory that is not empty."""
    seed: int = 0
    parent: ParentConfig
    budgets: dict[str, BudgetConfig]
    space: SpaceConfig
    importance: ImportanceConfig
    router: RouterConfig
    objective: ObjectiveConfig
    curriculum: CurriculumConfig
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    logger: LoggerConfig

    def __post_init__(self) -> None:
        _require(bool(self.budgets), "budgets", dict(self.budgets), "at least one budget")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")
        for name, stage in self.curriculum.stages.items():
            where = f"curriculum.stages.{name}"
            for budget in stage.budget_probabilities or {}:
                _one_of(f"{where}.budget_probabilities", budget, tuple(self.budgets))
            micro = self.trainer.micro_batch_tokens or stage.batch_tokens // self.trainer.world_size
            unit = micro * self.trainer.world_size
            _require(
                micro > 0 and micro % stage.sequence_length == 0,
                f"{where}.sequence_length",
                stage.sequence_length,
                f"a divisor of the tokens per forward pass and process, {micro}",
            )
            _require(
                stage.batch_tokens % unit == 0,
                f"{where}.batch_tokens",
                stage.batch_tokens,
                f"a multiple of {unit} = {micro} tokens per forward pass x {self.trainer.world_size} processes; "
                f"the nearest is {max(1, round(stage.batch_tokens / unit)) * unit}",
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


@dataclass(kw_only=True)
class ExtractConfig:
    """Everything `extract.py` reads."""

    checkpoint: str
    """Directory of the elastic checkpoint."""
    budget: str
    """Name of the member to cut."""
    output: str
    """Directory to create."""
    dtype: str = "source"
    """`source` keeps the stored type; float32, bfloat16 or float16 convert."""
    verify: bool = True
    """Re-open the result with stock transformers and compare its logits with the masked parent's."""
    max_shard_bytes: int = 1_000_000_000
    """Largest safetensors file written."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("source", "float32", "bfloat16", "float16"))
        _require(self.max_shard_bytes > 0, "max_shard_bytes", self.max_shard_bytes, "positive")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything `python -m elastic.evaluate` reads."""

    run_dir: str
    """Run whose elastic checkpoint and validation text are used."""
    members: dict[str, str] = field(default_factory=dict)
    """Extracted directories by budget name; a budget that is not named is cut in memory."""
    sequences: int = 64
    """Validation sequences."""
    sequence_length: int = 512
    """Tokens per validation sequence."""
    batch_size: int = 8
    prompts: list[str] = field(default_factory=list)
    """Beginnings that the smallest member continues."""
    new_tokens: int = 48
    """Tokens generated after each prompt."""
    output: str | None = None
    """Where the JSON goes; null is `run_dir`/family.json."""

    def __post_init__(self) -> None:
        for name in ("sequences", "sequence_length", "batch_size", "new_tokens"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")


T = TypeVar("T")


def parse(raw: DictConfig | dict[str, Any], schema: type[T]) -> T:
    """Turn a composed configuration into `schema`, or raise `ConfigError` with one line."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), raw)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]}: must be set, for example {missing[0]}=VALUE")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def explain(error: BaseException) -> str:
    """One line for any error that a wrong setting raises, in Hydra, OmegaConf or here."""
    cause: BaseException | None = error
    while isinstance(cause, HydraException) and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        parent = cause.parent_node
        known = (
            sorted(map(str, parent))
            if isinstance(parent, DictConfig) and not parent._is_none()
            else []
        )
        if cause.key is not None and known and str(cause.key) not in known:
            return f"{cause.full_key}: unknown setting; must be one of {', '.join(known)}"
        reason = next(line.strip() for line in str(cause).splitlines() if line.strip())
        return f"{cause.full_key}: {reason}"
    if isinstance(error, HydraException):
        options = [line for line in lines[1:] if "=" not in line and ":" not in line]
        known_text = (
            f"; must be one of {', '.join(options)}"
            if "Could not find" in first and options
            else ""
        )
        return first + known_text
    return first
