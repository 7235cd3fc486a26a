"""Every bench end to end at toy sizes: the figures that it promises are there, and are numbers."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import CONF
from helpers.waiting import LIMIT
from hydra import compose, initialize_config_dir

from elastic.bench import cutting, extract, scan, step
from elastic.bench.result import device_of, report
from elastic.bench.subjects import balanced_members, shape_of
from elastic.config import (
    BENCHES,
    BenchConfig,
    ConfigError,
    ScanBenchConfig,
    StepBenchConfig,
    parse,
)

ROOT = CONF.parent

SMALL_PARENT = [
    "parent.shape.pattern=M-*M-",
    "parent.shape.hidden_size=16",
    "parent.shape.vocab_size=32",
    "parent.shape.intermediate_size=32",
    "parent.shape.num_attention_heads=4",
    "parent.shape.num_key_value_heads=2",
    "parent.shape.head_dim=4",
    "parent.shape.mamba_num_heads=4",
    "parent.shape.mamba_head_dim=8",
    "parent.shape.n_groups=2",
    "parent.shape.ssm_state_size=8",
    "space.hidden=[16,15,14,13,12,11,10,9,8]",
    "space.ffn=[32,28,24,20,16]",
    "space.mamba_heads=[4,2]",
    "space.mamba_head_dim=[8,7,6,5]",
    "space.attention_heads=[4,2]",
    "space.depth=[5,4]",
    "space.tolerance=0.02",
]
SMALL_SCAN = {"batch": 1, "time": 24, "heads": 4, "channels": 4, "groups": 2, "state": 4}

TOY = {
    "step": [*SMALL_PARENT, "sequences=2", "sequence_length=9", "stock_chunks=[4,8]"],
    "run": [*SMALL_PARENT, "sequence_length=8", "batch_tokens=16", "steps=2"],
    "scan": [f"shapes.{n}.{k}={v}" for n in ("short", "long") for k, v in SMALL_SCAN.items()],
    "loss": ["tokens=256", "vocabulary=4096", "hidden=8", "chunk_tokens=16"],
    "data": [
        *(setting for setting in SMALL_PARENT if setting.startswith("parent.")),
        "parent.shape.vocab_size=300",
        "vocabulary=280",
        "megabytes=2",
        "sequences=2",
        "sequence_length=9",
        "steps=2",
        "loader_workers=[0]",
        "memory=false",
    ],
    "profile": [*SMALL_PARENT, "sequences=2", "sequence_length=9", "square=64", "share=0.5"],
    "extract": [
        "scale=0.01",
        "parent.shape.pattern=M-M*-M-",
        "space.depth=[7,6,5]",
        "space.tolerance=0.05",
        "budgets={9b:{params:0.75},6b:{params:0.5}}",
    ],
}
"""Overrides that make a bench a matter of a second; only `loss` starts processes to see memory."""
QUICK = ["repeats=2", "device=cpu"]

SHARES = ("0.75", "0.5")
PROMISED = {
    "step": [
        *(
            f"{figure}.{share}"
            for share in SHARES
            for figure in ("sliced_over_full", "flops_ratio")
        ),
        *(f"{f}.{share}" for share in SHARES for f in ("sliced_over_flops", "masked_over_full")),
        "full_over_transformers",
        "seconds.sliced 0.5",
        "tokens_per_second.full",
    ],
    "run": [
        "frozen_over_soft",
        *(f"tokens_per_second.{phase}" for phase in ("soft", "frozen")),
        *(
            f"seconds_per_1k_budget_tokens.{name}"
            for name in ("one", "2 of 3", "3 of 3", "all, in place")
        ),
    ],
    "scan": [
        *(f"speedup_{name}" for name in ("short", "long")),
        *(f"milliseconds_{name}.transformers.16" for name in ("short", "long")),
        "best_chunk_long.ours",
    ],
    "loss": ["peak_memory_ratio", "time_ratio"],
    "data": [
        "megabytes_per_second",
        "bytes_per_token",
        "packed_tokens_per_second.0 workers",
        "loader_over_step.0 workers",
    ],
    "profile": ["share.matmul", "share.elementwise", "achieved_gflops", "machine_gflops"],
    "extract": [
        *("peak_rss_gib", "bytes_read_over_needed", "bytes_read_over_touched", "time_over_copy"),
        *(f"{name}.{f}" for name in ("9b", "6b") for f in ("parameters", "verify_seconds")),
        *(f"{name}.{f}" for name in ("9b", "6b") for f in ("seconds", "gb_per_second")),
    ],
}


def settings(name: str, *overrides: str) -> BenchConfig:
    """What `python -m elastic.bench NAME overrides` would measure."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(compose(f"bench/{name}", list(overrides)), BENCHES[name])


