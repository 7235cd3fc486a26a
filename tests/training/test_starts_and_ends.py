"""What elastic training starts from, and what is kept where a stage ends."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.test_run import BUDGETS, brief, stop_at, weights_of

from elastic.config import ConfigError, EvaluateConfig
from elastic.evaluate.family import evaluate
from elastic.training.launch import launch


def test_the_checkpoint_of_every_stage_is_kept_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped where `short` has ended keeps that checkpoint when it goes on; another
    one measures it."""
    run_dir = tmp_path / "run"
    stop_at([10 + 16 + 1], run_dir, monkeypatch, "keep_stages=true")
    at_the_end = weights_of(run_dir)
    shutil.rmtree(run_dir / "elastic-short")  # as if it had been killed just before
    launch(brief(run_dir, "keep_stages=true"))
    kept = load_file(run_dir / "elastic-short" / "model.safetensors")
    assert all(torch.equal(at_the_end[name], weight) for name, weight in kept.items())
    last = weights_of(run_dir)
    assert not all(torch.equal(last[name], weight) for name, weight in kept.items())
    assert (run_dir / "elastic-long" / "elastic.json").is_file()
    sizes = {"sequences": 4, "sequence_length": 64}
    early, late = (
        evaluate(EvaluateConfig(run_dir=str(run_dir), stage=stage, **sizes))
        for stage in ("short", None)
    )
    assert early["members"] != late["members"]
    with pytest.raises(ConfigError) as error:
        evaluate(EvaluateConfig(run_dir=str(run_dir), stage="middle"))
    assert str(error.value).endswith("kept are elastic-long, elastic-short")
    inside = str(run_dir / "elastic-short" / "family.json")
    with pytest.raises(ValueError, match="elastic-short"):
        evaluate(EvaluateConfig(run_dir=str(run_dir), output=inside))
    assert not Path(inside).exists()


def test_members_may_start_from_random_weights(tmp_path: Path) -> None:
    """Their first loss is that of guessing; the parent still teaches, unchanged."""
    run_dir = tmp_path / "run"
    launch(brief(run_dir, "curriculum.start=random", "norms.own=false", "trainer.validate_every=1"))
    with (run_dir / "metrics.csv").open(newline="") as file:
        (first, *_) = [row for row in csv.DictReader(file) if row["val/small/loss"]]
    for budget in BUDGETS:
        assert float(first[f"val/{budget}/loss"]) == pytest.approx(math.log(384), abs=0.15)
    assert float(first["val/parent/loss"]) < math.log(384) - 0.15
    with pytest.raises(ConfigError, match=r"^norms.own=True: must be false with curriculum.start"):
        brief(run_dir, "curriculum.start=random")
