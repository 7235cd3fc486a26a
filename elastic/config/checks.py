"""Checks of settings, and one line for whatever is wrong with them."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. The message is one line."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: must be {allowed}")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    require(value in allowed, key, value, "one of " + ", ".join(allowed))


NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""Names that are plain file names wherever a run may be copied to."""


def check_names(key: str, names: Iterable[str], reserved: Sequence[str] = ()) -> None:
    """Budgets and stages give their names to files, folders, tensors and metrics.

    Raises:
        ConfigError: a name is no plain file name, stands for something else, or is another one but
            for its case, which some file systems do not see.
    """
    seen: dict[str, str] = {}
    for name in names:
        if NAME.fullmatch(name) is None or name.endswith("."):
            raise ConfigError(
                f"{key}: the name {ascii(name[:40])} must be a plain file name: letters of ASCII, "
                "digits, _, - and . (neither first nor last), at most 100 characters"
            )
        require(
            name.lower() not in reserved,
            key,
            name,
            f"another name: metrics call something else {' or '.join(reserved)}",
        )
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ConfigError(f"{key}: {other} and {name} must differ by more than case")


def parse(raw: DictConfig | dict[str, Any], schema: type[T]) -> T:
    """Turn a composed configuration into `schema`, or raise `ConfigError` with one line."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), raw)
        # A value that is missing in `raw` would silently leave the schema's default.
        missing = sorted(OmegaConf.missing_keys(raw) | OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]}: must be set, for example {missing[0]}=VALUE")
        _require_finite(OmegaConf.to_container(merged), "")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def _require_finite(value: Any, key: str) -> None:
    """No setting may be infinite or not a number."""
    if isinstance(value, dict):
        for name, entry in value.items():
            _require_finite(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for entry in value:
            _require_finite(entry, key)
    elif isinstance(value, float):
        require(math.isfinite(value), key, value, "a finite number")


def explain(error: BaseException) -> str:
    """One line for any error that a wrong setting raises, in Hydra, OmegaConf or here."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; settings are given as key=value"
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
            return f"{cause.full_key}: unknown; must be one of {', '.join(known)}"
        reason = next(line.strip() for line in str(cause).splitlines() if line.strip())
        if "is not a ListConfig" in reason:
            reason = "must be a list, for example [3,2,1], or null"
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
