"""A ranking is computed once, kept on disk, and computed again when something it rests on changed.

Forward passes of the parent are counted; files are compared before and after.
"""

import copy
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.documents import rows_of
from helpers.strategies import random_parent, random_tokens, tiny_shape
from safetensors import safe_open
from safetensors.torch import save_file

from elastic.config import ImportanceConfig, SpaceConfig
from elastic.importance import Calibration, Orders, Ranking, read_ranking
from elastic.importance import rank as rank_checkpoint
from elastic.members.architecture import Space
from elastic.members.cut import tensor_shapes
from elastic.parent import HybridParent
from elastic.parent.weights import save_parent
from elastic.storage.seals import SealBroken, Seals, damage
from elastic.storage.store import TensorStore
from elastic.storage.writing import Pending

rank_module = importlib.import_module("elastic.importance.rank")  # the name `rank` is the function

SHAPE = tiny_shape(pattern="M-*M-M")
CONFIG = ImportanceConfig(samples=4, batch_size=2, depth_samples=4)
TEXT = Calibration(
    rows_of(random_tokens(SHAPE, batch=4)), rows_of(random_tokens(SHAPE, batch=4, time=7, seed=1))
)


def space(**axes: list[int]) -> Space:
    return Space.build(SpaceConfig(**({"depth": [6, 4]} | axes)), SHAPE)


def rank(parent: HybridParent, path: Path, **arguments: Any) -> Ranking:
    """Of a parent as it is now: it is written, and a copy is loaded when asked for."""
    source = path.parent.parent / "parent"
    source.mkdir(parents=True, exist_ok=True)
    save_parent(parent, source)
    return rank_checkpoint(source, lambda: copy.deepcopy(parent), path=path, **arguments)


class Counter:
    """How often a parent ran since the last look, by its first layer."""

    def __init__(self, parent: HybridParent) -> None:
        self.calls = 0
        parent.backbone.layers[0].register_forward_pre_hook(lambda *_: self.add())

    def add(self) -> None:
        self.calls += 1

    def look(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, Any]:
    """Arguments of `rank`."""
    return {
        "parent": random_parent(SHAPE),
        "calibration": TEXT,
        "config": CONFIG,
        "space": space(),
        "seed": 0,
        "data_fingerprint": "text",
        "path": tmp_path / "scores" / "importance.safetensors",
    }


def flat(orders: Orders) -> list[list[int]]:
    """All orders as lists, so that they can be compared."""
    per_layer = (orders.ffn, orders.mamba_heads, orders.mamba_channels, orders.attention_heads)
    lists = [order.tolist() for axis in per_layer for _, order in sorted(axis.items())]
    assert orders.rotation is not None
    return [orders.hidden.tolist(), *lists, orders.rotation.flatten().tolist()]


def same(one: Ranking, other: Ranking) -> bool:
    return (
        flat(one.orders) == flat(other.orders)
        and one.drop_order == other.drop_order
        and one.key == other.key
        and one.depth_errors == other.depth_errors
    )


# Once


def test_a_second_ranking_runs_no_forward_pass(setting: dict[str, Any]) -> None:
    counter = Counter(setting["parent"])
    first = rank(**setting)
    assert counter.look() > 0
    written = setting["path"].read_bytes()
    second = rank(**setting)
    assert counter.look() == 0
    assert same(first, second)
    assert setting["path"].read_bytes() == written


def test_the_ranking_has_every_axis_and_the_layers_to_drop(setting: dict[str, Any]) -> None:
    ranking = rank(**setting)
    assert len(ranking.drop_order) == 2 and len(ranking.depth_errors) == 2
    assert set(ranking.drop_order) <= {1, 3, 4}, "neither ends nor attention"
    errors = ranking.depth_errors[0]
    assert errors[ranking.drop_order[0]] == min(errors.values())
    assert list(ranking.orders.ffn) == [1, 4]
    entry = ranking.to_json(CONFIG)
    assert entry["drop_order"] == list(ranking.drop_order)
    assert entry["settings"]["depth_method"] == "iterative"
    assert entry["key"] == ranking.key


