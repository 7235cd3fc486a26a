"""How the parent runs: checkpointed, in bfloat16, in mixed batches; and how it starts."""

import pytest
import torch
from helpers.strategies import (
    architectures,
    assert_near,
    gradients,
    probe,
    random_parent,
    random_tokens,
    shapes,
    tiny_member,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.config import ParentShape
from elastic.members.architecture import Architecture
from elastic.parent import HybridParent, Keep, LayerKeep, Member
from elastic.routing.masks import hard_keep

Drawn = tuple[ParentShape, Architecture]


RUNS: dict[str, Member] = {
    "whole": None,
    "sliced": tiny_member(),
    "masked": hard_keep(tiny_shape(), tiny_member()),
}
"""Three ways to run `tiny_shape()`."""


@pytest.mark.parametrize("run", RUNS)
def test_activation_checkpointing_recomputes_blocks_and_keeps_the_gradients(run: str) -> None:
    shape = tiny_shape()
    plain = random_parent(shape)
    thrifty = HybridParent(shape, activation_checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    tokens = random_tokens(shape)
    member = {"whole": None, "sliced": tiny_member(), "masked": hard_keep(shape, tiny_member())}[
        run
    ]
    calls = []
    thrifty.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(plain, probe(plain.logits(tokens, member)))
    actual = gradients(thrifty, probe(thrifty.logits(tokens, member)))
    assert len(calls) == 2, "once forward, once again in the backward pass"
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_checkpointed_masks_receive_their_gradient() -> None:
    shape = tiny_shape()
    keep = hard_keep(shape, Architecture.full(shape))
    found = []
    for checkpointing in (False, True):
        parent = HybridParent(shape, activation_checkpointing=checkpointing)
        parent.load_state_dict(random_parent(shape).state_dict())
        width = torch.full_like(keep.layers[1].width, 0.7).requires_grad_()
        layers = list(keep.layers)
        layers[1] = LayerKeep(layers[1].gate, width, None)
        probe(parent.logits(random_tokens(shape), Keep(keep.hidden, tuple(layers)))).backward()
        found.append(width.grad)
    assert found[0].abs().min() > 0
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("run", RUNS)
def test_bfloat16_is_finite_and_near_float32(run: str) -> None:
    shape = tiny_shape()
    parent, tokens = random_parent(shape), random_tokens(shape, time=20)
    member = {"whole": None, "sliced": tiny_member(), "masked": hard_keep(shape, tiny_member())}[
        run
    ]
    exact = parent.logits(tokens, member)
    half = parent.bfloat16()
    assert half(tokens, member).dtype == torch.bfloat16
    rounded = half.logits(tokens, member)
    assert rounded.dtype == torch.float32
    assert_near(rounded, exact, torch.bfloat16)
    for gradient in gradients(half, probe(rounded)).values():
        assert gradient.isfinite().all()


def test_autocast_runs_float32_weights_near_float32() -> None:
    shape = tiny_shape()
    parent, tokens = random_parent(shape), random_tokens(shape, time=20)
    for member in RUNS.values():
        exact = parent.logits(tokens, member)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = parent.logits(tokens, member)
        assert_near(mixed, exact, torch.bfloat16)


def test_a_batch_may_mix_members() -> None:
    """Each row under its own masks computes what it computes alone."""
    shape, tokens = tiny_shape(), random_tokens(tiny_shape(), batch=3)
    parent = random_parent(shape)
    each = [Architecture.full(shape), tiny_member(), tiny_member().without({0})]
    keeps = [hard_keep(shape, member) for member in each]
    widths = [shape.mamba_num_heads, shape.intermediate_size, shape.num_attention_heads]
    sizes = dict(zip(("mamba", "mlp", "attention"), widths, strict=True))

    def stacked(name: str, index: int, size: tuple[int, ...]) -> Tensor:
        """A dropped layer has no masks; any will do, its gate is shut."""
        masks = [getattr(keep.layers[index], name) for keep in keeps]
        return torch.cat([torch.ones(1, *size) if mask is None else mask for mask in masks])

    layers = tuple(
        LayerKeep(
            stacked("gate", index, ()),
            stacked("width", index, (sizes[kind],)),
            stacked("channels", index, (shape.mamba_head_dim,)) if kind == "mamba" else None,
        )
        for index, kind in enumerate(shape.kinds)
    )
    mixed = parent.logits(tokens, Keep(torch.cat([keep.hidden for keep in keeps]), layers))
    for row, member in enumerate(each):
        assert_near(mixed[row : row + 1], parent.logits(tokens[row : row + 1], member))


@given(shapes(), st.data())
def test_one_parent_runs_many_members_without_mixing_them_up(
    shape: ParentShape, data: st.DataObject
) -> None:
    """Cuts are remembered per member: a second run must not see those of the first."""
    parent, tokens = random_parent(shape), random_tokens(shape)
    several = [data.draw(architectures(shape)) for _ in range(3)]
    first = [parent.logits(tokens, member) for member in several]
    for member, logits in zip(several, first, strict=True):
        assert torch.equal(random_parent(shape).logits(tokens, member), logits)
        assert torch.equal(parent.logits(tokens, member), logits)


def test_head_weight_and_hidden_states_make_the_logits() -> None:
    """The chunked loss goes this way instead of through `logits`."""
    shape, tokens = tiny_shape(), random_tokens(tiny_shape())
    parent = random_parent(shape)
    for member in RUNS.values():
        hidden = parent(tokens, member)
        logits = hidden @ parent.head_weight(member).T
        assert_near(logits, parent.logits(tokens, member))
    assert parent.head_weight(tiny_member()).shape == (shape.vocab_size, 8)


# A random start.


def test_initialise_sets_every_weight_and_depends_on_the_generator_only() -> None:
    shape = tiny_shape(intermediate_size=64, hidden_size=24)
    parent = HybridParent(shape)
    with torch.no_grad():
        for weight in parent.parameters():
            weight.fill_(torch.nan)
    parent.initialise(torch.Generator().manual_seed(3))
    again = HybridParent(shape).initialise(torch.Generator().manual_seed(3))
    other = HybridParent(shape).initialise(torch.Generator().manual_seed(4))
    for name, weight in parent.named_parameters():
        assert weight.isfinite().all(), name
        assert torch.equal(weight, again.get_parameter(name)), name
    assert not torch.equal(parent.lm_head.weight, other.lm_head.weight)
    steps = torch.nn.functional.softplus(parent.backbone.layers[0].mixer.dt_bias)
    assert 1e-3 <= steps.min() * (1 + 1e-4)
    assert steps.max() <= 0.1 * (1 + 1e-4)
    outputs = parent.backbone.layers[1].mixer.down_proj.weight.std()
    inputs = parent.backbone.layers[1].mixer.up_proj.weight.std()
    assert (outputs / inputs).item() == pytest.approx(len(shape.pattern) ** -0.5, rel=0.1)


def test_a_tied_head_is_one_tensor() -> None:
    parent = random_parent(tiny_shape(tied_head=True))
    assert parent.lm_head.weight is parent.backbone.embeddings.weight
    assert "lm_head.weight" not in dict(parent.named_parameters())
