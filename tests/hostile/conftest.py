"""One interpreter that forks, and one finished run of the smallest size."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.forked import Forked
from helpers.paths import ROOT
from helpers.runs import SMALL_RUN


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    with Forked(ROOT, tmp_path_factory.mktemp("forked")) as warm:
        yield warm


@pytest.fixture(scope="session")
def finished(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory; nobody may change it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    code, said = forked.run(["elastic", "train", *SMALL_RUN, f"run_dir='{run_dir}'"], {})
    assert code == 0, said
    return run_dir