def test_a_random_order_looks_at_no_score_and_is_one_of_the_seed(setting: dict[str, Any]) -> None:
    """Heads stay in their groups, and the layers are among those that may be dropped; energies are
    the parent's, in that order."""
    scored = rank(**setting | {"config": dataclasses.replace(CONFIG, hidden="sort")})
    setting["config"] = dataclasses.replace(CONFIG, hidden="sort", order="random")
    found = {seed: rank(**setting | {"seed": seed}) for seed in (0, 1)}
    again = rank(**setting | {"seed": 0})
    assert same_orders(found[0], again) and not same_orders(found[0], found[1])
    assert not same_orders(found[0], scored)
    for ranking in found.values():
        assert set(ranking.drop_order) < {1, 3, 4} and len(set(ranking.drop_order)) == 2
        assert ranking.depth_errors == []
        assert sorted(ranking.orders.hidden.tolist()) == list(range(SHAPE.hidden_size))
        heads = ranking.orders.mamba_heads[0].view(SHAPE.n_groups, -1)
        size = heads.shape[1]
        for group, order in enumerate(heads.tolist()):
            assert sorted(order) == list(range(group * size, (group + 1) * size))
    norm = "backbone.norm_f.weight"
    as_found = scored.energies[norm][scored.orders.hidden.argsort()]
    assert torch.equal(found[1].energies[norm], as_found[found[1].orders.hidden])


def same_orders(one: Ranking, other: Ranking) -> bool:
    axes = ("ffn", "mamba_heads", "mamba_channels", "attention_heads")
    pairs = [(one.orders.hidden, other.orders.hidden)]
    for axis in axes:
        ours, theirs = getattr(one.orders, axis), getattr(other.orders, axis)
        pairs += [(ours[layer], theirs[layer]) for layer in ours]
    return one.drop_order == other.drop_order and all(torch.equal(a, b) for a, b in pairs)


def test_an_equal_parent_in_another_process_would_reuse_it(setting: dict[str, Any]) -> None:
    """What counts is the values of the weights, not which object holds them."""
    first = rank(**setting)
    other = setting | {"parent": random_parent(SHAPE)}
    counter = Counter(other["parent"])
    assert same(rank(**other), first)
    assert counter.look() == 0


# Again


