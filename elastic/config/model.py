"""Settings of the model: the parent, what can shrink, and to which sizes."""

import math
from dataclasses import dataclass, field

from elastic.config.checks import ConfigError, one_of, require
from elastic.config.ranges import check_sizes

KINDS = {"M": "mamba", "-": "mlp", "*": "attention"}
"""Letters of a layer pattern, and the kind of block each one stands for."""

AXES = ("hidden", "ffn", "mamba_heads", "mamba_head_dim", "attention_heads", "depth")
"""Everything that can shrink."""

IDLE_LOW, IDLE_HIGH = 1e-30, 1e30
"""Bounds of an SSM step that never bind: a smaller step is no step in float32, and nothing of a
state survives a larger one. Unlike zero and infinity they have a logarithm and a place in JSON."""

LAYERED_AXES = ("ffn", "mamba_heads", "attention_heads")
"""Axes that may be set layer by layer (heterogeneous); the others are set once."""


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
    time_step_limit: list[float] | None = None
    """Lowest and highest step of the SSM, after softplus; null, as published, bounds nothing."""
    max_position_embeddings: int = 131_072
    """Longest context advertised, in tokens; nothing in the network depends on it."""

    def __post_init__(self) -> None:
        check_sizes(self, "parent.shape")  # those of a config.json do not come through the gate
        unknown = sorted(set(self.pattern) - set(KINDS))
        require(
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
            require(
                getattr(self, name) > 0, f"parent.shape.{name}", getattr(self, name), "positive"
            )
        require(self.norm_eps > 0, "parent.shape.norm_eps", self.norm_eps, "positive")
        self._check_limit()
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "parent.shape.num_attention_heads",
            self.num_attention_heads,
            f"a multiple of num_key_value_heads={self.num_key_value_heads}",
        )
        require(
            self.mamba_num_heads % self.n_groups == 0,
            "parent.shape.mamba_num_heads",
            self.mamba_num_heads,
            f"a multiple of n_groups={self.n_groups}",
        )

    def _check_limit(self) -> None:
        """One spelling for every limit: null where no step can reach it, else finite numbers."""
        limit = self.time_step_limit
        if limit is None:
            return
        require(
            len(limit) == 2 and limit[0] < limit[1] and limit[1] > 0,
            "parent.shape.time_step_limit",
            limit,
            "null, or the lowest and the highest step, as in [0.0,0.1]",
        )
        low = float(limit[0]) if limit[0] > IDLE_LOW else 0.0
        high = min(float(limit[1]), IDLE_HIGH)
        self.time_step_limit = [low, high] if low > 0 or high < IDLE_HIGH else None

    @property
    def dt_limit(self) -> tuple[float, float]:
        """Lowest and highest step of the SSM; (0, inf) bounds nothing."""
        if self.time_step_limit is None:
            return (0.0, math.inf)
        low, high = self.time_step_limit
        return (low, high)

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
    """Sizes: of a parent that is trained here from a random start, or those that `path` must have,
    so that it can be planned without a download; null reads them from `path`."""
    kernels: str = "auto"
    """SSM scan: `auto` takes mamba_ssm on a GPU, else plain torch."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more compute."""

    def __post_init__(self) -> None:
        one_of("parent.kernels", self.kernels, ("auto", "torch", "mamba_ssm"))
        if self.path is None and self.shape is None:
            raise ConfigError(
                "parent: set parent.path (a checkpoint) or parent.shape (the sizes of a parent to "
                "train here); both are null"
            )

    def check_shape(self, found: ParentShape) -> None:
        """Raise `ConfigError` unless the checkpoint has the sizes of parent.shape."""
        for name, value in vars(self.shape).items() if self.shape else ():
            actual = getattr(found, name)
            require(
                name == "tied_head" or actual == value,
                f"parent.shape.{name}",
                value,
                f"{actual}, as in {self.path}; or parent.shape=null to take its sizes as they are",
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
            one_of("space.heterogeneous", axis, LAYERED_AXES)
            require(
                getattr(self, axis) is not None,
                "space.heterogeneous",
                axis,
                "an axis that has choices",
            )
        require(0 < self.tolerance < 1, "space.tolerance", self.tolerance, "between 0 and 1")
        for axis in AXES:
            choices = getattr(self, axis)
            if choices is None:
                continue
            require(
                len(choices) > 0,
                f"space.{axis}",
                choices,
                "a non-empty list, or null to leave the axis alone",
            )
            require(min(choices) > 0, f"space.{axis}", choices, "positive")
            descending = all(a > b for a, b in zip(choices, choices[1:], strict=False))
            require(
                descending, f"space.{axis}", choices, "strictly descending, the parent's size first"
            )


@dataclass(kw_only=True)
class ImportanceConfig:
    """How components are ranked before the weights are sorted (arXiv 2511.16664, section 3.1)."""

    samples: int = 1024
    """Calibration sequences for the width scores."""
    sequence_length: int = 8192
    """Tokens of each of them."""
    batch_size: int = 1
    """Calibration sequences per forward pass and process."""
    hidden: str = "auto"
    """Basis of the residual stream: `rotate` to its principal directions, `sort` its coordinates
    (the paper), or `auto`: rotate, but sort where embedding and head are tied."""
    order: str = "scores"
    """`scores` of calibration text order all components; `random` does not look at them, to see
    what a ranking is worth."""
    spread: bool = False
    """Rotate at random inside each segment between neighbouring hidden sizes, which evens out the
    channels; every member keeps the same directions."""
    ffn_score: str = "post_activation"
    """`post_activation` scores the input of the second MLP matrix, `pre_activation` is the paper's
    form."""
    aggregation: str = "sum"
    """Over tokens: `sum` of absolute values (the paper), or `mean_l2`: mean over time, L2 over
    sequences."""
    depth_method: str = "iterative"
    """`iterative` drops the least important layer and ranks again; `one_pass` ranks once."""
    depth_samples: int = 64
    """Calibration sequences for the depth ranking."""
    depth_sequence_length: int = 1024
    """Tokens of each of them."""
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
            "depth_sequence_length",
            "depth_positions",
        ):
            require(getattr(self, name) > 0, f"importance.{name}", getattr(self, name), "positive")
        one_of("importance.hidden", self.hidden, ("auto", "rotate", "sort"))
        one_of("importance.order", self.order, ("scores", "random"))
        require(
            self.order == "scores" or self.hidden == "sort",
            "importance.hidden",
            self.hidden,
            "sort with importance.order=random: a rotation is an order by energy",
        )
        require(
            not self.spread or self.hidden != "sort",
            "importance.spread",
            self.spread,
            "false with importance.hidden=sort, which has no directions to spread",
        )
        one_of("importance.ffn_score", self.ffn_score, ("post_activation", "pre_activation"))
        one_of("importance.aggregation", self.aggregation, ("sum", "mean_l2"))
        one_of("importance.depth_method", self.depth_method, ("iterative", "one_pass"))

    def rotates(self, tied_head: bool) -> bool:
        """Whether the residual stream of a parent is rotated.

        Raises:
            ConfigError: it was asked for, and embedding and head are one tensor.
        """
        require(
            self.hidden != "rotate" or not tied_head,
            "importance.hidden",
            "rotate",
            "sort (or auto) for this parent: its head is tied to the embedding, and the final "
            "norm's weights can be folded only into a head of its own",
        )
        require(
            not self.spread or not tied_head,
            "importance.spread",
            self.spread,
            "false for this parent, whose tied head lets the stream only be sorted",
        )
        return self.hidden != "sort" and not tied_head


