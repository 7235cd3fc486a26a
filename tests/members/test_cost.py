"""Law 4, cost is counted: closed forms against tensors that exist, and against published sizes."""

import itertools
from fractions import Fraction

import pytest
import torch
from helpers.strategies import (
    NANO_9B,
    NANO_12B,
    cut_shape,
    members,
    random_tokens,
    shapes,
    stock_model,
    tiny_member,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from elastic.config import ParentShape
from elastic.members import cost
from elastic.members.architecture import Architecture
from elastic.members.cost import LayerSize, layer_sizes, total_parameters
from elastic.members.cut import member_cuts, size_of, tensor_shapes

Drawn = tuple[ParentShape, Architecture]


def counted(shape: ParentShape, member: Architecture) -> int:
    """Elements that the cut table keeps, tensor by tensor."""
    sizes, total = tensor_shapes(shape), 0
    for cut in member_cuts(shape, member):
        elements = 1
        for ranges, size in zip(cut.cut, sizes[cut.source], strict=True):
            elements *= size_of(ranges, size)
        total += elements
    return total


@given(members(max_layers=8))
def test_parameters_are_what_the_cut_keeps(drawn: Drawn) -> None:
    shape, member = drawn
    assert cost.parameters(shape, member) == counted(shape, member)
    full = Architecture.full(shape)
    assert cost.parameters(shape, full) == counted(shape, full)


@given(members(homogeneous=True, max_layers=8))
def test_parameters_are_what_stock_transformers_builds(drawn: Drawn) -> None:
    shape, member = drawn
    model = stock_model(cut_shape(shape, member), device="meta")
    assert cost.parameters(shape, member) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(NANO_12B, 12_310_001_152), (NANO_9B, 8_888_227_328)],
    ids=["nano-12b-v2", "nano-9b-v2"],
)
def test_published_sizes_are_exact(shape: ParentShape, expected: int) -> None:
    full = Architecture.full(shape)
    assert cost.parameters(shape, full) == counted(shape, full) == expected
    assert sum(weight.numel() for weight in stock_model(shape, "meta").parameters()) == expected
    assert cost.weight_bytes(shape, full) == 2 * expected


def test_a_dropped_size_of_one_is_seen() -> None:
    """Guards the guard: the count moves with every axis."""
    shape, member = tiny_shape(), tiny_member()
    whole = cost.parameters(shape, Architecture.full(shape))
    assert cost.parameters(shape, member) < whole
    for layer in Architecture.full(shape).layers:
        without = Architecture.full(shape).without({layer.index})
        size = layer_sizes(Architecture(13, (layer,)))[0]
        assert cost.parameters(shape, without) == whole - cost.layer_parameters(shape, 13, size)


# Expected cost


@given(shapes(max_layers=3), st.data())
def test_cost_of_expected_sizes_is_the_expected_cost(
    shape: ParentShape, data: st.DataObject
) -> None:
    """Independent choices: per layer for widths and gates, shared for hidden size and channels."""
    share = Fraction(data.draw(st.integers(0, 12)), 12)

    def choice(largest: int) -> list[tuple[int, Fraction]]:
        """Two sizes and their probabilities."""
        small, big = data.draw(st.integers(1, largest)), largest
        return [(small, share), (big, 1 - share)]

    widest = {
        "mlp": shape.intermediate_size,
        "mamba": shape.mamba_num_heads,
        "attention": shape.num_attention_heads,
    }
    hidden, channels = choice(shape.hidden_size), choice(shape.mamba_head_dim)
    widths = [choice(widest[kind]) for kind in shape.kinds]
    gates = [[(0, share), (1, 1 - share)] for _ in shape.kinds]

    def cost_of(d: Fraction | int, p: Fraction | int, w: list, g: list) -> Fraction:
        sizes = [LayerSize(*one) for one in zip(shape.kinds, w, [p] * len(w), g, strict=True)]
        return Fraction(total_parameters(shape, d, sizes))

    def mean(choices: list[tuple[int, Fraction]]) -> Fraction:
        return sum((size * p for size, p in choices), Fraction(0))

    layers, expected = len(widths), Fraction(0)
    for combination in itertools.product(hidden, channels, *widths, *gates):
        probability = Fraction(1)
        for _, p in combination:
            probability *= p
        d, p, *rest = [size for size, _ in combination]
        expected += probability * cost_of(d, p, rest[:layers], rest[layers:])
    mean_widths, mean_gates = [mean(w) for w in widths], [mean(g) for g in gates]
    assert cost_of(mean(hidden), mean(channels), mean_widths, mean_gates) == expected


def test_correlated_choices_would_cost_something_else() -> None:
    """Guards the guard: the identity above rests on independence."""
    shape = tiny_shape(pattern="-")
    together = sum(total_parameters(shape, d, [LayerSize("mlp", f)]) for d, f in ((3, 5), (13, 17)))
    assert total_parameters(shape, 8, [LayerSize("mlp", 11)]) != Fraction(together, 2)


