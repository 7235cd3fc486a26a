"""Laws 1, 6 and 9 for the real kernels: the Triton code of mamba_ssm, on a GPU or without one.

A parent with one Mamba layer runs on kernels=mamba_ssm, and is held against our own scan (whole,
sliced, masked, softly masked, with documents, with norms of a member's own), sliced against masked
and against stock transformers, packed documents against each alone: logits and the gradient of
every tensor, in three precisions. kernel_laws.py has the cases; they run in processes of their own.
On a CPU Triton interprets the kernels, and plain twins replace causal_conv1d.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.kernel_laws import CASES, PRECISIONS, faults
from helpers.paths import ROOT, TESTS

KERNELS = Path(sys.prefix) / "mamba"
"""Where the Makefile puts mamba_ssm and triton: beside the packages of .venv, not among them, since
stock transformers calls GPU kernels on CPU tensors wherever mamba_ssm can be imported."""

NEEDS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RUNS = [
    pytest.param(device, path, case, precision, marks=NEEDS if device == "cuda" else [])
    for device, precisions in PRECISIONS.items()
    for path, named in CASES.items()
    for case in named
    for precision in precisions
]


@cache
def results(device: str) -> dict[str, dict[str, dict[str, dict]]]:
    """Path -> case -> precision -> differences. Both paths run side by side."""
    folders = [TESTS, ROOT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        assert (KERNELS / "mamba_ssm").is_dir(), f"{KERNELS}: no mamba_ssm; `make test` installs it"
        folders.insert(0, KERNELS)
        environment["TRITON_INTERPRET"] = "1"
    else:  # mamba_ssm is where this process would find it
        folders += [Path(folder) for folder in sys.path if folder]
        # Products of float32 as they are, not of mantissas of ten bits.
        environment["TRITON_F32_DEFAULT"] = "ieee"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    running = {
        path: subprocess.Popen(
            [sys.executable, TESTS / "helpers" / "mamba_program.py", device, path],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for path in CASES
    }
    found = {}
    for path, process in running.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        found[path] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize(("device", "path", "case", "precision"), RUNS)
def test_the_laws_hold_on_the_kernels(device: str, path: str, case: str, precision: str) -> None:
    """In logits and in every gradient: see `gradient_differences`."""
    result = results(device)[path][case][precision]
    assert not faults(result, precision, CASES[path][case], device)
