"""Checkpoints: what is written is read again bit for bit, by us and by stock transformers.

Compared: saved with loaded weights, our logits with those of `from_pretrained`, and every way in
which a checkpoint can be wrong with the one line that says so.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import INDEX, WHOLE, load_stock, reconfigure, refused, rewrite, saved
from helpers.strategies import assert_near, random_parent, random_tokens, shapes, tiny_shape
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.config import ParentShape
from elastic.parent.stock import read_config, stock_config
from elastic.parent.weights import load_parent, locate, save_parent


@given(shapes())
def test_saved_and_loaded_parent_is_bit_equal(
    tmp_path_factory: pytest.TempPathFactory, shape: ParentShape
) -> None:
    directory = tmp_path_factory.mktemp("parent")
    parent = saved(directory, shape)
    loaded = load_parent(directory)
    assert loaded.shape == shape
    expected = parent.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@given(shapes(max_layers=4))
def test_stock_transformers_loads_it_with_the_same_logits(
    tmp_path_factory: pytest.TempPathFactory, shape: ParentShape
) -> None:
    directory = tmp_path_factory.mktemp("parent")
    parent, tokens = saved(directory, shape), random_tokens(shape)
    assert_near(parent.logits(tokens), load_stock(directory)(tokens).logits)


@pytest.mark.parametrize("max_shard_bytes", [1, 2000], ids=["one_tensor_each", "some_tensors_each"])
def test_shards_hold_no_more_than_asked_and_the_index_names_them_all(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    shape = tiny_shape()
    parent = saved(tmp_path, shape, max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / INDEX).read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 2
    assert set(index["weight_map"].values()) == files
    expected = parent.state_dict()
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(w.numel() * 4 for w in expected.values())
    for name in files:
        tensors = load_file(tmp_path / name)
        size = sum(weight.numel() * 4 for weight in tensors.values())
        assert size <= max_shard_bytes or len(tensors) == 1
        assert all(index["weight_map"][key] == name for key in tensors)
    loaded, tokens = load_parent(tmp_path), random_tokens(shape)
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)
    assert_near(parent.logits(tokens), load_stock(tmp_path)(tokens).logits)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    saved(tmp_path, tiny_shape())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WHOLE]


def test_bfloat16_is_stored_as_it_is_and_read_into_float32(tmp_path: Path) -> None:
    parent = random_parent(tiny_shape()).bfloat16()
    save_parent(parent, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_file(tmp_path / WHOLE).values()} == {torch.bfloat16}
    for name, weight in load_parent(tmp_path).state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, parent.state_dict()[name].float()), name


# A tied head: the flag, and what is stored.


def test_a_tied_head_is_stored_twice_so_that_stock_transformers_finds_it(tmp_path: Path) -> None:
    parent, tokens = saved(tmp_path, tiny_shape(tied_head=True)), random_tokens(tiny_shape())
    stored = load_file(tmp_path / WHOLE)
    assert torch.equal(stored["lm_head.weight"], stored["backbone.embeddings.weight"])
    assert_near(parent.logits(tokens), load_stock(tmp_path)(tokens).logits)
    loaded = load_parent(tmp_path)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight


def test_a_tied_head_that_is_not_stored_is_the_embedding(tmp_path: Path) -> None:
    parent, tokens = saved(tmp_path, tiny_shape(tied_head=True)), random_tokens(tiny_shape())
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    loaded = load_parent(tmp_path)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    assert torch.equal(loaded.logits(tokens), parent.logits(tokens))


def test_a_head_that_differs_from_the_embedding_is_not_tied_whatever_the_flag_says(
    tmp_path: Path,
) -> None:
    """Stock transformers uses the head that is stored, so we must too."""
    parent, tokens = saved(tmp_path, tiny_shape()), random_tokens(tiny_shape())
    reconfigure(tmp_path, tie_word_embeddings=True)
    loaded = load_parent(tmp_path)
    assert not loaded.shape.tied_head
    assert torch.equal(loaded.logits(tokens), parent.logits(tokens))
    assert_near(loaded.logits(tokens), load_stock(tmp_path)(tokens).logits)


# Refusals: one ValueError that says what is wrong.


def remove_shard(directory: Path) -> None:
    next(directory.glob("model-00002-*")).unlink()


def truncate_shard(directory: Path) -> None:
    shard = next(directory.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-8])


def empty_shard(directory: Path) -> None:
    next(directory.glob("model-00002-*")).write_bytes(b"")


def damage_index(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": ["a"]')


def index_without_map(directory: Path) -> None:
    (directory / INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, r"model-00002-of-\d+\.safetensors: shard is missing"),
        (truncate_shard, r"model-00002-of-\d+\.safetensors: shard is truncated or damaged"),
        (empty_shard, r"model-00002-of-\d+\.safetensors: shard is truncated or damaged"),
        (damage_index, r"index\.json: damaged"),
        (index_without_map, r"index\.json: damaged"),
    ],
)
def test_damaged_shards_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    saved(tmp_path, tiny_shape(), max_shard_bytes=2000)
    load_parent(tmp_path)
    damage(tmp_path)
    refused(tmp_path, message)


def remove_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors["backbone.layers.0.mixer.D"]


def remove_embedding(tensors: dict[str, Tensor]) -> None:
    del tensors["backbone.embeddings.weight"]


def remove_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def add_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.layers.0.mixer.extra"] = torch.zeros(1)


def reshape_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.layers.1.mixer.up_proj.weight"] = torch.zeros(3, 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_tensor, r"tensor backbone\.layers\.0\.mixer\.D is missing"),
        (remove_embedding, r"tensor backbone\.embeddings\.weight is missing"),
        (remove_head, r"tensor lm_head\.weight is missing"),
        (add_tensor, r"unknown tensor backbone\.layers\.0\.mixer\.extra \(1 in all\)"),
        (reshape_tensor, r"up_proj\.weight has shape \(3, 13\), config\.json gives \(17, 13\)"),
    ],
)
def test_tensors_that_do_not_fit_config_json_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    saved(tmp_path, tiny_shape())
    rewrite(tmp_path, change)
    refused(tmp_path, message)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"config\.json: not found")
    (tmp_path / "config.json").write_text("{ not json")
    refused(tmp_path, r"config\.json: damaged, not valid JSON")
    (tmp_path / "config.json").write_text(json.dumps(stock_config(tiny_shape())))
    refused(tmp_path, r"no model weights")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    parent = saved(tmp_path, tiny_shape())
    (tmp_path / WHOLE).unlink()
    torch.save(parent.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"no model weights")


def test_an_elastic_checkpoint_loads_as_its_parent(tmp_path: Path) -> None:
    """router.safetensors lies beside the weights and is none of them."""
    saved(tmp_path, tiny_shape())
    save_file({"logits": torch.zeros(2)}, tmp_path / "router.safetensors")
    load_parent(tmp_path)


def test_a_local_directory_is_located_without_the_hub(tmp_path: Path) -> None:
    saved(tmp_path, tiny_shape())
    assert locate(str(tmp_path)) == tmp_path
    assert read_config(tmp_path)["model_type"] == "nemotron_h"


def test_a_path_that_is_neither_here_nor_on_the_hub_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^parent\.path=not/a/repo: neither a local directory"):
        locate("not/a/repo")
