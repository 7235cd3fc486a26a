"""What every test shares: one thread, the same drawn examples each time, no leftover global state.

Strategies, tiny parents and the table of tolerances are in strategies.py, which pytest makes
importable because this file lies beside it.
"""

from collections.abc import Iterator

import pytest
import torch
import transformers
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


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Every test starts from one seed and leaves default dtype and gradient mode as they were."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
