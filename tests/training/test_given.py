"""A run whose members are given: no router decides, and what is written are those members."""

import json
from pathlib import Path

import pytest
from helpers.runs import Stop, small_settings
from safetensors.torch import load_file

import elastic
from elastic.config import ConfigError
from elastic.storage.manifest import Manifest
from elastic.training.launch import launch

STEPS = (1, 3, 2)


def sizes(hidden: int, ffn: int, layers: str = "M-M*-M-") -> dict:
    """An entry of elastic.json, of the small parent."""
    made = {
        "M": {"kind": "mamba", "num_heads": 4, "head_dim": 16},
        "-": {"kind": "mlp", "intermediate_size": ffn},
        "*": {"kind": "attention", "num_heads": 4},
    }
    entries = [{"index": i, **made[kind]} for i, kind in enumerate(layers) if kind != "."]
    return {"hidden_size": hidden, "layers": entries}


MEDIUM, SMALL = sizes(44, 90), sizes(31, 67, "M-M*-.-")
"""Sizes that no list of choices has."""


def given(small: object) -> list[str]:
    def brief(value: object) -> str:
        """As on a command line: no quotes around keys."""
        return value if isinstance(value, str) else json.dumps(value).replace('"', "")

    return [
        "budgets.medium.params=null", f"budgets.medium.architecture={brief(MEDIUM)}",
        "budgets.small.params=null", f"budgets.small.architecture={brief(small)}",
        "trainer.checkpoint_every=1",
    ]  # fmt: skip


def test_given_members_are_trained_and_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From settings and from a file, through an interruption; another file is refused."""
    caplog.set_level("INFO")
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    settings = small_settings(tmp_path / "run", *given(f"'{file}'"), steps=STEPS)
    original = elastic.training.train.Progress
    with monkeypatch.context() as patch:
        patch.setattr(elastic.training.train, "Progress", lambda: Stop(after=6))
        with pytest.raises(SystemExit):
            launch(settings)
    assert elastic.training.train.Progress is original
    file.write_text(json.dumps(sizes(30, 67, "M-M*-.-")))
    with pytest.raises(ConfigError, match=r"^budgets\.small\.architecture: is not the member"):
        launch(settings)
    file.write_text(json.dumps(SMALL))
    launch(settings)
    directory = tmp_path / "run" / "elastic"
    manifest = Manifest.read(directory)
    assert manifest.budgets["medium"].architecture.to_json() == MEDIUM
    assert manifest.budgets["small"].architecture.to_json() == SMALL
    assert manifest.budgets["small"].decision is None
    assert manifest.budgets["small"].target == {"params": manifest.budgets["small"].params}
    assert load_file(directory / "router.safetensors").keys() <= {"multipliers"}
    model = elastic.load(directory, "small")
    assert sum(weight.numel() for weight in model.parameters()) == manifest.budgets["small"].params
    assert "members are given; the family is" in caplog.text
    assert "router frozen" not in caplog.text
