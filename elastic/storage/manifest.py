"""elastic.json: what an elastic checkpoint contains, and which prefixes each member is. No
torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.config import AXES, LAYERED_AXES, ParentShape
from elastic.config.checks import check_names
from elastic.members.architecture import Architecture, extents
from elastic.members.cost import parameters
from elastic.storage.files import write_json
from elastic.storage.foreign import read_json
from elastic.storage.seals import check_beside

FORMAT_VERSION = 2
"""Version 1 has no norms of members' own, and is still read."""

NAME = "elastic.json"

MEMBERS = "members.safetensors"
"""Norm weights of members' own: `<budget>/<stored name in the parent>`, in the member's size."""

ENERGIES = "energies.safetensors"
"""Energy per channel of every norm's input, by the norm's stored name, at full width."""


@dataclass(frozen=True)
class Member:
    """One budget's entry: the target as configured, the exact size, the architecture."""

    target: dict[str, float | str]
    params: int
    architecture: Architecture
    decision: dict[str, Any] | None = None
    """How it was chosen: the router's own choice, and the candidates with their losses."""

    def to_json(self) -> dict[str, Any]:
        """Its entry in elastic.json."""
        value = {
            "target": self.target,
            "params": self.params,
            "architecture": self.architecture.to_json(),
        }
        return value if self.decision is None else value | {"decision": self.decision}


@dataclass(frozen=True)
class Manifest:
    """The whole of elastic.json."""

    budgets: dict[str, Member]
    space: dict[str, Any]
    ranking: dict[str, Any]
    provenance: dict[str, Any]
    energy: dict[str, Any] = field(default_factory=dict)
    """Share of the stream's energy by hidden size, in the basis and in as many best coordinates."""
    version: int = FORMAT_VERSION

    def member(self, budget: str) -> Member:
        """The entry of a budget; `ValueError` lists the budgets there are."""
        if budget not in self.budgets:
            raise ValueError(f"budget={budget}: must be one of {', '.join(self.budgets)}")
        return self.budgets[budget]

    def check(self, shape: ParentShape) -> None:
        """Raise `ValueError` unless every budget is a member of a parent of that shape, and of the
        size that is written beside it, and the choices are that parent's."""
        for name, member in self.budgets.items():
            try:
                member.architecture.check(shape)
            except ValueError as error:
                raise ValueError(f"budget {name}: {error}") from error
            exact = parameters(shape, member.architecture)
            if member.params != exact:
                raise ValueError(
                    f"budget {name}: params={member.params}, but its architecture has {exact}; the "
                    "file is damaged"
                )
        sizes = extents(shape)
        for axis, choices in self.space.get("choices", {}).items():
            full, unit = sizes[axis]
            legal = choices[0] == full and all(choice % unit == 0 for choice in choices)
            _need(
                legal, f"space.choices.{axis}", choices, f"multiples of {unit}, {full} the largest"
            )
        order, layers = self.ranking.get("drop_order", []), len(shape.pattern)
        _need(max(order, default=0) < layers, "ranking.drop_order", order, f"below {layers}")

    def write(self, directory: Path) -> None:
        """Write elastic.json."""
        budgets = {name: member.to_json() for name, member in self.budgets.items()}
        value = {"format_version": self.version, "budgets": budgets, "space": self.space}
        value |= {"ranking": self.ranking, "energy": self.energy, "provenance": self.provenance}
        write_json(directory / NAME, value)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read elastic.json.

        Raises:
            ValueError: there is none, it is damaged, differs from what was sealed, or is of
                another format version.
        """
        path = directory / NAME
        if not path.is_file():
            raise ValueError(f"{path}: not found; {directory} is not an elastic checkpoint")
        check_beside(directory, NAME)
        try:
            value = read_json(path)
            version = value["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged, not an elastic.json ({error!r})") from error
        if version not in (1, FORMAT_VERSION):
            raise ValueError(
                f"{path}: format_version={version}, this version reads 1 and {FORMAT_VERSION}; "
                "use the release of elastic that wrote it"
            )
        try:
            budgets = {name: _member(name, entry) for name, entry in value["budgets"].items()}
            check_names("budgets", budgets)
            names = ("space", "ranking", "provenance", *(("energy",) if version > 1 else ()))
            parts = {name: value[name] for name in names}
            for name, part in parts.items():
                _need(isinstance(part, dict), name, part, "an object")
            _check_space(parts["space"])
            order = parts["ranking"].get("drop_order", [])
            _need(_is_order(order), "ranking.drop_order", order, "layers, each once")
            return cls(budgets, **parts, version=version)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: damaged, {error}") from error


def _need(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={_short(value)} must be {allowed}")


def _short(value: object) -> str:
    """A value in a line, however much there is of it."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _is_number(value: object) -> bool:
    """Whether this is a number above 0 that JSON can hold."""
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _is_order(value: object) -> bool:
    """Whether this is a list of indices, each once."""
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        return False
    return len(set(value)) == len(value) and min(value, default=0) >= 0


def _member(name: str, entry: dict[str, Any]) -> Member:
    """A budget's entry, by type and range."""
    target, params = entry["target"], entry["params"]
    where = f"budgets.{name}"
    _need(isinstance(target, dict), f"{where}.target", target, "an object")
    for key, value in target.items():
        legal = isinstance(value, str) if key.endswith("_dtype") else _is_number(value)
        _need(legal, f"{where}.target.{key}", value, "a number above 0")
    legal = type(params) is int and params > 0
    _need(legal, f"{where}.params", params, "a whole number above 0")
    decision = entry.get("decision")
    legal = decision is None or isinstance(decision, dict)
    _need(legal, f"{where}.decision", decision, "an object")
    try:
        return Member(target, params, Architecture.from_json(entry["architecture"]), decision)
    except ValueError as error:
        raise ValueError(f"budget {name}: {error}") from error


def _check_space(space: dict[str, Any]) -> None:
    """Choices and kinds of axes, by type and range."""
    choices, layered = space.get("choices", {}), space.get("heterogeneous", [])
    _need(isinstance(choices, dict), "space.choices", choices, "an object")
    for axis, values in choices.items():
        where = f"space.choices.{axis}"
        _need(axis in AXES, where, values, "on an axis: " + ", ".join(AXES))
        descending = _is_order(values) and values == sorted(values, reverse=True)
        legal = descending and min(values, default=0) > 0
        _need(legal, where, values, "whole numbers above 0, the largest first")
    legal = isinstance(layered, list) and all(axis in LAYERED_AXES for axis in layered)
    _need(legal, "space.heterogeneous", layered, "some of " + ", ".join(LAYERED_AXES))
