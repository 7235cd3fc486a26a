"""One cache that is written once, and cases like it with caches of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.teacher_caches import Case, case_of

from elastic.teacher.cache.write import write_cache


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teach") / "run"


@pytest.fixture(scope="session")
def case(run_dir: Path) -> Case:
    """A case whose cache is written; not to be changed."""
    case = case_of(run_dir, run_dir.parent / "cache")
    write_cache(case.config)
    return case


@pytest.fixture
def make(case: Case, run_dir: Path, tmp_path: Path) -> Callable[..., Case]:
    """Cases of the same run with some settings changed, and no cache yet."""
    return lambda *changes: case_of(run_dir, tmp_path / "cache", *changes)
