"""Tiny parents and members to draw from, the stock model to hold them against, and tolerances."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic.config import AXES, LAYERED_AXES, ParentShape, SpaceConfig
from elastic.members.architecture import (
    Architecture,
    AttentionLayer,
    Layer,
    MambaLayer,
    MLPLayer,
    Selection,
    Space,
)
from elastic.members.cut import Ranges, member_cuts, tensor_shapes
from elastic.parent import HybridParent
from elastic.parent.norms import ElasticNorm
from elastic.parent.stock import stock_config

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference between two ways to compute the same, as a share of the largest value."""

NANO_12B = ParentShape(
    pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    hidden_size=5120,
    vocab_size=131_072,
    intermediate_size=20_480,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    n_groups=8,
    ssm_state_size=128,
)
"""NVIDIA-Nemotron-Nano-12B-v2 (method.md, section 1.1)."""

NANO_9B = dataclasses.replace(
    NANO_12B,
    pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    hidden_size=4480,
    intermediate_size=15_680,
)
"""NVIDIA-Nemotron-Nano-9B-v2 (method.md, section 1.2)."""


def tiny_shape(**sizes: object) -> ParentShape:
    """A fixed parent with every kind of layer, two groups everywhere and odd sizes."""
    fields: dict[str, object] = {
        "pattern": "M-*M-",
        "hidden_size": 13,
        "vocab_size": 11,
        "intermediate_size": 17,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 5,
        "mamba_num_heads": 6,
        "mamba_head_dim": 7,
        "n_groups": 2,
        "ssm_state_size": 3,
    }
    return ParentShape(**(fields | sizes))  # type: ignore[arg-type]


def tiny_member() -> Architecture:
    """A member of `tiny_shape()` that is smaller on every axis and drops one layer."""
    layers = (MambaLayer(0, 4, 5), MLPLayer(1, 9), AttentionLayer(2, 4), MLPLayer(4, 3))
    return Architecture(8, layers)


@st.composite
def shapes(draw: st.DrawFn, pattern: str | None = None, max_layers: int = 5) -> ParentShape:
    """Any small legal parent: odd sizes, one group, one head and one layer included."""
    letters = st.text("M-*", min_size=1, max_size=max_layers)
    groups, key_value_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return ParentShape(
        pattern=draw(letters) if pattern is None else pattern,
        hidden_size=draw(st.integers(2, 24)),
        vocab_size=draw(st.integers(2, 23)),
        intermediate_size=draw(st.integers(1, 24)),
        num_attention_heads=key_value_heads * draw(st.integers(1, 3)),
        num_key_value_heads=key_value_heads,
        head_dim=draw(st.integers(1, 7)),
        mamba_num_heads=groups * draw(st.integers(1, 3)),
        mamba_head_dim=draw(st.integers(1, 7)),
        n_groups=groups,
        ssm_state_size=draw(st.integers(1, 6)),
        conv_kernel=draw(st.integers(1, 4)),
        conv_bias=draw(st.booleans()),
        tied_head=draw(st.booleans()),
        # Not 1e-5: where a drawn residual happens to be near zero, the norm multiplies what float32
        # has rounded by 1 / sqrt(eps), in stock transformers too. Fixed shapes have 1e-5.
        norm_eps=draw(st.sampled_from([1e-4, 1e-2])),
        # A lower limit too: in a whole sequence stock clamps at one, and its gradient shows it.
        time_step_limit=draw(st.sampled_from([None, None, [0.05, 1e30]])),
    )


