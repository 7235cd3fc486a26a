"""The figures of a family: what is measured is the member that is named, and nothing else runs."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import small_settings
from safetensors.torch import load_file, save_file

from elastic.config import ConfigError, EvaluateConfig, ExtractConfig
from elastic.evaluate import family
from elastic.evaluate.family import evaluate
from elastic.extract.export import extract
from elastic.training.launch import launch

WEIGHTS = "model.safetensors"

RAN = "ELASTIC_TEST_RAN"
"""Name of a file, and of the variable that says where it is: code runs from a copy elsewhere."""

CODE = f"import os, pathlib\npathlib.Path(os.environ['{RAN}']).touch()\nraise SystemExit\n"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a step per stage; tests must not change it."""
    directory = tmp_path_factory.mktemp("runs") / "short"
    launch(small_settings(directory, steps=(1, 1, 1)))
    return directory


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its members, each in its own directory; tests must not change them."""
    members = tmp_path_factory.mktemp("members")
    for budget in ("full", "medium", "small"):
        source, output = str(run_dir / "elastic"), str(members / budget)
        extract(ExtractConfig(checkpoint=source, budget=budget, output=output, verify=False))
    return members


@pytest.fixture
def members(exported: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported, tmp_path / "members"))


def measure(run_dir: Path, members: Path | None, output: Path) -> dict[str, Any]:
    return evaluate(
        EvaluateConfig(
            run_dir=str(run_dir),
            members=None if members is None else str(members),
            sequences=2,
            sequence_length=32,
            prompts=["def "],
            new_tokens=2,
            output=str(output / "family.json"),
        )
    )


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_code(directory: Path) -> None:
    """What `auto_map` names, in every file that can name it."""
    (directory / "code.py").write_text(CODE)
    models = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    change_json(directory / "config.json", auto_map=models)
    change_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T"] * 2})


def test_members_on_disk_are_the_members_cut_in_memory(
    run_dir: Path, exported: Path, tmp_path: Path
) -> None:
    assert measure(run_dir, exported, tmp_path) == measure(run_dir, None, tmp_path)


def test_code_of_a_member_never_runs_whatever_is_answered(
    run_dir: Path, members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask, and run it on a yes."""
    for budget in ("full", "medium", "small"):
        add_code(members / budget)
    monkeypatch.setenv(RAN, str(tmp_path / RAN))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    measured = measure(run_dir, members, tmp_path)
    assert all(math.isfinite(row["loss"]) for row in measured["members"])
    # A class that transformers does not know cannot be had without its code.
    change_json(members / "small" / "tokenizer_config.json", tokenizer_class="T")
    with pytest.raises(ValueError, match="tokenizer of small=.*small: cannot load a tokenizer"):
        measure(run_dir, members, tmp_path)
    assert not (tmp_path / RAN).exists()


def pickled(members: Path) -> None:
    weights = load_file(members / "small" / WEIGHTS)
    torch.save(weights, members / "small" / "pytorch_model.bin")
    (members / "small" / WEIGHTS).unlink()


def without_last(members: Path) -> None:
    weights = load_file(members / "small" / WEIGHTS)
    del weights["lm_head.weight"]
    save_file(weights, members / "small" / WEIGHTS, {"format": "pt"})


def of_medium(members: Path) -> None:
    shutil.rmtree(members / "small")
    shutil.copytree(members / "medium", members / "small")


def of_medium_saved_by_others(members: Path) -> None:
    of_medium(members)
    (members / "small" / "provenance.json").unlink()


def of_other_layers(members: Path) -> None:
    path = members / "small" / "provenance.json"
    said = json.loads(path.read_text())
    said["architecture"]["layers"][0]["index"] = 2
    path.write_text(json.dumps(said))


def other_function(members: Path) -> None:
    change_json(members / "small" / "config.json", layer_norm_epsilon=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled, r"small: no model weights found"),
        (without_last, r"small: tensor lm_head\.weight is missing"),
        (
            of_medium,
            r"json: (pattern|hidden_size)=\S+, but elastic\.json gives \S+; .* not that member",
        ),
        (
            of_medium_saved_by_others,
            r"config\.json: (pattern|hidden_size)=\S+, but elastic\.json gives \S+",
        ),
        (of_other_layers, r"provenance\.json: layers=\[2, .*but elastic\.json gives \[0, "),
        (other_function, r"config\.json: norm_eps=0\.1, but elastic\.json gives 1e-05"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_not_the_member_is_named_and_not_measured(
    run_dir: Path,
    members: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
) -> None:
    change(members)
    with pytest.raises(ValueError, match=message) as caught:
        measure(run_dir, members, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "family.json").exists()


def test_a_prompt_that_the_tokenizer_drops_is_named(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do that strip what they have no token for; transformers would fail far from it."""

    class Drops:
        eos_token_id = None

        def __call__(self, prompt: str, return_tensors: str) -> Any:
            return SimpleNamespace(input_ids=torch.zeros(1, 0))

    monkeypatch.setattr(family, "load_tokenizer", lambda *_: Drops())
    with pytest.raises(ConfigError, match="^prompts: the tokenizer makes no token of 'def '"):
        measure(run_dir, None, tmp_path)
    assert not list(tmp_path.iterdir())
