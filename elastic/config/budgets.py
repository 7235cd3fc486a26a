"""What a budget asks for."""

from dataclasses import dataclass
from typing import Any

from elastic.config.checks import one_of, require

UNITS = {
    "params": "parameters",
    "active_params": "parameters",
    "weight_bytes": "bytes",
    "cache_bytes": "bytes",
    "flops": "FLOPs per token",
}
"""What the size of a member can be given in: keys of `BudgetConfig`, and what each counts."""

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one weight."""


_READ_BY = {
    "weight_dtype": ("weight_bytes",),
    "context": ("cache_bytes", "flops"),
    "batch": ("cache_bytes",),
}
"""What only some units read."""


@dataclass(kw_only=True)
class BudgetConfig:
    """Target size of one member, in one unit or several that must all hold, or the member itself.

    A value up to 1 is a share of the parent's.
    """

    params: float | None = None
    """Parameters."""
    active_params: float | None = None
    """Parameters that one token uses; all of them where no layer is a mixture of experts."""
    weight_bytes: float | None = None
    """Bytes of the weights, in `weight_dtype`."""
    cache_bytes: float | None = None
    """Bytes that decoding keeps between two tokens: keys and values of `context` tokens and
    convolution windows in bfloat16, SSM states in float32; of `batch` sequences."""
    flops: float | None = None
    """Forward FLOPs per token, at a mean over a causal `context`."""
    weight_dtype: str | None = None
    """float32, bfloat16 or float16; null is bfloat16. For `weight_bytes` alone."""
    context: int | None = None
    """Tokens of a sequence, for `cache_bytes` and `flops`."""
    batch: int | None = None
    """Sequences; null is 1. For `cache_bytes` alone."""
    architecture: Any = None
    """The member: an `architecture` entry as in elastic.json, or a JSON file that holds one; null
    leaves it to the router."""

    @property
    def asked(self) -> dict[str, float]:
        """Unit -> value, of those that are set."""
        values = {unit: getattr(self, unit) for unit in UNITS}
        return {unit: value for unit, value in values.items() if value is not None}

    def check(self, where: str) -> None:
        """Raise `ConfigError` for a value that cannot work; `where` is the budget's key."""
        asked = self.asked
        require(
            bool(asked) or self.architecture is not None,
            f"{where}.params",
            self.params,
            f"set, or one of {', '.join(list(UNITS)[1:])}, or architecture must be",
        )
        for unit, value in asked.items():
            require(
                value > 0,
                f"{where}.{unit}",
                value,
                f"positive: a share of the parent's up to 1, or a number of {UNITS[unit]}",
            )
        for key, units in _READ_BY.items():
            readers = [unit for unit in units if unit in asked]
            require(
                bool(readers) or getattr(self, key) is None,
                f"{where}.{key}",
                getattr(self, key),
                f"null without {where}.{' or '.join(units)}, which read it",
            )
        needs = [unit for unit in _READ_BY["context"] if unit in asked]
        require(
            not needs or self.context is not None,
            f"{where}.context",
            self.context,
            f"set with {' and '.join(needs)}: the tokens of a sequence",
        )
        for key in ("context", "batch"):
            number = getattr(self, key)
            require(number is None or number > 0, f"{where}.{key}", number, "at least 1")
        one_of(f"{where}.weight_dtype", self.weight_dtype or "bfloat16", tuple(WEIGHT_BYTES))
        require(
            self.architecture is None or isinstance(self.architecture, str | dict),
            f"{where}.architecture",
            self.architecture,
            "an object with hidden_size and layers, as in elastic.json, or a JSON file with one",
        )
