"""Law 6 for the layers: narrowing, norm, squared ReLU and mixer core against their plain twins.

Compared: outputs, and gradients of everything that trains, masks included.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.strategies import (
    TOLERANCE,
    assert_near,
    difference,
    gradient_differences,
    random_parent,
    tiny_member,
    tiny_shape,
)
from torch import Tensor, nn

from elastic.members.architecture import MambaLayer
from elastic.members.cut import Cut, layer_cut
from elastic.parent.borders import Borders
from elastic.parent.layers import LayerKeep, _SquaredReLU, narrow
from elastic.parent.norms import RMSNorm
from elastic.parent.ssd import MambaMixer
from elastic.parent.ssd_ref import CHUNK


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def outputs_and_gradients(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = run()
    weights = torch.linspace(-1, 1, out.numel()).sin().view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), leaves)]


def assert_agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        assert value.shape == wanted.shape and value.dtype == wanted.dtype
        assert_near(value, wanted)


def by_index(weight: Tensor, cut: Cut) -> Tensor:
    """The plain twin of `narrow`."""
    for dim, ranges in enumerate(cut):
        if ranges is not None:
            kept = torch.cat([torch.arange(start, stop) for start, stop in ranges])
            weight = weight.index_select(dim, kept)
    return weight


@pytest.mark.parametrize(
    "cut",
    [
        (None, None),
        (((0, 4),), None),
        (((0, 4),), ((0, 3),)),
        (((1, 3), (5, 6), (8, 10)), ((0, 3),)),
        (((2, 4), (7, 9)), ((1, 2), (4, 6))),
    ],
    ids=str,
)
def test_narrowing_is_indexing(cut: Cut) -> None:
    """In values, and in a gradient that is zero wherever nothing was kept."""
    weight = normal(10, 6)
    actual = outputs_and_gradients(lambda: narrow(weight, cut), [weight])
    assert_agree(actual, outputs_and_gradients(lambda: by_index(weight, cut), [weight]))
    assert weight.grad is None and actual[1].shape == weight.shape


def test_narrowing_to_a_prefix_copies_nothing() -> None:
    weight = normal(10, 6)
    assert narrow(weight, (((0, 4),), ((0, 3),))).data_ptr() == weight.data_ptr()
    assert narrow(weight, (None, None)) is weight


@pytest.mark.parametrize("rows", [None, 1, 2], ids="mask rows={}".format)
def test_the_norm_is_the_formula(rows: int | None) -> None:
    norm, x = RMSNorm(7, eps=0.1), normal(2, 5, 7)
    with torch.no_grad():
        norm.weight.copy_(normal(7, seed=1))
    keep = None if rows is None else normal(rows, 7, seed=2).detach().sigmoid().requires_grad_()

    def plain() -> Tensor:
        kept = 7 if keep is None else keep.sum(-1)[:, None, None]
        variance = x.square().sum(-1, keepdim=True) / kept
        return x / (variance + 0.1).sqrt() * norm.weight

    leaves = [x, norm.weight, *([] if keep is None else [keep])]
    actual = outputs_and_gradients(lambda: norm(x, None, keep), leaves)
    assert_agree(actual, outputs_and_gradients(plain, leaves))


def test_the_squared_relu_is_that() -> None:
    x = normal(50)
    actual = outputs_and_gradients(lambda: _SquaredReLU.apply(x), [x])
    assert_agree(actual, outputs_and_gradients(lambda: F.relu(x).square(), [x]))


def plain(mixer: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """What the composition gives, which alone can be observed."""
    assert isinstance(mixer, MambaMixer)
    mixer.observe = lambda _: None
    out = run()
    mixer.observe = None
    return out


@pytest.mark.parametrize("way", ["whole", "sliced", "width", "channels", "width channels"])
@pytest.mark.parametrize("several", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("time", [1, 3, CHUNK, CHUNK + 5, 3 * CHUNK])
def test_the_mixer_core_is_the_composition(way: str, several: bool, time: int) -> None:
    """Weights, input and masks have the same gradients either way through the mixer."""
    sliced = way == "sliced"
    shape, member = tiny_shape(), tiny_member()
    layer = next(layer for layer in member.layers if isinstance(layer, MambaLayer))
    mixer = random_parent(shape).backbone.layers[layer.index].mixer
    assert isinstance(mixer, MambaMixer) and mixer.kernels == "torch"
    hidden = member.hidden_size if sliced else shape.hidden_size
    cuts = layer_cut(shape, hidden, layer) if sliced else {}
    u = normal(2, time, hidden)
    sizes = {"width": shape.mamba_num_heads, "channels": shape.mamba_head_dim}
    masks = {
        name: normal(1, size, seed=3).detach().sigmoid().requires_grad_()
        for name, size in sizes.items()
        if name in way
    }
    leaves = [u, *mixer.parameters(), *masks.values()]
    documents = torch.tensor([0, 0, 2, 2, 2, 3, 4] * CHUNK)[: 2 * time].view(2, time)
    borders = Borders(documents.cumsum(-1).int(), 4) if several else None

    def run() -> Tensor:
        out: Tensor = mixer(u, layer if sliced else None, cuts, LayerKeep(**masks), borders)
        return out

    core = outputs_and_gradients(run, leaves)
    composed = outputs_and_gradients(lambda: plain(mixer, run), leaves)
    assert_near(core[0], composed[0])
    off = gradient_differences(dict(enumerate(core[1:])), dict(enumerate(composed[1:])))
    assert max(off.values()) <= 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("limit", [[0.2, 1e30], [0.0, 0.3], [0.2, 0.3]], ids=str)
def test_a_limited_step_has_a_gradient_only_within_the_limit(limit: list[float]) -> None:
    """The gradient that is written out against autograd's; both bounds bind for some steps."""
    mixer = random_parent(tiny_shape(time_step_limit=limit)).backbone.layers[0].mixer
    free = random_parent(tiny_shape()).backbone.layers[0].mixer
    u = normal(2, 2 * CHUNK + 5, tiny_shape().hidden_size)

    def run(owner: nn.Module) -> Tensor:
        out: Tensor = owner(u, None, {}, LayerKeep())
        return out

    leaves = [u, *mixer.parameters()]
    core = outputs_and_gradients(lambda: run(mixer), leaves)
    composed = outputs_and_gradients(lambda: plain(mixer, lambda: run(mixer)), leaves)
    assert_near(core[0], composed[0])
    off = gradient_differences(dict(enumerate(core[1:])), dict(enumerate(composed[1:])))
    assert max(off.values()) <= 10 * TOLERANCE[torch.float32]
    assert difference(core[0], run(free)) > 1e-3, "the limit binds"


def test_a_step_far_below_the_old_clamp_still_learns() -> None:
    """Steps of 1e-8 are steps: they have a gradient, and no clamp stands in its way."""
    mixer = random_parent(tiny_shape()).backbone.layers[0].mixer
    with torch.no_grad():
        mixer.dt_bias.sub_(17)
    u = normal(2, 9, tiny_shape().hidden_size)
    _, gradient = outputs_and_gradients(lambda: mixer(u, None, {}, LayerKeep()), [mixer.dt_bias])
    assert (gradient != 0).all()


def test_the_mixer_core_survives_autocast() -> None:
    """Under bf16-mixed the core stays in float32, forwards and backwards."""
    mixer = random_parent(tiny_shape()).backbone.layers[0].mixer
    u = normal(2, 9, tiny_shape().hidden_size)
    exact = outputs_and_gradients(lambda: mixer(u, None, {}, LayerKeep()), [u, mixer.A_log])
    with torch.autocast("cpu", torch.bfloat16):
        half = outputs_and_gradients(lambda: mixer(u, None, {}, LayerKeep()), [u, mixer.A_log])
    assert half[0].dtype == torch.bfloat16
    for value, wanted in zip(half, exact, strict=True):
        assert (value.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
