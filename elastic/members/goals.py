"""What a budget asks of its member: one or several measures of cost, and their values. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic.config import UNITS, WEIGHT_BYTES, ParentShape
from elastic.members.architecture import Architecture
from elastic.members.cost import (
    LayerSize,
    layer_sizes,
    total_cache_bytes,
    total_flops,
    total_parameters,
)


@dataclass(frozen=True)
class Measure:
    """A cost that is linear in each axis on its own, so that the cost of expected sizes is the
    expected cost."""

    unit: str = "params"
    """One of `config.UNITS`."""
    weight_dtype: str = "bfloat16"
    """Of `weight_bytes`."""
    context: int = 0
    """Tokens of a sequence, for `cache_bytes` and `flops`."""
    batch: int = 1
    """Sequences, for `cache_bytes`."""

    def of(self, shape: ParentShape, hidden: Any, sizes: Sequence[LayerSize]) -> Any:
        """The cost of sizes: integers, or differentiable scalars."""
        if self.unit == "cache_bytes":
            return total_cache_bytes(shape, sizes, self.context, self.batch)
        if self.unit == "flops":
            return total_flops(shape, hidden, sizes, self.context)
        assert self.unit in UNITS
        # Every parameter is active for every token: no layer is a mixture of experts.
        each = WEIGHT_BYTES[self.weight_dtype] if self.unit == "weight_bytes" else 1
        return each * total_parameters(shape, hidden, sizes)

    def exact(self, shape: ParentShape, member: Architecture) -> int:
        """The cost of a member."""
        return int(self.of(shape, member.hidden_size, layer_sizes(member)))

    def per_width(self, shape: ParentShape, hidden: int, kind: str, channels: int) -> int:
        """What one more unit of width adds to a layer of a kind, whatever its width."""
        two, one = (self.of(shape, hidden, [LayerSize(kind, w, channels)]) for w in (2, 1))
        return int(two - one)

    def text(self, value: int) -> str:
        """A value with its unit, for messages."""
        if self.unit == "weight_bytes":
            return f"{value:,} bytes of weights in {self.weight_dtype}"
        if self.unit == "cache_bytes":
            sequences = f"{self.batch} x " if self.batch > 1 else ""
            return f"{value:,} bytes of cache at {sequences}{self.context:,} tokens"
        if self.unit == "flops":
            return f"{value:,} FLOPs per token at {self.context:,} tokens"
        return f"{value:,} {'active ' if self.unit == 'active_params' else ''}parameters"


PARAMS = Measure()


@dataclass(frozen=True)
class Goal:
    """A value of one measure."""

    measure: Measure
    value: int
    parent: int
    """What the whole parent has."""

    @property
    def share(self) -> float:
        """Of the parent's."""
        return self.value / self.parent

    def __str__(self) -> str:
        return self.measure.text(self.value)


@dataclass(frozen=True)
class Target:
    """All that one budget asks for; each of it must hold within the space's tolerance."""

    shape: ParentShape
    goals: tuple[Goal, ...]
    """At least one."""

    @classmethod
    def params(cls, shape: ParentShape, value: int) -> "Target":
        """A number of parameters."""
        full = PARAMS.exact(shape, Architecture.full(shape))
        return cls(shape, (Goal(PARAMS, value, full),))

    @property
    def whole(self) -> bool:
        """Whether the parent itself is meant: it is the only member of its own size."""
        return all(goal.value == goal.parent for goal in self.goals)

    @property
    def measures(self) -> list[Measure]:
        return [goal.measure for goal in self.goals]

    @property
    def values(self) -> list[int]:
        return [goal.value for goal in self.goals]

    def off(self, hidden: int, sizes: Sequence[LayerSize]) -> float:
        """Relative distance from the goal that a member of such sizes misses most, with its
        sign."""
        costs = (goal.measure.of(self.shape, hidden, sizes) for goal in self.goals)
        found = (cost / goal.value - 1 for cost, goal in zip(costs, self.goals, strict=True))
        return max(found, key=abs)

    def off_by(self, member: Architecture) -> float:
        """`off` of a member."""
        return self.off(member.hidden_size, layer_sizes(member))

    def __str__(self) -> str:
        return " and ".join(map(str, self.goals))
