"""Law 6 for the real kernels: the Triton code of mamba_ssm against our own scan, without a GPU.

Compared: logits and the gradient of every tensor of a parent with one Mamba layer, between
kernels=mamba_ssm under Triton's interpreter and kernels=torch. interpreted.py runs the cases, in
processes of their own; causal_conv1d, which has no CPU path, is replaced by plain twins there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT, TESTS

KERNELS = Path(sys.prefix) / "mamba"
"""Where the Makefile puts mamba_ssm and triton: beside the packages of .venv, not among them, since
stock transformers calls GPU kernels on CPU tensors wherever mamba_ssm can be imported."""

FUSED, PIECES = "mamba_split_conv1d_scan_combined", "mamba_chunk_scan_combined"

Results = dict[str, dict[str, dict]]


@pytest.fixture(scope="module")
def results() -> Results:
    """Path -> case -> shares by which the kernels differ. Both paths run side by side."""
    assert (KERNELS / "mamba_ssm").is_dir(), f"{KERNELS}: no mamba_ssm; `make test` installs it"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (KERNELS, TESTS, ROOT))),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    running = {
        path: subprocess.Popen(
            [sys.executable, TESTS / "helpers" / "interpreted.py", path],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for path in ("fused", "pieces")
    }
    found = {}
    for path, process in running.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        found[path] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("path", "case", "kernel"),
    [
        ("fused", "whole", FUSED),
        ("fused", "sliced", FUSED),
        ("fused", "masked", FUSED),
        ("fused", "documents", FUSED),
        ("fused", "odd", PIECES),  # channels that causal_conv1d does not take
        ("pieces", "whole", PIECES),
        ("pieces", "sliced", PIECES),
        ("pieces", "masked", PIECES),
        ("pieces", "documents", PIECES),
        ("pieces", "soft", PIECES),
    ],
)
def test_kernels_equal_our_scan(path: str, case: str, kernel: str, results: Results) -> None:
    """In logits and in every gradient: see `gradient_differences`."""
    result = results[path][case]
    assert result["kernels"] == [kernel]
    assert result["logits"] < 1e-5
    off = {name: share for name, share in result["gradients"].items() if share > 1e-4}
    assert not off
