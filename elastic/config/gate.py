"""The one gate from Hydra to the library, and one line for whatever does not pass it."""

from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic.config.checks import ConfigError, visible
from elastic.config.ranges import check_ranges

T = TypeVar("T")

CONF = (Path(__file__).resolve().parents[1] / "conf").resolve()
"""The configuration files: a folder of the installed package, a link to conf/ in a checkout."""


def parse(raw: DictConfig | dict[str, Any], schema: type[T]) -> T:
    """Turn a composed configuration into `schema`, or raise `ConfigError` with one line."""
    if not isinstance(raw, dict | DictConfig):
        raise ConfigError(f"{visible(raw)[:60]}: must be settings by name")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), raw)
        # A value that is missing in `raw` would silently leave the schema's default.
        missing = sorted(OmegaConf.missing_keys(raw) | OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]}: must be set, for example {missing[0]}=VALUE")
        check_ranges(OmegaConf.to_container(merged), schema)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


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
        # OmegaConf's own lines come last; what is before them may hold a value of several.
        reason = visible(str(cause).partition("\n    full_key:")[0].strip())
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
    return visible(" ".join(lines)) if lines else first
