"""What `elastic --help`, `elastic COMMAND --help` and `elastic --version` print."""

import ast
import inspect
import platform
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from elastic.cli.command import CONF
from elastic.cli.commands import COMMANDS, NAMES, Command
from elastic.config import BENCHES

WIDTH = 100
PACKAGES = ("torch", "lightning", "transformers", "hydra-core")


def overview() -> str:
    """All commands."""
    summaries = {name: entry.summary for name, entry in COMMANDS.items()}
    summaries["bench"] = f"Measure this machine: {', '.join(BENCHES)}."
    return _text(
        "elastic COMMAND [SETTING=VALUE ...] [OPTIONS]",
        "Many model sizes from one training run of a hybrid Mamba-attention language model.",
        _table("Commands", [(name, summaries[name]) for name in NAMES]),
        _table(
            "Options",
            [
                ("COMMAND --help", "what a command does and the settings that matter"),
                ("--version", "of this package and of those that it rests on"),
                ("-sc install=bash", 'completion: eval "$(elastic -sc install=bash)"; or fish'),
            ],
        ),
        "elastic train debug=one_step trains a few steps of everything, to see that it runs. The "
        "guides are in docs/ of the repository.",
    )


def benches() -> str:
    """All benches."""
    return _text(
        "elastic bench NAME [SETTING=VALUE ...] [OPTIONS]",
        "Measures one thing on this machine and prints a table; json=PATH writes the figures too.",
        _table("Names", [(name, COMMANDS[f"bench {name}"].summary) for name in BENCHES]),
        _table(
            "Examples",
            [
                ("elastic bench step", "one training step"),
                ("elastic bench step parent=tiny space=tiny", "of the tiny parent"),
                ("elastic bench scan json=scan.json", "the scan, figures into a file"),
            ],
        ),
        "elastic bench NAME --help explains one. What the figures mean is in docs/ of the "
        "repository. Without the command: python -m elastic.bench NAME",
    )


def about(entry: Command) -> str:
    """One command: what it does, settings with their defaults, examples, where the rest is."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        defaults = compose(entry.config)
    settings = [
        (f"{key}={shown}" if (shown := _default(defaults, key)) else key, described)
        for key, described in ((key, describe(entry.schema, key)) for key in entry.settings)
    ]
    return _text(
        f"elastic {entry.name} [SETTING=VALUE ...] [OPTIONS]",
        f"{entry.summary} {entry.text}",
        _table(f"Choices, each a file under {CONF}", list(_groups(entry.config, entry.groups))),
        _table("Settings that matter", settings),
        _table(
            "Examples",
            [(f"elastic {entry.name} {typed}".rstrip(), does) for typed, does in entry.examples],
        ),
        _table(
            "The rest",
            [
                ("--cfg job", "every setting and its value"),
                ("--config-dir DIR", "your own files: DIR/experiment/mine.yaml, experiment=mine"),
                ("--config-name NAME", "your own DIR/NAME.yaml in place of ours"),
                ("--multirun", "a job for each of several values: seed=0,1"),
                ("--hydra-help", "the other options, all of Hydra's"),
            ],
        ),
        f"The guides are in docs/ of the repository. From a checkout: {entry.also}",
    )


def versions() -> str:
    """This package and where it lies, and what it rests on."""
    own = f"elastic {_version('elastic')} ({Path(__file__).resolve().parents[1]})"
    others = [f"{name} {_version(name)}" for name in PACKAGES]
    return "\n".join([own, f"python {platform.python_version()}", *others])


def describe(schema: type, key: str) -> str:
    """What a setting is: the first sentence of its docstring in the dataclass that declares it.

    `key` is dotted; the name of an entry of a mapping may be anything: `budgets.NAME.params`.

    Raises:
        KeyError: there is no such setting, or nothing is said about it.
    """
    owner: Any = schema
    *above, last = key.split(".")
    for part in above:
        mapping = get_origin(owner) is dict
        owner = get_args(owner)[1] if mapping else get_type_hints(owner)[part]
    for base in inspect.getmro(owner):
        if is_dataclass(base) and last in (said := _docstrings(base)):
            return re.split(r"(?<=[^.])[.](?= |$)", said[last])[0]
    raise KeyError(key)


def _docstrings(schema: type) -> dict[str, str]:
    """The string below every field of a dataclass that has one."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(below.value.value, str)
    }


def _default(defaults: DictConfig, key: str) -> str:
    """What our files set, as it would be typed; nothing for a name that the user chooses."""
    above, _, last = key.rpartition(".")
    owner = OmegaConf.select(defaults, above) if above else defaults
    if not isinstance(owner, DictConfig) or last not in set(owner):
        return ""
    if OmegaConf.is_missing(owner, last):
        return "..."
    value = cast(dict[str, Any], OmegaConf.to_container(owner))[last]
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    texts = isinstance(value, list) and any(isinstance(entry, str) for entry in value)
    return "[...]" if texts else str(value).replace(" ", "")


def _groups(config: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every group with what the command's file, or that of `train`, chooses, and its options."""
    text = "\n".join((CONF / f"{name}.yaml").read_text() for name in ("train", config))
    chosen = dict(re.findall(r"^  - (\w+): (\w+)", text, re.MULTILINE))
    for name in names:
        options = sorted(path.stem for path in (CONF / name).glob("*.yaml"))
        yield f"{name}={chosen[name]}", ", ".join(options)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _text(*paragraphs: str) -> str:
    """Paragraphs with a line between them; those of one line are wrapped."""
    return "\n\n".join(
        part if "\n" in part else textwrap.fill(part.strip(), WIDTH, break_on_hyphens=False)
        for part in paragraphs
        if part
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    """A title and two columns, the second one wrapped; below the first where that is long."""
    if not rows:
        return ""
    left = min(max(len(name) for name, _ in rows), 44)
    lines = [f"{title}:"]
    for name, said in rows:
        first = f"  {name:<{left}}  "
        if len(name) > left:
            lines.append(f"  {name}")
            first = " " * (left + 4)
        lines += textwrap.wrap(
            said,
            WIDTH,
            initial_indent=first,
            subsequent_indent=" " * (left + 4),
            break_on_hyphens=False,
        )
    return "\n".join(lines)
