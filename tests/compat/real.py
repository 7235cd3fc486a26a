"""Other releases of transformers load what we write, and compute what we compute.

`make test-compat` installs them and runs this file; its name keeps it out of `make test`. The table
in docs/compatibility.md is what it found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.strategies import random_tokens, tiny_shape
from safetensors.torch import save_file
from tests.extract.conftest import MIXED, SMALL, write_checkpoint

from elastic.config import ExtractConfig
from elastic.extract.export import extract
from elastic.members.architecture import Architecture
from elastic.parent import HybridParent

RELEASES = ("5.8.0", "5.10.4", "5.20.0", "5.23.0", "5.24.0")
"""The first that readers may have, one older than the new spelling, our own range, the next."""

HOME = Path(os.environ.get("COMPAT", Path(sys.prefix)))
"""Where `compat-RELEASE` are, packages for PYTHONPATH; all others are this environment's."""

NEW_TOKENS = 8


def small_steps(parent: HybridParent) -> None:
    """Every other head steps by about 1e-5: far below the published time_step_min."""
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            if name.endswith("dt_bias"):
                weight[::2].sub_(10)


def expect(path: Path, parent: HybridParent, member: Architecture) -> None:
    """What the writer computes, without a cache, beside the checkpoint at `path`."""
    tokens = random_tokens(parent.shape, time=40)
    continued = tokens
    with torch.no_grad():
        logits = parent.logits(tokens, member)
        for _ in range(NEW_TOKENS):
            best = parent.logits(continued, member)[:, -1:].argmax(-1)
            continued = torch.cat([continued, best], dim=1)
    values = {"tokens": tokens, "logits": logits, "continued": continued}
    save_file(values, path.with_name(f"{path.name}.expected.safetensors"))


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One member of one size per kind, and one that is zero-padded."""
    home = tmp_path_factory.mktemp("members")
    found = []
    for export, pattern, member in (("native", "M-*M-", SMALL), ("padded", "M-*MM-*", MIXED)):
        shape = tiny_shape(pattern=pattern, vocab_size=40)
        written = write_checkpoint(
            home / f"{export}-elastic", shape, {export: member}, fill=small_steps
        )
        output = home / export
        source, target = str(written.path), str(output)
        extract(ExtractConfig(checkpoint=source, budget=export, output=target, export=export))
        expect(output, written.parent, member)
        found.append(output)
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_loads_both_and_computes_the_same(release: str, members: list[Path]) -> None:
    """Logits, a continuation from the cache, and A_log, D and dt_bias as they are in the file."""
    packages = HOME / f"compat-{release}"
    assert packages.is_dir(), f"{packages}: not there; `make test-compat` installs it"
    reader = Path(__file__).with_name("reader.py")
    done = subprocess.run(
        [sys.executable, reader, *members],
        env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for member, line in zip(members, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        print(f"\n{release} {member.name}: {line}")
        assert found["transformers"] == release
        assert found["logits"] < 1e-5 and found["decoding"] and found["exact"]
        assert not found["problems"]
