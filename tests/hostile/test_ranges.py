"""Every number among the settings of every command has a range, and the gate holds it.

Walks the dataclasses, so that a new setting without a range, or one that lets anything through, is
found here.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from elastic.cli.command import CONF
from elastic.cli.commands import COMMANDS
from elastic.config import ConfigError, RunConfig, parse
from elastic.config.ranges import MOST, check_ranges

MAY_BE_NEGATIVE = ("full_bias", "time_step_limit")

PATHS = {"extract": ["checkpoint=a", "budget=b", "output=c"], "evaluate": ["run_dir=a"]}
"""Settings without a default."""


def numbers(schema: Any, value: Any, key: str = "") -> Iterator[tuple[str, type, bool]]:
    """Key, type, and whether it is a list, of every number; entries of a mapping as they are."""
    kinds = get_args(schema) if get_origin(schema) in (Union, types.UnionType) else (schema,)
    for kind in kinds:
        if kind in (int, float):
            yield key, kind, False
        elif is_dataclass(kind):
            hints = get_type_hints(kind)
            for field in fields(kind):
                inner = value.get(field.name) if value else None
                yield from numbers(
                    hints[field.name], inner, f"{key}.{field.name}" if key else field.name
                )
        elif get_origin(kind) is list:
            for name, of, _ in numbers(get_args(kind)[0], None, key):
                yield name, of, True
        elif get_origin(kind) is dict:
            of = get_args(kind)[1]
            for name in list(value or ["full"])[:1]:
                inner = value[name] if value else None
                yield from numbers(of, inner, f"{key}.{name}")


def composed(command: str) -> Any:
    """The settings of a command as they are without any of the user's."""
    words = PATHS.get(command, [])
    if command == "cache-teacher":
        words = ["objective.teacher_cache=a", "objective.top_k=4"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(COMMANDS[command].config, words)


SETTINGS = {name: composed(name) for name in COMMANDS}

MERGED = {
    name: OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(command.schema), settings))
    for (name, command), settings in zip(COMMANDS.items(), SETTINGS.values(), strict=True)
}
"""What the gate holds against the ranges: merging takes a hundred times as long as comparing."""


def with_number(settings: Any, key: list[str], value: Any) -> dict[str, Any]:
    """Settings as plain values with another one, in mappings that were null if need be."""
    if not key:
        return value
    first, *rest = key
    return {**(settings or {}), first: with_number((settings or {}).get(first), rest, value)}


OF_A_RUN = {field.name for field in fields(RunConfig)}


def _cases() -> Iterator[Any]:
    """Every number once: of the commands that take a run's settings only what is their own, and of
    the entries of a mapping only the first."""
    for name, command in COMMANDS.items():
        for key, kind, several in numbers(command.schema, OmegaConf.to_container(SETTINGS[name])):
            inherited = issubclass(command.schema, RunConfig) and command.schema is not RunConfig
            if not inherited or key.partition(".")[0] not in OF_A_RUN:
                yield pytest.param(name, key, kind, several, id=f"{name}-{key}")


CASES = list(_cases())


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_configured_passes(name: str) -> None:
    parse(SETTINGS[name], COMMANDS[name].schema)


def test_all_commands_and_hundreds_of_numbers_are_walked() -> None:
    assert len(CASES) > 150
    keys = {case.values[1] for case in CASES}
    assert {"seed", "space.hidden", "curriculum.stages.pretrain.tokens", "plan.gpu_gib"} <= keys


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, 2**64) for name in COMMANDS), ("train", float("inf")), ("train", float("nan"))],
)
def test_every_command_goes_through_the_gate(name: str, value: float) -> None:
    """What is compared below is what `parse` compares."""
    kind = int if isinstance(value, int) else float
    key = next(c.values[1] for c in CASES if c.values[0] == name and c.values[2:] == (kind, False))
    raw = SETTINGS[name].copy()
    OmegaConf.update(raw, key, value, force_add=True)
    with pytest.raises(ConfigError, match="must be (at most|a finite number)"):
        parse(raw, COMMANDS[name].schema)


@pytest.mark.parametrize(("name", "key", "kind", "several"), CASES)
def test_a_number_out_of_range_is_refused_in_one_line(
    name: str, key: str, kind: type, several: bool
) -> None:
    """Too large, far below 0, infinite, not a number: compared as the gate does it, and one of them
    through the gate itself, which also knows what must not be negative."""
    last = key.rpartition(".")[2]
    in_mapping = key.rpartition(".")[0].rpartition(".")[2]
    assert last in MOST or in_mapping in MOST, f"{key}: elastic/config/ranges.py has no range"
    wrong: list[Any] = [2**64, -(2**64)] if kind is int else [1e300, -1e300]
    wrong += [float("inf"), float("nan")]
    schema = COMMANDS[name].schema

    def refused(check: Callable[[], object]) -> None:
        with pytest.raises(ConfigError) as caught:
            check()
        line = str(caught.value)
        assert "\n" not in line and 0 < len(line) < 500
        assert last in line or in_mapping in line, line

    for value in wrong:
        changed = with_number(MERGED[name], key.split("."), [value] if several else value)
        refused(partial(check_ranges, changed, schema))
    signed = last in MAY_BE_NEGATIVE or in_mapping in MAY_BE_NEGATIVE
    value = wrong[0] if signed else -1
    raw = SETTINGS[name].copy()
    OmegaConf.update(raw, key, [value] if several else value, force_add=True)
    refused(partial(parse, raw, schema))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32 - 1),
        ("optim.eps", 1e-30),
        ("objective.temperature", 1e-6),
        ("curriculum.stages.long.tokens", 10**15),
        ("router.hidden_units", 10**4),
    ],
)
def test_the_ends_of_a_range_pass(key: str, value: Any) -> None:
    raw = SETTINGS["train"].copy()
    OmegaConf.update(raw, key, value)
    parse(raw, COMMANDS["train"].schema)
    raw = SETTINGS["train"].copy()
    OmegaConf.update(raw, key, value * 1.001 if value > 1 else value / 2, force_add=True)
    with pytest.raises(ConfigError):
        parse(raw, COMMANDS["train"].schema)