@dataclass(kw_only=True)
class NormsConfig:
    """The norms of members."""

    own: bool = True
    """Each smaller budget trains norm weights of its own; false: all share the parent's, and a
    member is prefixes alone (the paper)."""


@dataclass(kw_only=True)
class RouterConfig:
    """The routers and their schedules (arXiv 2511.16664, section 3.3). Shares are of all elastic
    tokens."""

    kind: str = "axes"
    """`axes` learns every choice by itself (the paper), `members` one distribution over all nested
    families that meet the budgets, where there are at most 4,096."""
    hidden_units: int = 256
    """Width of each router's hidden layer."""
    full_bias: float = 3.0
    """Head start of the full-size choice, in logits, so that training begins near the parent; added
    after the scale."""
    temperature_start: float = 1.0
    """Gumbel-softmax temperature at the first elastic token."""
    temperature_end: float = 0.05
    """Temperature when the schedule ends; the decay is geometric."""
    scale_start: float = 1.0
    """Factor on what the networks say at the first elastic token."""
    scale_end: float = 10.0
    """Factor when the schedule ends; the growth is linear."""
    freeze_at: float = 0.05
    """Share of the elastic tokens after which the choices are final and steps run sliced; schedules
    end here."""
    candidates: int = 32
    """Members per budget, the router's most probable ones, whose distillation loss is compared when
    the choices become final; 1 takes the most probable unmeasured."""
    rounds: int = 0
    """Comparisons that follow while the better half trains as itself, half of the rest leaving in
    each; 0 decides by the first one alone."""
    round_share: float = 0.02
    """Length of a round, a share of the elastic tokens."""
    settled_steps: int = 0
    """Freeze earlier once every choice has been the same, with probability over 0.9, for this many
    optimizer steps; 0 never does."""
    hard_probability: float = 0.004
    """Share of the draws that are hard (straight-through) instead of soft."""
    noise_groups: int = 1
    """Groups of processes that draw noise of their own: more of it in a step, at no cost."""

    def __post_init__(self) -> None:
        one_of("router.kind", self.kind, ("axes", "members"))
        require(self.hidden_units > 0, "router.hidden_units", self.hidden_units, "positive")
        require(
            0 < self.temperature_end <= self.temperature_start,
            "router.temperature_end",
            self.temperature_end,
            f"in (0, router.temperature_start={self.temperature_start}]",
        )
        require(self.scale_start > 0, "router.scale_start", self.scale_start, "positive")
        require(self.scale_end > 0, "router.scale_end", self.scale_end, "positive")
        require(0 < self.freeze_at <= 1, "router.freeze_at", self.freeze_at, "in (0, 1]")
        require(1 <= self.candidates <= 64, "router.candidates", self.candidates, "in [1, 64]")
        require(0 <= self.rounds <= 8, "router.rounds", self.rounds, "in [0, 8]")
        require(
            0 < self.round_share and self.freeze_at + self.rounds * self.round_share <= 1,
            "router.round_share",
            self.round_share,
            f"positive, and {self.rounds} rounds must fit behind router.freeze_at={self.freeze_at}",
        )
        require(self.noise_groups > 0, "router.noise_groups", self.noise_groups, "positive")
        require(self.settled_steps >= 0, "router.settled_steps", self.settled_steps, "at least 0")
        require(
            0 <= self.hard_probability <= 1,
            "router.hard_probability",
            self.hard_probability,
            "in [0, 1]",
        )