@st.composite
def architectures(draw: st.DrawFn, shape: ParentShape, homogeneous: bool = False) -> Architecture:
    """Any legal member over all axes jointly; each layer its own sizes unless `homogeneous`."""
    last = len(shape.pattern) - 1
    kept = sorted(draw(st.sets(st.integers(0, last), min_size=1)))
    groups, key_value_heads = shape.n_groups, shape.num_key_value_heads

    def sizes() -> tuple[int, int, int, int]:
        return (
            groups * draw(st.integers(1, shape.mamba_num_heads // groups)),
            draw(st.integers(1, shape.mamba_head_dim)),
            draw(st.integers(1, shape.intermediate_size)),
            key_value_heads * draw(st.integers(1, shape.num_attention_heads // key_value_heads)),
        )

    common = sizes()
    layers: list[Layer] = []
    for index in kept:
        heads, channels, units, queries = common if homogeneous else sizes()
        kind = shape.kinds[index]
        if kind == "mamba":
            layers.append(MambaLayer(index, heads, channels))
        elif kind == "mlp":
            layers.append(MLPLayer(index, units))
        else:
            layers.append(AttentionLayer(index, queries))
    return Architecture(draw(st.integers(1, shape.hidden_size)), tuple(layers))


@st.composite
def members(
    draw: st.DrawFn, homogeneous: bool = False, max_layers: int = 5
) -> tuple[ParentShape, Architecture]:
    """A drawn parent and one of its members."""
    shape = draw(shapes(max_layers=max_layers))
    return shape, draw(architectures(shape, homogeneous))


@st.composite
def spaces(draw: st.DrawFn, shape: ParentShape) -> Space:
    """Any choices on any axes of a parent, set per layer or once."""

    def choices(size: int, unit: int = 1) -> list[int] | None:
        smaller = draw(st.sets(st.integers(1, size // unit), max_size=3))
        sizes = sorted({count * unit for count in smaller} | {size}, reverse=True)
        return None if len(sizes) == 1 and draw(st.booleans()) else sizes

    axes = {
        "hidden": choices(shape.hidden_size),
        "depth": choices(len(shape.pattern)),
    }
    if "mlp" in shape.kinds:
        axes["ffn"] = choices(shape.intermediate_size)
    if "mamba" in shape.kinds:
        axes["mamba_heads"] = choices(shape.mamba_num_heads, shape.n_groups)
        axes["mamba_head_dim"] = choices(shape.mamba_head_dim)
    if "attention" in shape.kinds:
        axes["attention_heads"] = choices(shape.num_attention_heads, shape.num_key_value_heads)
    layered = [axis for axis in LAYERED_AXES if axes.get(axis) is not None]
    heterogeneous = sorted(draw(st.sets(st.sampled_from(layered)))) if layered else []
    return Space.build(SpaceConfig(heterogeneous=heterogeneous, **axes), shape)


@st.composite
def selections(draw: st.DrawFn, space: Space) -> Selection:
    """One choice per decision."""
    return {
        axis: tuple(
            draw(st.integers(0, len(space.choices[axis]) - 1)) for _ in range(space.decisions(axis))
        )
        for axis in AXES
    }


def random_parent(shape: ParentShape, seed: int = 0, kernels: str = "torch") -> HybridParent:
    """A parent in which every tensor matters: no weight is zero, no norm is all ones."""
    generator = torch.Generator().manual_seed(seed)
    parent = HybridParent(shape, kernels).initialise(generator)
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("A_log"):
                weight.copy_(0.5 + noise)
            elif name.endswith("dt_bias"):
                weight.copy_(noise - 1)
            elif name.endswith(".D") or "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            elif "conv1d" in name:
                weight.copy_(0.5 * noise)
            elif "embeddings" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)
    return parent


def with_own_norms(
    shape: ParentShape, seed: int = 0, budgets: int = 2, kernels: str = "torch"
) -> HybridParent:
    """A random parent whose budgets have random norms and random energies."""
    parent = random_parent(shape, seed, kernels)
    generator = torch.Generator().manual_seed(seed)
    energies = {}
    for name, module in parent.named_modules():
        if isinstance(module, ElasticNorm):
            drawn = torch.rand(
                module.groups, len(module.weight) // module.groups, generator=generator
            )
            energies[f"{name}.weight"] = (drawn / drawn.sum(1, keepdim=True)).flatten()
    parent.add_own_norms(budgets, energies)
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            if name.endswith(".own"):
                weight.uniform_(0.5, 1.5, generator=generator)
    return parent


def random_tokens(shape: ParentShape, batch: int = 2, time: int = 9, seed: int = 0) -> Tensor:
    """(b, t) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab_size, (batch, time), generator=generator)


def gradients(parent: HybridParent, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parent tensor; zeros where the loss does not see one."""
    parent.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in parent.named_parameters()
    }


def probe(logits: Tensor) -> Tensor:
    """A scalar of logits whose gradient has no symmetry to hide behind."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).sin().view(logits.shape)
    return (logits * weights).sum()


def difference(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Largest difference as a share of the largest expected value, or of `floor` if that is
    more."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    error = (actual.double() - expected.double()).abs().max().item()
    return error / max(expected.abs().max().item(), floor)


def gradient_differences(
    actual: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]
) -> dict[Any, float]:
    """`difference` of every tensor by name. A gradient that is a sum that cancels, as A_log's of a
    few steps is, counts as no smaller than a twentieth of the largest: its rounding error is that
    of its terms."""
    floor = 0.05 * max(float(gradient.abs().max()) for gradient in expected.values())
    return {name: difference(actual[name], expected[name], floor) for name in expected}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Same shape, and no further apart than the table allows."""
    share = difference(actual, expected)
    assert share <= TOLERANCE[dtype], f"off by {share:.2e} of the largest value"


def assert_gradients_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor's gradient agrees, as a share of the largest gradient there is.

    Ten times the table's tolerance: narrow norms of near-zero channels amplify rounding.
    """
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        share = (actual[name] - gradient).abs().max().item() / max(largest, 1e-30)
        assert share <= 10 * TOLERANCE[torch.float32], f"{name}: off by {share:.2e} of the largest"


def indices(ranges: Ranges | None, size: int) -> list[int]:
    """The plain list behind ranges."""
    if ranges is None:
        return list(range(size))
    return list(itertools.chain.from_iterable(range(start, stop) for start, stop in ranges))


def kept_regions(shape: ParentShape, architecture: Architecture) -> dict[str, Tensor]:
    """True where a member keeps a parent's weight; all False in the tensors of dropped layers."""
    regions = {name: torch.zeros(size) for name, size in tensor_shapes(shape).items()}
    for cut in member_cuts(shape, architecture):
        region = regions[cut.source]
        grid = [indices(r, s) for r, s in zip(cut.cut, region.shape, strict=True)]
        region[torch.meshgrid([torch.tensor(axis) for axis in grid], indexing="ij")] = 1
    return {name: region.bool() for name, region in regions.items()}


def cut_shape(shape: ParentShape, architecture: Architecture) -> ParentShape:
    """Sizes of a homogeneous member, as if it had been a parent itself."""
    sizes: dict[str, object] = {}
    for layer in architecture.layers:
        if isinstance(layer, MambaLayer):
            sizes |= {"mamba_num_heads": layer.num_heads, "mamba_head_dim": layer.head_dim}
        elif isinstance(layer, MLPLayer):
            sizes |= {"intermediate_size": layer.intermediate_size}
        else:
            sizes |= {"num_attention_heads": layer.num_heads}
    sizes |= {"pattern": architecture.pattern, "hidden_size": architecture.hidden_size}
    return dataclasses.replace(shape, **sizes)  # type: ignore[arg-type]


def stock_model(shape: ParentShape, device: str = "cpu") -> NemotronHForCausalLM:
    """transformers' own Nemotron-H of these sizes, in float32."""
    config = NemotronHConfig(**stock_config(shape, {"chunk_size": 8, "use_cache": False}))
    with torch.device(device):
        return NemotronHForCausalLM(config).float().eval()


def stock_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored names -> the names that transformers uses in memory."""
    return {name.replace("backbone.", "model.", 1): value for name, value in tensors.items()}


def stock_member(parent: HybridParent, member: Architecture) -> NemotronHForCausalLM:
    """transformers' own Nemotron-H with the weights that a homogeneous member keeps."""
    stock = stock_model(cut_shape(parent.shape, member))
    regions = kept_regions(parent.shape, member)
    position = {layer.index: new for new, layer in enumerate(member.layers)}
    cut = {}
    for name, weight in parent.state_dict().items():
        if regions[name].any():
            dims = range(weight.dim())
            others = [tuple(i for i in dims if i != d) for d in dims]
            sizes = [int(regions[name].any(dim=dim).sum()) for dim in others]
            parts = name.split(".")
            if ".layers." in name:
                parts[2] = str(position[int(parts[2])])
            cut[".".join(parts)] = weight[regions[name]].view(sizes)
    stock.load_state_dict(stock_names(cut))
    return stock
