"""bfloat16 ranks as float32 does, but for what is nearly tied; what may not be rounded is not.

The parents are random with layers of very different weight, as those of a trained network are.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.documents import rows_of
from helpers.strategies import random_parent, random_tokens, tiny_shape
from torch import Tensor, nn

from elastic.cluster.place import ALONE
from elastic.config import ImportanceConfig
from elastic.importance import basis
from elastic.importance.collect import Statistics, collect
from elastic.importance.depth import Trials, rank_layers
from elastic.importance.passes import make_ready
from elastic.members.trials import Round
from elastic.parent import HybridParent

SHAPE = tiny_shape(
    pattern="M-M*-M-M-*M-M-", hidden_size=64, intermediate_size=96, vocab_size=128,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_num_heads=8,
    mamba_head_dim=8, n_groups=2, ssm_state_size=16,
)  # fmt: skip
CONFIG = ImportanceConfig(
    samples=8, batch_size=4, depth_samples=8, depth_positions=64, drop_attention=True
)
CANDIDATES = range(1, len(SHAPE.pattern) - 1)
DROPPED = 6
TIE = 0.02
"""Errors, relative, within which either of two layers may come first."""
SCORES = 0.02
"""Largest relative difference of a width's score."""
SEEDS = range(4)
DEVICE = torch.device("cpu")


def structured(seed: int, dtype: torch.dtype) -> HybridParent:
    """Every layer adds to the stream with a weight of its own, from 0.1 to 1."""
    parent = random_parent(SHAPE, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                weight *= 0.1 ** float(torch.rand((), generator=generator))
    return make_ready(parent, DEVICE, dtype)


def text(seed: int) -> Tensor:
    return random_tokens(SHAPE, batch=8, time=64, seed=seed)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def strays(parent: HybridParent, tokens: Tensor, order: Sequence[int]) -> list[int]:
    """Layers of an order that are not the least important of their round, ties left out: by the
    errors of this parent in the network that the order itself has come to."""
    trials, found = Trials(parent, rows_of(tokens), CONFIG, generator(), ALONE), []
    for done, layer in enumerate(order):
        errors = trials.errors(Round.after(len(SHAPE.pattern), CANDIDATES, order[:done]))
        if errors[layer] > (1 + TIE) * min(errors.values()):
            found.append(layer)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_layers_have_the_order_of_float32_but_for_ties(seed: int) -> None:
    tokens = text(seed)
    order, rounds = rank_layers(
        structured(seed, torch.bfloat16), rows_of(tokens), CONFIG, DROPPED, generator()
    )
    wide = structured(seed, torch.float32)
    assert strays(wide, tokens, order) == []
    assert strays(wide, tokens, order[::-1]), "guards the guard"
    first = rank_layers(wide, rows_of(tokens), CONFIG, 1, generator())[1]
    assert rounds[0] == pytest.approx(first[0], rel=TIE)


@pytest.mark.parametrize("seed", SEEDS)
def test_widths_have_the_scores_of_float32(seed: int) -> None:
    tokens = text(seed)
    narrow, wide = (
        collect(structured(seed, dtype), rows_of(tokens), CONFIG)
        for dtype in (torch.bfloat16, torch.float)
    )
    for name, scores in wide.scores.items():
        torch.testing.assert_close(narrow.scores[name], scores, rtol=SCORES, atol=0)
    for name, covariance in wide.covariances.items():
        assert narrow.covariances[name].dtype == torch.float64
        apart = torch.linalg.matrix_norm(narrow.covariances[name] - covariance)
        assert apart < SCORES * torch.linalg.matrix_norm(covariance)


def test_matrices_alone_are_rounded() -> None:
    parent = structured(0, torch.bfloat16)
    for name, weight in parent.named_parameters():
        assert weight.dtype == (torch.bfloat16 if weight.ndim == 2 else torch.float32), name


def seen_by(module: nn.Module, seen: list[torch.dtype]) -> None:
    module.register_forward_hook(lambda _m, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))


def test_products_are_narrow_and_the_stream_is_not() -> None:
    parent, stream, products = structured(0, torch.bfloat16), list[Any](), list[Any]()
    for block in parent.backbone.layers:
        seen_by(block, stream)
        seen_by(block.norm, stream)  # type: ignore[union-attr, arg-type]
    for module in parent.modules():
        if isinstance(module, nn.Linear) and module is not parent.lm_head:
            module.register_forward_hook(lambda _m, _i, out: products.append(out.dtype))
    seen_by(parent.backbone.norm_f, stream)
    rank_layers(parent, rows_of(text(0)), CONFIG, 1, generator())
    assert set(stream) == {torch.float32} and set(products) == {torch.bfloat16}


def test_what_is_measured_is_not_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autocast would make a covariance of bfloat16 products."""
    inside: list[bool] = []
    add = basis.StreamStatistic.add

    def noted(self: basis.StreamStatistic, x: Tensor) -> None:
        inside.append(torch.is_autocast_enabled("cpu"))
        add(self, x)

    monkeypatch.setattr(basis.StreamStatistic, "add", noted)
    found = collect(structured(0, torch.bfloat16), rows_of(text(0)), CONFIG)
    assert isinstance(found, Statistics)
    assert inside and not any(inside)