def run(name: str, output: Path, *overrides: str) -> dict[str, Any]:
    """The figures of a bench as written."""
    config = settings(name, *TOY[name], *QUICK, *overrides, f"json='{output}'")
    report(name, config, import_module(f"elastic.bench.{name}").measure)
    written: dict[str, Any] = json.loads(output.read_text())
    assert written["name"] == name
    assert {"cpu", "threads", "memory_gib", "torch"} <= written["machine"].keys()
    assert written["settings"]["repeats"] == 2
    figures: dict[str, Any] = written["figures"]
    return figures


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures by dotted key."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        key = f"{prefix}{name}"
        found |= flat(value, f"{key}\0") if isinstance(value, dict) else {key: value}
    return {key.replace("\0", "."): value for key, value in found.items()}


@pytest.mark.parametrize("name", sorted(BENCHES))
def test_a_bench_writes_the_figures_that_it_promises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["memory=false"] if name in ("step", "scan") else []
    if name == "extract":
        extra = [f"dir='{tmp_path / 'bench'}'"]
        here = lambda config, verified: cutting.cut(asdict(config), verified, 1)  # noqa: E731
        monkeypatch.setattr(extract, "in_child", here)
    figures = flat(run(name, tmp_path / "figures.json", *extra))
    assert set(PROMISED[name]) <= figures.keys()
    for key, value in figures.items():
        assert math.isfinite(value) and value > 0, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scans_can_be_measured_in_memory_too(dtype: str) -> None:
    """What the measuring processes run, run here."""
    config = settings("scan", *TOY["scan"], f"dtype={dtype}")
    assert isinstance(config, ScanBenchConfig)
    for who in (scan.OURS, scan.THEIRS):
        scan.prepare(config, config.shapes["short"], who, 8, device_of("cpu"))()


@pytest.mark.parametrize("kind", ["full", "sliced", "masked", step.STOCK])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_steps_can_be_measured_in_memory_too(kind: str, precision: str) -> None:
    config = settings("step", *TOY["step"], f"precision={precision}")
    assert isinstance(config, StepBenchConfig)
    shape = shape_of(config.parent)
    choices = balanced_members(config.space, shape, config.shares)
    member = choices["0.5"].architecture if kind in ("sliced", "masked") else None
    step.first_steps(config, kind, member, device_of("cpu"))()


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user would run it."""
    return subprocess.run(
        [sys.executable, "-m", "elastic.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_the_command_prints_a_table_and_writes_its_figures(tmp_path: Path) -> None:
    output = tmp_path / "new" / "scan.json"
    done = bench("scan", *TOY["scan"], *QUICK, "memory=false", f"json='{output}'")
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout and str(output) in done.stdout
    assert json.loads(output.read_text())["figures"]["speedup_long"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["step, run, scan, loss, profile"]),
        (["speed"], ["speed", "step, run, scan, loss, profile"]),
        (["json=out.json"], ["json=out.json", "step, run, scan, loss, profile"]),
        (["loss", "speed=1"], ["speed", "unknown", "chunk_tokens"]),
        (["loss", "chunk_tokens=0"], ["chunk_tokens=0", "positive"]),
        (["step", "shares=[0.5,1.0]"], ["shares=[0.5, 1.0]", "below 1"]),
        (["run", "shares=[1.0]"], ["shares=[1.0]", "two or more"]),
        (["profile", "parent=pretrained", "parent.path=DIR"], ["parent.path=DIR", "random"]),
        (["extract", "scale=1.5"], ["scale=1.5", "(0, 1]"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], words: list[str]
) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stdout
    for word in words:
        assert word in errors[0]


def test_bad_settings_stop_before_torch_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['bench', 'scan', 'dtype=int8']\n"
        "from elastic.cli.main import run\n"
        "try:\n    run('bench')\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("loss", "tokens=100000000", ["tokens=100000000", "GB"]),
        ("step", "space=tiny", ["space.hidden", "512"]),
        ("scan", "json=.", ["json=.", "directory"]),
    ],
)
def test_what_only_the_machine_or_the_parent_can_refuse_stops_at_once(
    name: str, override: str, words: list[str]
) -> None:
    measure = import_module(f"elastic.bench.{name}").measure
    with pytest.raises(ConfigError) as caught:
        report(name, settings(name, "device=cpu", override), measure)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device=cuda"):
        device_of("cuda")
