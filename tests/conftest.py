"""What every test shares: one thread, the same drawn examples each time, no leftover global state,
and no skip for something that could have been installed.
"""

from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
import transformers
from helpers.skips import fault
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tiny models: threads cost more than they bring
transformers.logging.set_verbosity_error()  # it says at length that a CPU has no CUDA kernels
transformers.logging.disable_progress_bar()

settings.register_profile(
    "elastic",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("elastic")


def _judged(report: Any) -> Any:
    """A skip for a reason that is not allowed is a failure."""
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        wrong = fault(report.longrepr[2])
        if wrong is not None:
            report.outcome, report.longrepr = "failed", wrong
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """A whole file that is skipped."""
    return _judged((yield))


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Every test starts from one seed and leaves default dtype and gradient mode as they were."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
