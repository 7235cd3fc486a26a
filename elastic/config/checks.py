"""Checks of settings. What is wrong is a `ConfigError`."""

import re
from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. The message is one line."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={visible(value)}: must be {allowed}")


def visible(value: object) -> str:
    """A value in a line: what would end the line, move a cursor or hide is escaped, and what is
    very long is cut."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)[:1000])
    return text if len(text) < 1000 else f"{text[:1000]} ..."


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
