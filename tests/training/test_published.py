"""The published experiments from end to end: a checkpoint as it is in the wild, at small size.

Everything but the sizes is the experiment's: a parent that is given, its tokenizer, local files,
two stages of all budgets together, the published names of the budgets.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import in_published_types
from helpers.runs import CALIBRATION, CONF, STDLIB, settings, stage
from helpers.strategies import random_parent, tiny_shape
from safetensors.torch import load_file, save_file

import elastic
from elastic.config import ConfigError, ExtractConfig, ParentShape, RunConfig
from elastic.data.tokenizer import train_tokenizer
from elastic.extract.export import extract
from elastic.parent.weights import save_parent
from elastic.storage.files import write_json
from elastic.storage.manifest import Manifest
from elastic.training.launch import launch

PUBLISHED = sorted(path.stem for path in (CONF / "experiment").glob("nano*.yaml"))

SHAPE = tiny_shape(
    pattern="M-M*-M-",
    hidden_size=48,
    vocab_size=384,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16 with float32 pieces, sharded, config.json of the remote-code era, a licence."""
    directory = tmp_path_factory.mktemp("wild")
    parent = in_published_types(random_parent(SHAPE))
    save_parent(parent, directory, max_shard_bytes=30_000)
    config = json.loads((directory / "config.json").read_text())
    config |= {"time_step_min": 0.001, "time_step_limit": [0.0, float("inf")]}
    config |= {"auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}}
    write_json(directory / "config.json", config)
    texts = [path.read_text() for path in sorted((STDLIB / "email").glob("*.py"))]
    train_tokenizer(texts, SHAPE.vocab_size).save_pretrained(directory)
    (directory / "LICENSE").write_text("as is")
    (directory / "README.md").write_text("---\nlicense: other\nlicense_name: open\n---\n# Parent\n")
    return directory


def small(run_dir: Path, parent: Path, experiment: str, *overrides: str) -> RunConfig:
    """The experiment on a parent of 130,000 parameters, a step or two per stage."""
    full, middle, least = settings(Path("unused"), experiment=experiment).budgets
    return settings(
        run_dir,
        f"parent.path={parent}",
        "parent.shape=null",
        f"data.path='{STDLIB}/email/*.py'",
        "data.validation_every=5",
        "data.validation_sequences=2",
        "trainer=cpu",
        "trainer.num_nodes=1",
        "trainer.strategy=single",
        "objective.teacher=replicated",
        "space.hidden=[48,44,40,36,32,28]",
        "space.ffn=[128,112,96,80,64]",
        "space.mamba_heads=[4,2]",
        "space.depth=[7,6]",
        "space.tolerance=0.03",
        f"budgets={{{full}:{{params:1.0}},{middle}:{{params:0.75}},{least}:{{params:0.5}}}}",
        *CALIBRATION,
        *stage("short", 2),
        "curriculum.stages.short.draws=1",
        *stage("long", 1, length=128),
        "curriculum.stages.long.draws=1",
        *overrides,
        experiment=experiment,
    )


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_checkpoint_from_the_wild_becomes_a_family(
    experiment: str, wild: Path, tmp_path: Path
) -> None:
    """Types, licence and config come through; every budget can be cut and loaded."""
    config = small(tmp_path / "run", wild, experiment)
    output = launch(config)
    manifest = Manifest.read(output)
    assert list(manifest.budgets) == list(config.budgets)
    assert manifest.provenance["licence"] == {"license": "other", "license_name": "open"}
    assert (output / "LICENSE").read_text() == "as is"
    assert "auto_map" not in json.loads((output / "config.json").read_text())
    written = load_file(output / "model.safetensors")
    for path in wild.glob("*.safetensors"):
        for name, weight in load_file(path).items():
            assert written[name].dtype == weight.dtype, name
    smallest = list(manifest.budgets)[-1]
    extract(ExtractConfig(checkpoint=str(output), budget=smallest, output=str(tmp_path / smallest)))
    model = elastic.load(output, smallest)
    assert sum(w.numel() for w in model.parameters()) == manifest.budgets[smallest].params
    assert model.dtype == torch.bfloat16


def test_a_parent_with_a_nan_is_named_and_nothing_is_made_of_it(wild: Path, tmp_path: Path) -> None:
    """It was ranked, sorted, trained and frozen, where only steps that are not finite stop a
    run."""
    parent = Path(shutil.copytree(wild, tmp_path / "parent"))
    name = "backbone.layers.5.mixer.in_proj.weight"
    index = json.loads((parent / "model.safetensors.index.json").read_text())
    shard = parent / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][5, 6] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    config = small(tmp_path / "run", parent, PUBLISHED[0])
    with pytest.raises(ValueError, match=rf"{shard.name}: tensor {name} has nan in row 5; weights"):
        launch(config)
    made = {path.name for path in (tmp_path / "run").rglob("*.safetensors")}
    assert not made, "nothing of it was ranked, sorted or trained"


def test_another_parent_than_announced_is_refused_before_any_work(
    wild: Path, tmp_path: Path
) -> None:
    """The sizes of the experiment are those that were planned."""
    config = small(tmp_path / "run", wild, "nano_v2_12b")
    config.parent.shape = ParentShape(**{**vars(SHAPE), "ssm_state_size": 24})
    with pytest.raises(ConfigError, match=r"parent.shape.ssm_state_size=24: must be 16, as in"):
        launch(config)
    assert not (tmp_path / "run" / "sorted").exists()


def test_sizes_are_checked_before_anything_is_downloaded(tmp_path: Path) -> None:
    """They are announced, and a checkpoint of this size takes hours."""
    config = small(tmp_path / "run", tmp_path / "not-there-yet", "nano_v2_12b")
    config.parent.shape = ParentShape(**{**vars(SHAPE)})
    config.budgets["9b"].params = 2e9
    with pytest.raises(ConfigError, match=r"budgets.9b.params=2e\+09: must be at most the parent"):
        launch(config)
