"""Runs of several real processes, held against one process with the same global batch."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.rank import spoiled
from helpers.runs import small_settings
from helpers.waiting import LIMIT
from safetensors.torch import load_file

from elastic.config import RunConfig
from elastic.training.launch import launch
from elastic.training.module import ElasticModule

WEIGHTS, LOSSES = 1e-4, 5e-6
"""Largest difference after twelve optimizer steps, of any weight and of any logged loss."""

SPACE = [
    "space.hidden=[48,47,46,45,44,43,42,41,40,39,38,37,36,35,34]",
    "space.ffn=[128,120,112,104,96,88,80,72,64]",
    "space.mamba_heads=[4]",
    "space.depth=[7,4]",
    "space.tolerance=0.03",
    "importance.drop_ends=true",
]
"""The small member can only be reached by dropping layers: their weights have no gradient in its
steps, which is where ZeRO's own accounting fails."""


def settings(run_dir: Path, *overrides: str) -> RunConfig:
    """Soft steps, the freeze, sliced steps, a stage change; two passes make a step."""
    return small_settings(
        run_dir,
        *SPACE,
        # A full member that is its teacher has no gradient but rounding: no step is made of that.
        "optim.eps=1e-4",
        "trainer.log_every=1",
        "trainer.validate_every=4",
        "trainer.checkpoint_every=100",
        "router.freeze_at=0.5",
        "curriculum.stages.short.draws=2",
        "curriculum.stages.long.sequence_length=128",
        *overrides,
        steps=(3, 6, 3),
    )


@dataclass
class Result:
    """What a run has left."""

    weights: dict[str, torch.Tensor]
    losses: list[tuple[int, str, float]]
    """Step, column, value; training and validation."""


def result(run_dir: Path) -> Result:
    elastic = run_dir / "elastic"
    files = ("model.safetensors", "members.safetensors", "router.safetensors")
    weights = {key: value for name in files for key, value in load_file(elastic / name).items()}
    with (run_dir / "metrics.csv").open(newline="") as file:
        losses = [
            (int(row["step"]), name, float(value))
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name.endswith(("loss", "gradient_norm", "skipped_steps"))
        ]
    return Result(weights, losses)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    run_dir = tmp_path_factory.mktemp("runs") / "single"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ElasticModule, "training_step", spoiled(ElasticModule.training_step))
        launch(settings(run_dir, "trainer.micro_batch_tokens=256"))
    return result(run_dir)


def two_processes(config: RunConfig, draws: Path) -> None:
    """Start both as torchrun would, and wait; rank r writes its draws to `draws`/r.json."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in ("0", "1"):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.rank", str(draws / f"{rank}.json")],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(config)))
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    try:
        output = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)[-3000:]


CHECKPOINTING = "parent.activation_checkpointing=true"
STRATEGIES = {
    "ddp": [],
    "zero1": [],
    "zero2": ["trainer.offload_optimizer=true"],
    "zero3": [CHECKPOINTING],
}
MORE = {
    "zero2": [],
    "zero3": [CHECKPOINTING, "trainer.offload_optimizer=true"],
}


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        *STRATEGIES.items(),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE.items()),
    ],
)
def test_two_processes_learn_what_one_does(
    strategy: str, more: list[str], alone: Result, tmp_path: Path
) -> None:
    """Loss curve, gradient norms, weights and routers, through every phase; and both processes
    draw the same budgets and the same noise (law 8). In one step the loss is infinite on one
    process: nobody takes it."""
    config = settings(
        tmp_path / "run",
        f"trainer.strategy={strategy}",
        "trainer.devices=2",
        "trainer.micro_batch_tokens=128",
        *more,
    )
    two_processes(config, tmp_path)
    found = result(tmp_path / "run")
    assert [each[:2] for each in found.losses] == [each[:2] for each in alone.losses]
    for (step, name, value), (*_, expected) in zip(found.losses, alone.losses, strict=True):
        if math.isfinite(expected):
            assert value == pytest.approx(expected, abs=LOSSES, rel=LOSSES), (step, name)
        else:
            assert not math.isfinite(value), (step, name)
    assert found.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        assert (found.weights[name] - weight).abs().max() <= WEIGHTS, name
    mine, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(mine) == 2 * (6 + 3) and mine == other
    # The two micro-batches of a step are a draw each in the first stage, one draw in the second.
    assert len({seed for _, seed, *_ in mine}) == 2 * 6 + 3


def test_a_step_that_is_not_finite_is_skipped_and_counted(alone: Result) -> None:
    """On the tolerance of the curves above it would not be noticed that nothing was."""
    skipped = [(step, value) for step, name, value in alone.losses if name.endswith("steps")]
    assert [value for step, value in skipped if 3 < step <= 9] == [0, 0, 0, 1, 1, 1]
    finite = [math.isfinite(value) for *_, value in alone.losses]
    assert finite.count(False) == 2  # the loss of that step, and the norm of its gradient
