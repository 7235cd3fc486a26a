"""The rooms of the package: who may import whom, read from the source.

Imports point only upwards: a module may import rooms before its own, and modules of its own room.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "elastic"

ROOMS = (
    "config requeue files architecture cost cut manifest layerwise tensors parent importance "
    "search masks router losses family curriculum data teacher cluster resume module loggers "
    "callbacks checkpoint run_dir trainer launch teach extract evaluate bench report plan"
).split()
"""Top to bottom; a new room is entered here."""

DOOR = {"load": "extract"}
"""What elastic/__init__.py offers, and the room behind it."""

LIGHT = ("config", "requeue", "files", "architecture", "cost", "cut", "manifest")
"""Rooms that start in a moment: no torch."""


def imports(source: str, module: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in the file; `from a import b` gives a.b.

    The module of a package is called package.__init__, so that its relative imports resolve too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join(parents + ([base] if base else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(sources: dict[str, str]) -> list[str]:
    """One line per import that points downwards; `sources` is module -> text."""
    found = []
    for module, source in sources.items():
        path = module.split(".")
        room = path[1] if path[1] != "__init__" else ""
        runs_as_main = path[-1] == "__main__"
        if room not in ("", "command", *ROOMS):
            found.append(f"{module}: {room} is in no list of rooms")
            continue
        for name in imports(source, module):
            top, *rest = name.split(".")
            if top == "mamba_ssm" and module != "elastic.parent.ssd":
                found.append(f"{module}: only elastic.parent.ssd may import mamba_ssm")
            if top != "elastic":
                continue
            wanted = DOOR.get(rest[0], rest[0]) if rest else ""
            if room == "" or (room == wanted != ""):
                continue  # elastic/__init__.py is the door; a room may use itself
            if wanted == "command":
                allowed = runs_as_main
            elif room == "command":
                allowed = wanted in ("config", "requeue")
            else:
                allowed = wanted in ROOMS and ROOMS.index(wanted) < ROOMS.index(room)
            if not allowed:
                found.append(f"{module}: must not import {name}")
    return found


def package() -> dict[str, str]:
    """Every module of the package and its text."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts)] = path.read_text()
    return modules


def test_imports_point_upwards() -> None:
    modules = package()
    assert {"elastic.__init__", "elastic.parent.ssd", "elastic.masks"} <= modules.keys()
    assert violations(modules) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elastic.config", "from elastic.files import digest"),
        ("elastic.config", "import elastic.parent.ssd"),
        ("elastic.cost", "from elastic import trainer"),
        ("elastic.cut", "def late():\n    from elastic.masks import hard_keep"),
        ("elastic.cut", "if TYPE_CHECKING:\n    from elastic.parent import Keep"),
        ("elastic.parent.hybrid", "from elastic.router import Router"),
        ("elastic.parent.hybrid", "from ..router import Router"),
        ("elastic.parent.__init__", "from .. import importance"),
        ("elastic.losses", "import elastic"),
        ("elastic.losses", "from elastic.command import command"),
        (
            "elastic.plan.__main__",
            "from elastic.command import command\nfrom elastic import nowhere",
        ),
        ("elastic.command", "from elastic.files import digest"),
        ("elastic.parent.layers", "import mamba_ssm"),
        ("elastic.extract.slice", "from mamba_ssm.ops import triton"),
        ("elastic.helpers", "import json"),
    ],
)
def test_the_checker_catches_a_planted_import(module: str, source: str) -> None:
    assert len(violations({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elastic.__init__", "from elastic.extract import load"),
        ("elastic.parent.__init__", "from .layers import Keep"),
        ("elastic.evaluate.family", "from elastic import load"),
        ("elastic.files", "from elastic.config import ConfigError"),
        ("elastic.parent.hybrid", "from elastic.parent.layers import MLP\nfrom .ssd import scan"),
        ("elastic.parent.ssd", "from mamba_ssm.ops.triton import ssd_combined"),
        ("elastic.command", "from elastic.config import parse"),
        ("elastic.report.__main__", "from elastic.command import command"),
        ("elastic.trainer", "import torch\nimport elastic.callbacks"),
    ],
)
def test_the_checker_lets_good_imports_pass(module: str, source: str) -> None:
    assert violations({module: source}) == []


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_import_no_torch(room: str) -> None:
    """In a fresh interpreter, so that whatever is imported indirectly counts too."""
    heavy = "('torch', 'transformers', 'lightning', 'numpy')"
    code = f"import sys, elastic.{room}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_torch_check_sees_torch() -> None:
    """Guards the guard."""
    code = "import sys, elastic.parent; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
