"""The wings of the package: who may import whom, read from the source.

A module may import wings named before its own, and modules of its own wing. Imports run one way.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "elastic"

WINGS = (
    "config console members storage cluster data losses parent importance routing teacher training "
    "extract plan evaluate study bench cli"
).split()
"""From the ground up; a new wing is entered here."""

DOOR = {"load": "extract"}
"""What elastic/__init__.py offers, and the wing behind it."""

LIGHT = (
    "config",
    "console",
    "members.architecture",
    "members.cost",
    "members.cut",
    "parent.stock",
    "storage.files",
    "storage.manifest",
    "cluster.requeue",
    "cluster.start",
    "cli.main",
    "cli.help",
)
"""Modules that start in a moment: no torch."""


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
    """One line per import against the order of the wings; `sources` is module -> text."""
    found = []
    for module, source in sources.items():
        path = module.split(".")
        wing = path[1] if path[1] != "__init__" else ""
        runs_as_main = path[-1] == "__main__"
        if wing not in ("", "__main__", *WINGS):
            found.append(f"{module}: {wing} is no wing")
            continue
        for name in imports(source, module):
            top, *rest = name.split(".")
            if top == "mamba_ssm" and module != "elastic.parent.ssd":
                found.append(f"{module}: only elastic.parent.ssd may import mamba_ssm")
            if top != "elastic":
                continue
            wanted = DOOR.get(rest[0], rest[0]) if rest else ""
            if wing == "" or (wing == wanted != ""):
                continue  # elastic/__init__.py is the door; a wing may use itself
            if wanted == "cli":
                allowed = runs_as_main
            else:
                allowed = wanted in WINGS and WINGS.index(wanted) < WINGS.index(wing)
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


def test_imports_run_one_way() -> None:
    modules = package()
    assert {"elastic.__init__", "elastic.parent.ssd", "elastic.routing.masks"} <= modules.keys()
    assert violations(modules) == []


def test_every_wing_is_there() -> None:
    """No wing is listed that has gone, and none has appeared unseen."""
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(WINGS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elastic.config", "from elastic.storage.files import digest"),
        ("elastic.config", "import elastic.parent.ssd"),
        ("elastic.members.cost", "from elastic.training import run"),
        ("elastic.members.cut", "def late():\n    from elastic.routing.masks import hard_keep"),
        ("elastic.members.cut", "if TYPE_CHECKING:\n    from elastic.parent import Keep"),
        ("elastic.parent.hybrid", "from elastic.routing.router import Router"),
        ("elastic.parent.hybrid", "from ..routing.router import Router"),
        ("elastic.parent.__init__", "from .. import importance"),
        ("elastic.losses", "import elastic"),
        ("elastic.losses", "from elastic.cli.command import command"),
        (
            "elastic.plan.__main__",
            "from elastic.cli.command import command\nfrom elastic import nowhere",
        ),
        ("elastic.plan.work", "from elastic.cli.command import command"),
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
        ("elastic.storage.files", "from elastic.config import ConfigError"),
        ("elastic.parent.hybrid", "from elastic.parent.layers import MLP\nfrom .ssd import scan"),
        ("elastic.parent.ssd", "from mamba_ssm.ops.triton import ssd_combined"),
        ("elastic.cli.command", "from elastic.config import parse"),
        ("elastic.plan.__main__", "from elastic.cli.command import command"),
        ("elastic.training.run", "import torch\nimport elastic.training.callbacks"),
    ],
)
def test_the_checker_lets_good_imports_pass(module: str, source: str) -> None:
    assert violations({module: source}) == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module: str) -> None:
    """In a fresh interpreter, so that whatever is imported indirectly counts too."""
    heavy = "('torch', 'transformers', 'lightning', 'numpy')"
    code = f"import sys, elastic.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_torch_check_sees_torch() -> None:
    """Guards the guard."""
    code = "import sys, elastic.parent.hybrid; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