def changed_weight(setting: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        setting["parent"].backbone.layers[0].mixer.D[0] += 1e-3
    return setting


CHANGES = {
    "weights": changed_weight,
    "settings": lambda s: s | {"config": dataclasses.replace(CONFIG, aggregation="mean_l2")},
    "data": lambda s: s | {"data_fingerprint": "other text"},
    "amount of data": lambda s: s | {"calibration": Calibration(TEXT.widths.first(3), TEXT.depth)},
    "amount of data for depth": (
        lambda s: s | {"calibration": Calibration(TEXT.widths, rows_of(TEXT.depth.inputs[:, :5]))}
    ),
    "seed": lambda s: s | {"seed": 1},
    "basis": lambda s: s | {"config": dataclasses.replace(CONFIG, spread=True)},
    "smallest depth": lambda s: s | {"space": space(depth=[6, 5, 3])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_it_rests_on_makes_a_new_ranking(setting: dict[str, Any], change: str) -> None:
    first = rank(**setting)
    setting = CHANGES[change](setting)
    counter = Counter(setting["parent"])
    second = rank(**setting)
    assert counter.look() > 0
    assert second.key != first.key
    assert same(rank(**setting), second)
    assert counter.look() == 0, "the file holds the new ranking"


@pytest.mark.parametrize(
    "axes",
    [{"hidden": [13, 8]}, {"ffn": [17, 9]}, {"mamba_head_dim": [7, 3]}, {"depth": [6, 5, 4]}],
    ids=["hidden", "ffn", "mamba_head_dim", "a depth between"],
)
def test_other_widths_use_the_same_scores(
    setting: dict[str, Any], axes: dict[str, list[int]]
) -> None:
    """Orders are worked out from the scores each time; only the depth ranking knows the space."""
    first = rank(**setting)
    counter = Counter(setting["parent"])
    second = rank(**(setting | {"space": space(**axes)}))
    assert counter.look() == 0
    assert second.key == first.key and second.drop_order == first.drop_order


def test_a_run_with_another_precision_goes_on_with_the_same_ranking(
    setting: dict[str, Any],
) -> None:
    first = rank(**setting)
    counter = Counter(setting["parent"])
    assert same(rank(**(setting | {"dtype": torch.bfloat16})), first)
    assert counter.look() == 0


def test_stored_scores_order_heads_for_the_head_dim_at_hand(tmp_path: Path) -> None:
    shape = tiny_shape(pattern="M", mamba_num_heads=2, mamba_head_dim=2, n_groups=1)
    scores = {"hidden": torch.ones(13), "layer.0": torch.tensor([[3.0, 4.0], [4.0, 0.0]])}
    for name, size in tensor_shapes(shape).items():
        if "norm" in name:
            scores[f"found.{name}"] = torch.ones(size)
    path = tmp_path / "importance.safetensors"
    save_file(scores, path, {"key": "any", "depth": '{"order": [], "rounds": []}'})
    Seals.of(tmp_path).write()
    assert read_ranking(path, shape, 1).orders.mamba_heads[0].tolist() == [1, 0]
    assert read_ranking(path, shape, 2).orders.mamba_heads[0].tolist() == [0, 1]


# The file


def test_a_ranking_read_again_is_the_same(setting: dict[str, Any]) -> None:
    setting["space"] = space(mamba_head_dim=[7, 3])
    ranking = rank(**setting)
    assert flat(read_ranking(setting["path"], SHAPE, 3).orders) == flat(ranking.orders)


def test_reading_without_a_ranking_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="importance.safetensors: no finished ranking"):
        read_ranking(tmp_path / "importance.safetensors", SHAPE, 7)


def test_a_file_with_another_key_is_replaced(setting: dict[str, Any]) -> None:
    expected = rank(**setting)
    path = setting["path"]
    with safe_open(path, framework="pt") as file:
        depth = file.metadata()["depth"]
        scores = {name: torch.rand_like(file.get_tensor(name)) for name in file.keys()}
    save_file(scores, path, {"key": "of something else", "depth": depth})
    Seals.of(path.parent).write()
    assert same(rank(**setting), expected)
    assert flat(read_ranking(path, SHAPE, 7).orders) == flat(expected.orders)


DAMAGES = {
    "empty": lambda whole: b"",
    "truncated header": lambda whole: whole[:20],
    "truncated tensors": lambda whole: whole[:-10],
    "one bit": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "not safetensors": lambda whole: b"once upon a time there was a ranking",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_replaced(
    setting: dict[str, Any], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the same bytes: what is trained on them goes on."""
    expected = rank(**setting)
    path = setting["path"]
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[kind](whole))
    with pytest.raises(SealBroken, match="importance.safetensors: .* restore it"):
        read_ranking(path, SHAPE, 7)
    assert same(rank(**setting), expected)
    assert f"{path}: " in caplog.text and "ranking again" in caplog.text
    assert path.read_bytes() == whole
    assert flat(read_ranking(path, SHAPE, 7).orders) == flat(expected.orders)


def test_a_file_without_metadata_is_replaced(setting: dict[str, Any]) -> None:
    setting["path"].parent.mkdir(parents=True)
    save_file({"hidden": torch.ones(13)}, setting["path"])
    rank(**setting)
    assert len(flat(read_ranking(setting["path"], SHAPE, 7).orders)) > 1


@pytest.mark.parametrize("old", [False, True], ids=["no file before", "a file before"])
def test_a_crash_while_writing_leaves_what_was_there(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    path = setting["path"]
    if old:
        rank(**setting)
    before = path.read_bytes() if old else None

    def half(tensors: list[Pending], target: Path, metadata: dict[str, str]) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(rank_module, "write_shard", half)
    with pytest.raises(OSError, match="disk full"):
        rank(**(setting | {"seed": 5}))
    there = {file.name for file in path.parent.iterdir()}
    assert there == ({path.name, "seals.json"} if old else set())
    assert not old or damage(path.parent) is None
    assert (path.read_bytes() if old else None) == before


def test_the_fingerprint_sees_every_weight(tmp_path: Path) -> None:
    """And its type: bfloat16 is another parent."""

    def fingerprint(parent: HybridParent) -> str:
        save_parent(parent, tmp_path)
        return rank_module.fingerprint(TensorStore(tmp_path, tensor_shapes(SHAPE)))

    parent = random_parent(SHAPE)
    seen = {fingerprint(parent)}
    for number, weight in enumerate(parent.parameters(), start=1):
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(fingerprint(parent))
        assert len(seen) == number + 1
    assert fingerprint(random_parent(SHAPE)) in seen
    assert fingerprint(random_parent(SHAPE).bfloat16()) not in seen


def test_the_fingerprint_of_a_sealed_parent_sees_every_bit_and_reads_none(tmp_path: Path) -> None:
    save_parent(random_parent(SHAPE), tmp_path)
    seen = set()
    for place in (-1, -1000):
        Seals.of(tmp_path).write()
        store = TensorStore(tmp_path, tensor_shapes(SHAPE))
        seen.add(rank_module.fingerprint(store))
        content = bytearray((tmp_path / "model.safetensors").read_bytes())
        content[place] ^= 1
        (tmp_path / "model.safetensors").write_bytes(content)
        assert rank_module.fingerprint(store) in seen
    assert len(seen) == 2
