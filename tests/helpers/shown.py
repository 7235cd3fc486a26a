"""Commands that README.md and docs/ show: found, and looked at without being run.

They stand in blocks fenced with sh, one a line, a backslash at the end of one that goes on. A
comment before a block says how far its commands are tried:

    (none)                        run, at reduced size, where `make demo` has been run
    <!-- run: needs=gpu -->       up to the start of training, on a pretended number of devices
    <!-- run: needs=cluster -->   the same, of what sbatch would start
    <!-- run: parse -->           its settings: it recurses, installs, needs a network or 4 GB
"""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.paths import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from elastic.cli.command import CONF
from elastic.cli.commands import COMMANDS, NAMES
from elastic.config import BENCHES, PlanConfig, RunConfig, parse
from elastic.plan.work import make_plan

GPUS = 8
"""Of every pretended node."""

KINDS = ("", "parse", "needs=gpu", "needs=cluster")

FENCE = re.compile(
    r"(?:<!-- run: (?P<kind>\S+) -->\n)?^```sh\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Shown:
    """One command as a reader sees it."""

    file: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Without assignments of environment variables in front."""
        return shlex.split(self.text)[len(self.environment) :]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are set in front."""
        found = {}
        for word in shlex.split(self.text):
            name, equals, value = word.partition("=")
            if not equals or not name.isupper():
                break
            found[name] = value
        return found


def shown(path: Path) -> list[Shown]:
    """The commands of a Markdown file, in order."""
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    found = []
    for block in FENCE.finditer(path.read_text()):
        kind = block["kind"] or ""
        assert kind in KINDS, f"{name}: <!-- run: {kind} -->: must be one of {KINDS}"
        body = block["body"].replace("\\\n", " ")
        lines = [re.sub(r"(^|\s\s)#.*$", "", line) for line in body.splitlines()]
        found += [Shown(name, kind, " ".join(line.split())) for line in lines if line.strip()]
    return found


def pages() -> list[Path]:
    """README.md and the guides."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def everywhere() -> list[Shown]:
    """The commands of README.md and of docs/."""
    return [command for path in pages() for command in shown(path)]


# What a command is


@dataclass(frozen=True)
class Ours:
    """One of our commands and its settings."""

    name: str
    settings: list[str]
    flags: list[str]
    processes: tuple[int, int] | None = None
    """Nodes, and processes on each, that are started from outside."""

    def config(self) -> Any:
        """Its settings, past the gate; ConfigError and Hydra's errors come through."""
        return self._parse(COMMANDS[self.name].config, COMMANDS[self.name].schema)

    def check(self) -> None:
        """Its settings, and of a run all that is known before it starts: sizes, stages, memory."""
        self.config()
        if COMMANDS[self.name].schema is RunConfig:
            make_plan(self._parse("plan", PlanConfig))

    def _parse(self, name: str, schema: type) -> Any:
        settings = [word for word in self.settings if not word.startswith("hydra")]
        if "--multirun" in self.flags:  # the first of several values
            settings = [word.split(",")[0] for word in settings]
        if self.processes is not None:
            nodes, devices = self.processes
            settings += [f"trainer.num_nodes={nodes}", f"trainer.devices={devices}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = compose(name, settings)
        with open_dict(raw):
            raw.pop("hydra", None)
        return parse(raw, schema)


def ours(command: Shown) -> Ours | None:
    """What of ours a command starts; None for make, pip and the like.

    Raises:
        AssertionError: a script, a module or a sub-command that is not there.
    """
    words, processes = command.words, None
    if words[0] == "sbatch":
        options = [word for word in words[1:] if word.startswith("--")]
        script, *words = words[1 + len(options) :]
        assert (ROOT / script).is_file(), f"{command}: there is no {script}"
        given = dict(option[2:].partition("=")[::2] for option in options)
        if script.endswith("extract.sbatch"):
            return Ours("extract", words, [])
        if script.endswith("sweep.sbatch"):
            words = words[1:]  # the file
        return Ours("train", words, [], (int(given.get("nodes", 1)), GPUS))
    if words[0] == "torchrun":
        options = dict(word[2:].partition("=")[::2] for word in words[1:] if word.startswith("--"))
        words = ["python", *(word for word in words[1:] if not word.startswith("--"))]
        processes = int(options["nnodes"]), int(options["nproc-per-node"])
    if words[0] == "python":
        assert words[1:] and (ROOT / words[1]).is_file(), f"{command}: there is no such script"
        words = ["elastic", words[1].removesuffix(".py"), *words[2:]]
    if words[0] != "elastic":
        return None
    name, rest = words[1], words[2:]
    assert name in NAMES, f"{command}: elastic has no {name}"
    if name == "bench":
        assert rest and rest[0] in BENCHES, f"{command}: there is no such bench"
        name, rest = f"bench {rest[0]}", rest[1:]
    flags = [word for word in rest if word.startswith("-")]
    values = {"--cfg": 1}
    settings, skip = [], 0
    for word in rest:
        if skip:
            skip -= 1
        elif word.startswith("-"):
            skip = values.get(word, 0)
        else:
            settings.append(word)
    return Ours(name, settings, flags, processes)


def targets() -> set[str]:
    """What `make` knows."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def look_at(command: Shown) -> None:
    """All that can be wrong with a command that is not run.

    Raises:
        AssertionError, ConfigError, or an error of Hydra.
    """
    subprocess.run(["bash", "-n", "-c", command.text], check=True)
    own = ours(command)
    if own is not None:
        own.config()
        return
    program, *rest = command.words
    assert program in ("make", "pip"), f"{command}: what is {program}?"
    for word in rest if program == "make" else ():
        assert "=" in word or word in targets(), f"{command}: make has no {word}"
