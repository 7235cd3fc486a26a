"""No check, test or type run depends on what lies around in a checkout: runs, data, builds.

In a copy without .git, where .gitignore means nothing.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.copies import checkout
from helpers.skips import ALLOWED, fault

LYING_AROUND = (
    "build/lib/elastic",
    "data",
    "dist",
    "helpers",
    "multirun",
    "out",
    "outputs",
    "runs",
    "torch",
    "wandb",
)
"""Made by our commands and by others', or named as something that we import."""

BAD = 'import sys, os\nimport torch\nx=( 1 )\nl : int = "no"\ndef test_bad( ): assert l == x\n'
"""Fails every check there is."""


@pytest.fixture(scope="module")
def littered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with all of that in it: Python files, and folders without any."""
    root = checkout(tmp_path_factory.mktemp("littered") / "checkout")
    for name in LYING_AROUND:
        (root / name / "empty").mkdir(parents=True)
        for file in ("bad.py", "test_bad.py"):
            (root / name / file).write_text(BAD)
    for name in ("build/lib/elastic", "helpers"):
        (root / name / "__init__.py").write_text(BAD)
    return root


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("checks", [("check", "."), ("format", "--check", ".")], ids=" ".join)
def test_style_is_that_of_our_own_files(checks: tuple[str, ...], littered: Path) -> None:
    done = run(littered, "-m", "ruff", *checks, "--no-cache")
    assert done.returncode == 0, done.stdout


def test_style_is_checked_in_all_of_our_own_files(littered: Path) -> None:
    """Guards the guard."""
    shown = run(littered, "-m", "ruff", "check", "--show-files", "--no-cache", ".").stdout
    found = {Path(line).relative_to(littered) for line in shown.splitlines() if line[-3:] == ".py"}
    folders = ("elastic", "tests", "docs")
    ours = {
        path.relative_to(littered) for name in folders for path in littered.glob(f"{name}/**/*.py")
    }
    assert found == ours | {Path("train.py"), Path("extract.py")}


def test_types_are_those_of_the_package(littered: Path) -> None:
    """Which files mypy takes; checking them is the next test's."""
    code = "from mypy.main import process_options as p; print(*(s.path for s in p([])[0]))"
    taken = [littered / path for path in run(littered, "-c", code).stdout.split()]
    paths = {path.resolve() for path in taken if not path.is_dir()}  # conf/ holds no Python
    assert paths == {path.resolve() for path in (littered / "elastic").rglob("*.py")}


@pytest.mark.slow
def test_types_are_good_whatever_lies_around(littered: Path) -> None:
    done = run(littered, "-m", "mypy", "--no-incremental")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_tests_are_those_of_the_folder(littered: Path) -> None:
    """And our helpers are what they import."""
    done = run(littered, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 2000 and all(line.startswith("tests/") for line in found)


# Skipped tests


SKIPPED = """
import pytest

@pytest.mark.skipif(True, reason="needs a CUDA device")
def test_of_a_gpu() -> None: ...

def test_without_a_package() -> None:
    pytest.importorskip("nowhere_to_be_found")

@pytest.mark.xfail(reason="not yet", strict=True)
def test_of_a_known_fault() -> None:
    assert False
"""


def test_what_is_not_installed_is_a_failure_and_no_skip(littered: Path) -> None:
    """With this project's own configuration of pytest."""
    (littered / "tests" / "test_skips.py").write_text(SKIPPED)
    whole = "import pytest\npytest.importorskip('nowhere_to_be_found')\n"
    (littered / "tests" / "test_skipped_whole.py").write_text(whole)
    files = ["tests/test_skips.py", "tests/test_skipped_whole.py"]
    try:
        options = "-q -p no:cacheprovider --continue-on-collection-errors".split()
        done = run(littered, "-m", "pytest", *options, *files)
    finally:
        for file in files:
            (littered / file).unlink()
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 skipped, 1 xfailed, 1 error" in done.stdout
    assert done.stdout.count("skipped (Skipped: could not import 'nowhere_to_be_found'") >= 2


def test_reasons_are_judged_as_pytest_writes_them() -> None:
    assert not any(fault(reason) or fault(f"Skipped: {reason}") for reason in ALLOWED)
    assert "make install" in (fault("Skipped: could not import 'deepspeed'") or "")
