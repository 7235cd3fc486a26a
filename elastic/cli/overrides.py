"""Settings on the command line that Hydra's grammar does not read, or reads otherwise than meant.

Importing this module lets Hydra read keys that begin with a digit (`budgets.6b.params=6e9`).
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

_KEY = re.compile(r"([+~]{0,2})([^=]*)(.*)", re.DOTALL)
_DIGIT = re.compile(r"\.(?=\d)(?!\d+(?:\.|$))")  # but not before an index of a list
_MARK = "._begins_with_"
_parse_rule = OverridesParser.parse_rule


def _parse_any_key(self: OverridesParser, s: str, rule_name: str) -> Any:
    """Hydra's `parse_rule`, for keys such as `budgets.9b` too.

    Its grammar wants a letter first in every part of a key; nothing else in Hydra or OmegaConf
    does. Overrides stay as they were typed, so that sweeps and the jobs of a launcher, which parse
    them again, see no difference.
    """
    match = _KEY.fullmatch(s)
    if rule_name != "override" or match is None or not _DIGIT.search(match[2]):
        return _parse_rule(self, s, rule_name)
    sign, key, rest = match.groups()
    override = _parse_rule(self, sign + _DIGIT.sub(_MARK, key) + rest, rule_name)
    assert isinstance(override, Override)
    override.key_or_group = override.key_or_group.replace(_MARK, ".")
    override.input_line = s
    return override


OverridesParser.parse_rule = _parse_any_key  # type: ignore[method-assign]


def unreadable(argument: str, before: str = "") -> str:
    """One line for an argument that Hydra cannot parse: why, and how to write it.

    `before` is the argument before it, of which this one may be the rest.
    """
    _, key, rest = _KEY.fullmatch(argument).groups()  # type: ignore[union-attr]
    if not rest or not re.fullmatch(r"[\w./@$-]+", key, re.ASCII):
        joined = _quoted(f"{before} {argument}") if "=" in before and not rest else None
        hint = f"; a value with spaces is quoted: {joined}" if joined else ""
        return f"{argument}: cannot be read; settings are given as key=value{hint}"
    value = rest[1:]
    for opened, closed in (("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")):
        if value.startswith(opened) and (value == opened or not value.endswith(closed)):
            return f"{argument}: cannot be read; {opened} is opened and not closed by {closed}"
    if value[:1] in ("[", "{"):
        element = '["a=b","c d"]' if value[0] == "[" else '{name:"a=b"}'
        return (
            f"{argument}: cannot be read; quote each text in it that is more than letters and "
            f"digits, and all of it for the shell, as in {shlex.quote(f'{key}={element}')}"
        )
    if value.startswith("~"):
        home = f"{argument[: -len(value)]}{Path(value).expanduser()}"
        wanted = shlex.quote(home) if _reads(home) else _quoted(home)
        return f"{argument}: the shell replaces ~ only at the start of a word; write {wanted}"
    odd = "".join(dict.fromkeys(re.findall(r"[^\w\s/\\+.$%*@?|:-]|[^\x00-\x7f]", value)))
    what = f"with {' '.join(odd)} in it " if odd else ""
    return f"{argument}: a value {what}must be quoted, for the shell too: {_quoted(argument)}"


def several(argument: str) -> str:
    """One line for a value with commas where one value is needed."""
    key, _, value = argument.partition("=")
    return (
        f"{argument}: several values need --multirun, which runs each; "
        f"a list is written {shlex.quote(f'{key}=[{value}]')}, a text {_quoted(argument)}"
    )


def addition(key: str, arguments: Sequence[str], schema: type) -> str:
    """What to do about a key that the configuration files do not have: how to add it where it may
    be added (an entry of a mapping; a setting that is at its default), else where one of that name
    is."""
    for argument in arguments:
        given = argument.partition("=")[0]
        if "=" in argument and (given == key or given.startswith(f"{key}.")):
            if _type_of(key, schema) is not None:
                return f"; to add it: {shlex.quote('+' + argument)}"
    places = [place for place in _places(schema) if place.endswith(f".{key.rpartition('.')[2]}")]
    return f"; {' and '.join(places[:3])} is a setting" if places else ""


def at_default(key: str, arguments: Sequence[str], schema: type) -> str | None:
    """The line for a setting that is one, but that no configuration file sets, which Hydra calls
    unknown; None for others."""
    owner, _, _ = key.rpartition(".")
    if not is_dataclass(_type_of(owner, schema)) or _type_of(key, schema) is None:
        return None
    for argument in arguments:
        if argument.partition("=")[0] == key:
            return f"{key}: is at its default; to set it: {shlex.quote('+' + argument)}"
    return None


def added_twice(message: str, arguments: Sequence[str]) -> str | None:
    """The line for `+key=value` where there is a value already, of Hydra's message about it; None
    for other messages."""
    found = re.search(r"An item is already at '(.+)'\.|^(\S+) appears more than once", message)
    for argument in arguments if found else ():
        key = argument.partition("=")[0]
        if found is not None and key == f"+{found[1] or found[2]}":
            return f"{key}: is set already; to change it: {shlex.quote(argument[1:])}"
    return None


def _type_of(key: str, schema: Any) -> Any:
    """Type of the setting that `key` may be; None where there is none."""
    owner: Any = schema
    for part in key.split("."):
        if get_origin(owner) is dict:
            owner = get_args(owner)[1]
        elif is_dataclass(owner):
            owner = get_type_hints(owner).get(part)
        else:
            return None
    return owner


def _places(schema: Any, key: str = "") -> Iterator[str]:
    """Keys of all settings; NAME is any entry's name."""
    kinds = get_args(schema) if get_origin(schema) in (Union, UnionType) else (schema,)
    for kind in kinds:
        if get_origin(kind) is dict:
            yield from _places(get_args(kind)[1], f"{key}.NAME")
        elif is_dataclass(kind):
            for name, inner in get_type_hints(kind).items():
                place = f"{key}.{name}" if key else name
                yield place
                yield from _places(inner, place)


def _quoted(argument: str) -> str:
    """`argument` as it is typed in a shell so that its value is one text."""
    key, _, value = argument.partition("=")
    value = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (found[2] and '\\"'), value)
    return shlex.quote(f'{key}="{value}"')


def _reads(argument: str) -> bool:
    """Whether Hydra can parse `argument`."""
    try:
        return isinstance(OverridesParser.create().parse_override(argument).value(), str)
    except HydraException:
        return False
