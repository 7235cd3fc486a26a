"""One store that is written once, and cases like it with stores of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.stores import Case, case_of

from elastic.teacher.cache.write import write_store


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teach") / "run"


@pytest.fixture(scope="session")
def case(run_dir: Path) -> Case:
    """A case whose store is written; not to be changed."""
    case = case_of(run_dir, run_dir.parent / "store")
    write_store(case.config)
    return case


@pytest.fixture
def make(case: Case, run_dir: Path, tmp_path: Path) -> Callable[..., Case]:
    """Cases of the same run with some settings changed, and no store yet."""
    return lambda *changes: case_of(run_dir, tmp_path / "store", *changes)
