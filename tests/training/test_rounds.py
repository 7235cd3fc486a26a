"""Runs whose candidates train in rounds, by either router: resuming is never stopping (law 7)."""

from pathlib import Path

import pytest
import torch
from helpers.runs import Stop, small_settings
from safetensors.torch import load_file

import elastic.training.train
from elastic.config import RunConfig
from elastic.storage.manifest import Manifest
from elastic.training.launch import launch


def settings(run_dir: Path, kind: str) -> RunConfig:
    """Four soft steps, two rounds of two, then sliced ones; four draws make a step."""
    return small_settings(
        run_dir,
        f"router.kind={kind}",
        "router.freeze_at=0.25",
        "router.rounds=2",
        "router.round_share=0.12",
        "trainer.checkpoint_every=1",
        "trainer.validate_every=100",
        steps=(2, 10, 6),
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = ("model.safetensors", "members.safetensors", "router.safetensors")
    return {k: v for name in files for k, v in load_file(run_dir / "elastic" / name).items()}


@pytest.mark.parametrize("kind", ["axes", "members"])
def test_a_run_goes_on_in_the_midst_of_its_rounds(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    launch(settings(tmp_path / "whole", kind))
    assert caplog.text.count("candidates that train on:") == 2
    assert caplog.text.count("router frozen; the family is") == 1
    for passes in (2 + 4 * 2, 4 * 4):  # in the soft phase, and between the rounds
        with monkeypatch.context() as patch:
            stop = Stop(passes)
            patch.setattr(elastic.training.train, "Progress", lambda one=stop: one)
            with pytest.raises(SystemExit):
                launch(settings(tmp_path / "stopped", kind))
    launch(settings(tmp_path / "stopped", kind))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    manifests = [Manifest.read(tmp_path / name / "elastic") for name in ("whole", "stopped")]
    assert manifests[0].budgets == manifests[1].budgets
    decision = manifests[0].budgets["small"].decision
    assert decision is not None
    trained = [candidate["tokens"] for candidate in decision["candidates"]]
    assert sum(tokens > 0 for tokens in trained) >= 2 and 0 in trained
    assert all(tokens % 128 == 0 for tokens in trained), "whole draws of two sequences of 64"
