"""Law 2 for rotations: the rotated parent computes what the parent computed; its first directions
keep the most, and the energies that are worked out are those that a second pass would measure."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.documents import rows_of
from helpers.orders import random_orders, random_rotation, rotated_orders
from helpers.strategies import (
    TOLERANCE,
    assert_near,
    difference,
    random_parent,
    random_tokens,
    shapes,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import NemotronHForCausalLM

from elastic.config import ConfigError, ImportanceConfig, ParentShape, SpaceConfig
from elastic.importance import Calibration, rank, sort_checkpoint, sort_parent
from elastic.importance.basis import (
    check_rotation,
    directions_of,
    energies,
    energy_shares,
    gated_norms,
    principal_directions,
    readers,
    spread,
    stream_norms,
)
from elastic.importance.collect import collect
from elastic.members.architecture import Architecture, Space
from elastic.members.cut import tensor_shapes
from elastic.parent import HybridParent
from elastic.parent.weights import load_parent, save_parent

SHAPE = tiny_shape(pattern="M-*M-M")
CONFIG = ImportanceConfig(samples=8, batch_size=4)


def trained(seed: int = 0) -> HybridParent:
    """Random weights whose norms are not all ones, as those of a trained parent."""
    parent = random_parent(SHAPE, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
    return parent


# Law 2


@given(shapes(), st.integers(0, 1000))
def test_rotating_changes_no_logit(shape: ParentShape, seed: int) -> None:
    shape = dataclasses.replace(shape, tied_head=False)
    parent, tokens = random_parent(shape, seed), random_tokens(shape)
    with torch.no_grad():
        before = parent.logits(tokens)
        sort_parent(parent, rotated_orders(shape, seed))
        assert_near(parent.logits(tokens), before)


def test_rotating_is_exact_to_rounding() -> None:
    for seed in range(5):
        parent, tokens = trained(seed), random_tokens(SHAPE)
        with torch.no_grad():
            before = parent.logits(tokens)
            sort_parent(parent, rotated_orders(SHAPE, seed))
            assert difference(parent.logits(tokens), before) < 1e-5


def test_a_rotation_that_is_not_orthogonal_breaks_the_function() -> None:
    """Guards the guard: law 2 would see it, and it is refused before anything moves."""
    orders = rotated_orders(SHAPE, 0)
    assert orders.rotation is not None
    bent = dataclasses.replace(orders, rotation=orders.rotation.clone())
    bent.rotation[0, 0] += 0.05  # type: ignore[index]
    parent, tokens = trained(), random_tokens(SHAPE)
    weights = {name: weight.clone() for name, weight in parent.state_dict().items()}
    with torch.no_grad():
        before = parent.logits(tokens)
        with pytest.raises(AssertionError, match="not orthogonal"):
            sort_parent(parent, bent)
        for name, weight in parent.state_dict().items():
            assert torch.equal(weight, weights[name])
        sort_parent(parent, bent, check=False)
        assert difference(parent.logits(tokens), before) > 10 * TOLERANCE[torch.float32]


def test_the_result_is_a_stock_checkpoint_with_norms_of_one(tmp_path: Path) -> None:
    parent, tokens = trained(), random_tokens(SHAPE)
    with torch.no_grad():
        before = parent.logits(tokens)
    sort_parent(parent, rotated_orders(SHAPE, 0))
    for name in stream_norms(SHAPE):
        assert (parent.get_parameter(name) == 1).all()
    save_parent(parent, tmp_path)
    stock = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert_near(stock(tokens, use_cache=False).logits, before)


@pytest.mark.parametrize("seed", range(3))
def test_on_disk_as_in_memory(tmp_path: Path, seed: int) -> None:
    parent, orders = trained(seed), rotated_orders(SHAPE, seed)
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    save_parent(parent, tmp_path / "in")
    sort_checkpoint(tmp_path / "in", tmp_path / "out", orders, "key")
    sort_parent(parent, orders)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in parent.state_dict().items():
        torch.testing.assert_close(written[name], weight, rtol=1e-5, atol=1e-6)


def test_every_projection_that_reads_the_stream_is_a_reader() -> None:
    """Else the weights of its norm would be lost."""
    wide = {
        name
        for name, size in tensor_shapes(SHAPE).items()
        if len(size) == 2 and size[1] == SHAPE.hidden_size
    }
    read = [name for norm in stream_norms(SHAPE) for name in readers(SHAPE, norm)]
    assert sorted(read) == sorted(wide - {"backbone.embeddings.weight"})


def test_a_tied_head_is_sorted_and_rotation_is_refused() -> None:
    assert ImportanceConfig().rotates(tied_head=False)
    assert not ImportanceConfig().rotates(tied_head=True)
    assert not ImportanceConfig(hidden="sort").rotates(tied_head=False)
    with pytest.raises(ConfigError, match=r"importance.hidden=rotate: must be sort"):
        ImportanceConfig(hidden="rotate").rotates(tied_head=True)
    with pytest.raises(ConfigError, match=r"importance.spread=True: must be false"):
        ImportanceConfig(spread=True).rotates(tied_head=True)
    with pytest.raises(ConfigError, match=r"importance.spread=True: must be false"):
        ImportanceConfig(hidden="sort", spread=True)


# Directions


def in_a_subspace(rank_of: int) -> HybridParent:
    """A parent whose stream lies in a few directions that no coordinate shows."""
    parent = trained()
    size = SHAPE.hidden_size
    basis = random_rotation(size, 7)[:, :rank_of]
    onto = (basis @ basis.T).float()
    with torch.no_grad():
        for name in stream_norms(SHAPE):
            parent.get_parameter(name).fill_(1.0)
        embedding = parent.backbone.embeddings.weight
        embedding.copy_(embedding @ onto * 30)  # far above the eps of the norms
        for name, weight in parent.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                weight.copy_(onto @ weight)
    return parent


def test_a_stream_in_few_directions_is_cut_to_them_without_loss() -> None:
    """A member of that width is the parent; with sorted coordinates it is not."""
    parent, tokens = in_a_subspace(5), random_tokens(SHAPE, batch=8)
    found = collect(parent, rows_of(tokens), CONFIG)
    orders = random_orders(SHAPE, 0)
    rotation = principal_directions(parent, found.covariances)
    check_rotation(rotation)
    shares = energy_shares(
        energies(found.covariances, rotation),
        torch.stack(list(energies(found.covariances, None).values())).mean(0),
        (SHAPE.hidden_size, 5, 4),
    )
    assert shares["5"]["basis"] > 0.999 > shares["4"]["basis"]
    assert shares["5"]["coordinates"] < 0.9 and shares[str(SHAPE.hidden_size)]["basis"] == 1.0
    full = Architecture.full(SHAPE)
    narrow = dataclasses.replace(full, hidden_size=5)
    rotated = copy.deepcopy(parent)
    sort_parent(rotated, dataclasses.replace(orders, rotation=rotation))
    with torch.no_grad():
        before = parent.logits(tokens)
        # All energy is kept, and divided by 5 channels instead of 13: the scale is known.
        for norm in stream_norms(SHAPE):
            rotated.get_parameter(norm).mul_((SHAPE.hidden_size / 5) ** 0.5)
        assert difference(rotated.logits(tokens, narrow), before) < 1e-3


def test_directions_are_repeatable_whatever_the_sign() -> None:
    energy = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
    energy = energy @ energy.T
    directions = directions_of(energy)
    assert (directions.gather(0, directions.abs().argmax(0)[None]) > 0).all()
    values = (directions.T @ energy @ directions).diagonal()
    assert torch.equal(values, values.sort(descending=True).values)


def test_spreading_keeps_what_each_width_spans_and_evens_out_its_channels() -> None:
    rotation = random_rotation(16, 0)
    covariance = rotation @ torch.diag(torch.logspace(0, -4, 16).double()) @ rotation.T
    spreaded = spread(rotation, (16, 10, 4), torch.Generator().manual_seed(0))
    check_rotation(spreaded)
    for width in (16, 10, 4):
        one, other = rotation[:, :width], spreaded[:, :width]
        torch.testing.assert_close(one @ one.T, other @ other.T)
    before, after = (energies({"n": covariance}, turn)["n"][:4] for turn in (rotation, spreaded))
    assert after.max() / after.min() < before.max() / before.min()


# Energies


def measured(parent: HybridParent, tokens: Tensor) -> dict[str, Tensor]:
    """Energies by a pass over a parent that is in its basis already."""
    found = collect(parent, rows_of(tokens), CONFIG)
    return energies(found.covariances, None) | found.gated


@pytest.mark.parametrize("hidden", ["rotate", "sort"])
def test_energies_are_those_of_a_second_pass(tmp_path: Path, hidden: str) -> None:
    parent, tokens = trained(), random_tokens(SHAPE, batch=8)
    (tmp_path / "parent").mkdir()
    save_parent(parent, tmp_path / "parent")
    ranking = rank(
        tmp_path / "parent",
        lambda: load_parent(tmp_path / "parent"),
        Calibration(rows_of(tokens), rows_of(tokens)),
        dataclasses.replace(CONFIG, hidden=hidden, depth_samples=4),
        Space.build(SpaceConfig(hidden=[13, 8]), SHAPE),
        0,
        "text",
        tmp_path / "scores.safetensors",
    )
    assert (ranking.orders.rotation is not None) == (hidden == "rotate")
    sort_parent(parent, ranking.orders)
    second = measured(parent, tokens)
    assert ranking.energies.keys() == second.keys()
    for name, energy in second.items():
        torch.testing.assert_close(ranking.energies[name], energy, rtol=1e-3, atol=1e-5)
        groups = SHAPE.n_groups if name in gated_norms(SHAPE) else 1
        torch.testing.assert_close(energy.view(groups, -1).sum(1), torch.ones(groups))
    shares = ranking.shares(Space.build(SpaceConfig(hidden=[13, 8]), SHAPE))
    assert json.loads(json.dumps(shares)).keys() == {"13", "8"}
    if hidden == "rotate":
        assert shares["8"]["basis"] > shares["8"]["coordinates"]
