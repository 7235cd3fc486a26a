"""Sorting a checkpoint on disk is sorting the parent in memory, in a few megabytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import in_published_types
from helpers.orders import identity_orders, random_orders
from helpers.strategies import random_parent, tiny_shape
from safetensors.torch import load_file, save_file

from elastic.importance import is_sorted, sort_checkpoint, sort_parent
from elastic.members.cut import tensor_shapes
from elastic.parent.weights import load_parent, save_parent, save_weights
from elastic.storage.files import write_json
from elastic.storage.writing import Pending

SHAPE = tiny_shape(pattern="M-*M-")


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    """bfloat16 with float32 pieces, several shards, config.json of the remote-code era, files."""
    directory = tmp_path / "wild"
    directory.mkdir()
    parent = in_published_types(random_parent(SHAPE))
    save_parent(parent, directory, max_shard_bytes=3000)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"},
        "rms_norm_eps": config["layer_norm_epsilon"],
        "time_step_limit": [0.0, float("inf")],
        "num_logits_to_keep": 1,
        "torch_dtype": "bfloat16",
    }
    write_json(directory / "config.json", config)
    for name in ("LICENSE", "NOTICE.txt", "tokenizer.json", "chat_template.jinja"):
        (directory / name).write_text(name)
    (directory / "modeling_nemotron_h.py").write_text("raise SystemExit")
    return directory


def test_identity_writes_the_same_bytes_per_tensor(wild: Path, tmp_path: Path) -> None:
    """Types included; config.json says the same sizes, and nothing asks for remote code."""
    out = tmp_path / "out"
    out.mkdir()
    sort_checkpoint(wild, out, identity_orders(SHAPE), "key", max_shard_bytes=4000)
    before, after = stored(wild), stored(out)
    assert before.keys() == after.keys()
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16, torch.float32}
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype and torch.equal(weight, after[name]), name
    old, new = (json.loads((d / "config.json").read_text()) for d in (wild, out))
    assert new["torch_dtype"] == "bfloat16" and "auto_map" not in new
    assert {k for k in old | new if old.get(k) != new.get(k)} <= {
        "auto_map",
        "rms_norm_eps",
        "time_step_limit",  # JSON has no infinity
    }
    files = {path.name for path in out.iterdir()}
    assert files >= {"LICENSE", "NOTICE.txt", "tokenizer.json", "chat_template.jinja"}
    assert not any(name.endswith(".py") for name in files)


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_on_disk_as_in_memory(tmp_path: Path, seed: int, tied_head: bool) -> None:
    shape = tiny_shape(pattern="M-*M-*M", hidden_size=24, tied_head=tied_head)
    parent, orders = random_parent(shape, seed), random_orders(shape, seed)
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    save_parent(parent, tmp_path / "in", max_shard_bytes=5000)
    sort_checkpoint(tmp_path / "in", tmp_path / "out", orders, "key")
    sort_parent(parent, orders)
    for name, weight in load_parent(tmp_path / "out").state_dict().items():
        assert torch.equal(weight, parent.state_dict()[name]), name


def test_a_sorted_checkpoint_knows_its_ranking(wild: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert not is_sorted(out, "key")
    sort_checkpoint(wild, out, identity_orders(SHAPE), "key")
    assert is_sorted(out, "key")
    assert not is_sorted(out, "another")


def test_a_tied_head_that_is_stored_alone_is_written_twice(tmp_path: Path) -> None:
    """As everywhere here: stock transformers would not tie it."""
    shape = tiny_shape(tied_head=True)
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    save_parent(random_parent(shape), tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    sort_checkpoint(tmp_path / "in", tmp_path / "out", random_orders(shape, 0), "key")
    written = stored(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], written["backbone.embeddings.weight"])


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from elastic.config import ParentShape
from elastic.importance import Orders, sort_checkpoint
torch.set_num_threads(1)
hidden, ffn = 1024, 65536
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
generator = torch.Generator().manual_seed(0)
orders = Orders(torch.randperm(hidden, generator=generator),
                {0: torch.randperm(ffn, generator=generator)}, {}, {}, {})
before = peak()
sort_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), orders, "k")
print(peak() - before)
"""


def test_memory_is_that_of_a_few_blocks(tmp_path: Path) -> None:
    """Two matrices of 134 MB are never whole in memory; three copies of a block are 96 MB."""
    shape = tiny_shape(pattern="-", hidden_size=1024, intermediate_size=65_536, vocab_size=300)
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    zeros = [
        Pending(name, size, torch.bfloat16, lambda size=size: torch.zeros(size).split(4096))
        for name, size in tensor_shapes(shape).items()
    ]
    save_weights(tmp_path / "in", shape, zeros)
    grown = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(grown.stdout.splitlines()[-1]) < 120e6 < 2 * 65_536 * 1024
