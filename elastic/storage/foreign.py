"""JSON and YAML that others wrote, or that lay on a disk: read within limits, or refused in a line.
No torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 256 << 20
"""A tokenizer has tens of megabytes, everything else less than one."""

MOST_DEPTH = 64
"""What is nested deeper cannot be printed, compared or written again without running out of
stack."""

YAML_BYTES = 4 << 20
"""Its reader takes a second for a megabyte."""


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it is no JSON, too large or nested too deep; names the file.
        OSError: it cannot be read.
    """
    return _read(path, MOST_BYTES, "JSON", json.loads)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; `ValueError` for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def read_yaml(path: Path) -> Any:
    """A YAML file of plain values; errors as of `read_json`."""
    return _read(path, YAML_BYTES, "YAML", parse_yaml)


def parse_yaml(text: str) -> Any:
    """Plain values from YAML without aliases, of which a few lines can unfold into gigabytes.

    Raises:
        ValueError: it is none.
    """
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"an alias (*{event.anchor}) is not read")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _read(path: Path, most: int, kind: str, parse: Callable[[str], Any]) -> Any:
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path}: has {size:,} bytes; {kind} is read up to {most:,}")
    try:
        value = parse(path.read_bytes().decode("utf-8-sig"))
        _check_depth(value)
    except (ValueError, RecursionError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, RecursionError):
            reason = f"nested more than {MOST_DEPTH} deep"
        raise ValueError(f"{path}: damaged, not valid {kind} ({reason})") from error
    return value


def _check_depth(value: Any) -> None:
    """Level by level, without recursion; `RecursionError` for too many."""
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise RecursionError
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level, depth = [each for each in inner if isinstance(each, dict | list)], depth + 1