def test_cost_is_differentiable_in_every_size() -> None:
    shape = tiny_shape()
    hidden = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    sizes = [
        LayerSize(
            kind,
            *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.0, 5.0, 0.5)),
        )
        for kind in shape.kinds
    ]
    total = total_parameters(shape, hidden, sizes)
    total.backward()
    assert hidden.grad > 0
    for size in sizes:
        assert size.width.grad > 0 and size.gate.grad > 0
        assert size.gate.grad == cost.layer_parameters(shape, hidden, size)
        assert (size.channels.grad is not None) == (size.kind == "mamba")


# Memory


def test_published_cache_sizes_at_131072_tokens() -> None:
    """method.md, section 1.4: 3.0 GiB with 6 attention layers, 2.0 with 4; SSM state 140 MiB."""
    full, smaller = Architecture.full(NANO_12B), Architecture.full(NANO_9B)
    assert cost.kv_cache_bytes(NANO_12B, full, 131_072) == 3 * 2**30
    assert cost.kv_cache_bytes(NANO_9B, smaller, 131_072) == 2 * 2**30
    assert cost.kv_cache_bytes(NANO_12B, full, 131_072, batch=4, bytes_per=1) == 6 * 2**30
    assert cost.ssm_state_bytes(NANO_12B, full) == 140 * 2**20
    assert cost.ssm_state_bytes(NANO_12B, full, batch=2, bytes_per=2) == 140 * 2**20


def test_a_decoding_step_moves_weights_once_and_caches_per_sequence() -> None:
    """Of the embedding only the rows that are looked up; states are written back."""
    full, embedding = Architecture.full(NANO_12B), 131_072 * 5120
    states = cost.ssm_state_bytes(NANO_12B, full) + cost.conv_state_bytes(NANO_12B, full)
    weights = 2 * (12_310_001_152 - embedding)
    one = weights + 2 * 5120 + 3 * 2**30 + 2 * states
    assert cost.decode_bytes(NANO_12B, full, 131_072) == one
    assert cost.decode_bytes(NANO_12B, full, 131_072, batch=4) == weights + 4 * (one - weights)


@pytest.mark.parametrize("pattern", ["*", "M*", "M-*M*"])
@pytest.mark.parametrize("conv_kernel", [1, 4])
def test_caches_are_what_stock_transformers_allocates(pattern: str, conv_kernel: int) -> None:
    shape = tiny_shape(pattern=pattern, conv_kernel=conv_kernel)
    full, stock = Architecture.full(shape), stock_model(shape)
    cache = DynamicCache(config=stock.config)
    with torch.no_grad():
        stock(random_tokens(shape, batch=2, time=6), past_key_values=cache, use_cache=True)
    sizes = {"keys": 0, "values": 0, "conv_states": 0, "recurrent_states": 0}
    for layer in cache.layers:
        for name in sizes:
            states = getattr(layer, name, None)
            states = states.values() if isinstance(states, dict) else [states]
            sizes[name] += sum(state.numel() for state in states if state is not None)
    assert cost.kv_cache_bytes(shape, full, 6, 2, 1) == sizes["keys"] + sizes["values"]
    assert cost.ssm_state_bytes(shape, full, 2, 1) == sizes["recurrent_states"]
    assert cost.conv_state_bytes(shape, full, 2, 1) == sizes["conv_states"]


# FLOPs


def test_flops_of_projections_are_what_torch_counts() -> None:
    """Attention of stock transformers computes the whole square; ours counts the causal half."""
    shape, time = tiny_shape(pattern="-*-"), 6
    member = Architecture.full(shape)
    stock = stock_model(shape)
    stock.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock(random_tokens(shape, batch=1, time=time))
    square = 4 * shape.num_attention_heads * shape.head_dim * time * time
    ours = time * cost.flops_per_token(shape, member, time)
    assert ours == counter.get_total_flops() - square // 2


def test_flops_of_a_mamba_layer_written_out() -> None:
    shape = tiny_shape(pattern="M")
    inner, state = 6 * 7, 2 * 2 * 3
    head = 2 * 13 * 11
    projections = 2 * 13 * (2 * inner + state + 6) + 2 * inner * 13
    convolution, scan = 2 * (inner + state) * 4, 5 * inner * 3
    expected = head + projections + convolution + scan
    assert cost.flops_per_token(shape, Architecture.full(shape), 1) == expected
    assert cost.flops_per_token(shape, Architecture.full(shape), 10**6) == expected


@given(members())
def test_no_member_computes_more_than_the_parent(drawn: Drawn) -> None:
    shape, member = drawn
    flops = cost.flops_per_token(shape, member, 100)
    assert 0 < flops <= cost.flops_per_token(shape, Architecture.full(shape), 100)
