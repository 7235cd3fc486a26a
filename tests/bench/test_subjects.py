"""What is measured is what it says: members of those sizes, and the same step as stock's."""

import pytest
import torch
from helpers.runs import CONF
from helpers.strategies import random_parent, random_tokens, tiny_member, tiny_shape
from hydra import compose, initialize_config_dir

from elastic.bench.profile import matmul_flops
from elastic.bench.run import StepTimes, variants_of
from elastic.bench.subjects import StockStep, TrainingStep, balanced_members, shape_of
from elastic.config import StepBenchConfig, parse
from elastic.extract.compare import plain_transformers
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.members.cost import parameters

CPU = torch.device("cpu")


def medium() -> StepBenchConfig:
    """The settings of `bench step` as they come."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(compose("bench/step"), StepBenchConfig)


def test_the_medium_parent_is_large_enough_and_has_all_kinds_of_blocks() -> None:
    shape = shape_of(medium().parent)
    assert parameters(shape, Architecture.full(shape)) == 22_748_864
    assert set(shape.kinds) == {"mamba", "mlp", "attention"}


def test_members_are_of_the_asked_size_nested_and_balanced() -> None:
    """Half of the parent takes something of every axis."""
    config = medium()
    shape = shape_of(config.parent)
    full = Architecture.full(shape)
    choices = balanced_members(config.space, shape, [0.5, 0.75])
    assert list(choices) == ["0.75", "0.5"]
    for name, choice in choices.items():
        assert choice.params == parameters(shape, choice.architecture)
        assert choice.params == pytest.approx(float(name) * parameters(shape, full), rel=0.01)
    small = choices["0.5"].architecture
    assert small.is_within(choices["0.75"].architecture)
    assert small.hidden_size < shape.hidden_size and len(small.layers) < len(full.layers)
    for layer in small.layers:
        if isinstance(layer, MambaLayer):
            assert layer.num_heads < shape.mamba_num_heads
            assert layer.head_dim < shape.mamba_head_dim
        elif isinstance(layer, MLPLayer):
            assert layer.intermediate_size < shape.intermediate_size
        else:
            assert isinstance(layer, AttentionLayer)
            assert layer.num_heads < shape.num_attention_heads


def test_our_step_and_that_of_stock_transformers_have_the_same_gradients() -> None:
    """After clipping; which of them is faster is then a question of speed alone."""
    shape = tiny_shape()
    parent, batch = random_parent(shape), random_tokens(shape, time=10)
    stock = StockStep(shape, batch, "32-true", CPU)
    stock.copy_weights(parent)
    ours = TrainingStep(parent, batch, chunk_tokens=4, precision="32-true")
    ours()
    with plain_transformers():
        stock(chunk=8)
    theirs = {name: weight.grad for name, weight in stock.model.named_parameters()}
    for name, weight in parent.named_parameters():
        gradient = theirs[name.replace("backbone.", "model.", 1)]
        assert gradient is not None and weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5)


def test_a_sliced_step_keeps_every_gradient_and_moves_only_its_member() -> None:
    """Zeros, never None, as in the trainer; a dropped layer stays as it was."""
    shape = tiny_shape()
    parent, batch = random_parent(shape), random_tokens(shape, time=10)
    before = {name: weight.detach().clone() for name, weight in parent.named_parameters()}
    TrainingStep(parent, batch, chunk_tokens=64, precision="32-true")(tiny_member())
    dropped = "backbone.layers.3."
    for name, weight in parent.named_parameters():
        assert weight.grad is not None
        same = torch.equal(weight, before[name])
        assert same == name.startswith(dropped), name
        assert bool(weight.grad.any()) != name.startswith(dropped), name


def test_a_step_with_a_teacher_trains_towards_it() -> None:
    """From the parent's own copy there is nothing to learn: the gradient is zero."""
    shape = tiny_shape()
    parent, batch = random_parent(shape), random_tokens(shape, time=10)
    step = TrainingStep(parent, batch, chunk_tokens=64, precision="32-true", distils=True)
    step()
    for name, weight in parent.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() < 1e-5, name


def test_products_are_counted_in_place_and_backwards_too() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert matmul_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert matmul_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    x, y = a.detach(), b.detach()
    assert matmul_flops(lambda: torch.zeros(3, 7).addmm_(x, y)) == 2 * 3 * 5 * 7
    batched = x.expand(4, 3, 5), y.expand(4, 5, 7)
    assert matmul_flops(lambda: torch.zeros(4, 3, 7).baddbmm_(*batched)) == 4 * 2 * 3 * 5 * 7
    assert matmul_flops(lambda: a + 1) == 0


def test_step_times_leave_out_the_warm_up() -> None:
    """Between the ends of steps, so that data and callbacks count."""
    times = StepTimes(CPU, clock=lambda: 0.0)
    times.ends = [100.0, 150.0, 151.0, 153.0, 160.0]
    assert times.median(warmup=1) == (2 + 7) / 2
    assert times.median(warmup=2) == 2


def test_every_budget_is_measured_by_itself_before_and_after_the_freeze() -> None:
    """Uniform budgets are a mean over them, not what a few draws happen to be."""
    variants = variants_of(["1", "0.5"])
    alone = [(v.frozen, v.budget) for v in variants.values() if v.budget is not None]
    assert alone == [(False, "1"), (False, "0.5"), (True, "1"), (True, "0.5")]
    together = [v for v in variants.values() if v.budget is None]
    assert [(v.passes, v.teacher) for v in together] == [(2, "replicated"), (2, "in_place")]
    assert all(v.frozen for v in together)
