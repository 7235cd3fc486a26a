"""Law 6 for attention inside documents: blocks and single documents against the mask.

Compared: outputs, and on a GPU and document by document gradients too; flex_attention has no
gradient on a CPU. Its blocks are also those that torch finds in the whole mask.
"""

import pytest
import torch
from helpers.strategies import TOLERANCE, difference
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from elastic.parent.attend import (
    BLOCK,
    LEAST_CHANNELS,
    Seen,
    attend,
    block_mask,
    document_lengths,
    document_mask,
    one_each,
    seen_in,
)

HEADS = [(6, 2), (5, 1), (10, 2), (3, 3)]
"""Query and KV heads: three, five and five in a group, and no groups."""


def documents(batch: int, time: int, mean: float, seed: int = 0) -> Tensor:
    """(b, t) ids that jump at random."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(batch, time, generator=generator) < 1 / mean
    return (3 * begins).cumsum(-1).int()


def inputs(
    batch: int, heads: int, groups: int, time: int, channels: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Queries, keys and values; leaves that take a gradient."""
    generator = torch.Generator().manual_seed(time)
    return [
        torch.randn(batch, count, time, channels, generator=generator)
        .to(device, dtype)
        .requires_grad_()
        for count in (heads, groups, groups)
    ]


def outputs_and_gradients(leaves: list[Tensor], seen: Seen) -> list[Tensor]:
    out = attend(leaves[0], leaves[1], leaves[2], seen)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).sin().view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), leaves)]


@pytest.mark.parametrize(
    ("time", "mean"),
    [
        (1, 2),
        (BLOCK - 1, 30),
        (BLOCK, 1e9),
        (2 * BLOCK + 1, 2),
        (3 * BLOCK, 100),
        (9 * BLOCK - 7, 300),
    ],
)
def test_blocks_are_those_of_the_whole_mask(time: int, mean: float) -> None:
    """Which are read at all, and in which no step is masked: for queries and for keys."""
    ids = documents(2, time, mean)

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[row, query] == ids[row, key])

    ours, torchs = block_mask(ids), create_block_mask(seen, 2, None, time, time, device="cpu")
    assert ours.shape == torchs.shape
    for side in ("kv", "q", "full_kv", "full_q"):
        counts = getattr(ours, f"{side}_num_blocks")
        assert torch.equal(counts, getattr(torchs, f"{side}_num_blocks"))
        used = torch.arange(counts.shape[-1]) < counts[..., None]
        indices = (getattr(mask, f"{side}_indices") for mask in (ours, torchs))
        assert torch.equal(*(torch.where(used, index, -1) for index in indices))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_blocks_give_what_the_mask_gives(heads: int, groups: int) -> None:
    """Not compiled, without a gradient: what a CPU can do."""
    for time, dtype in ((40, torch.float32), (BLOCK + 9, torch.float32), (300, torch.bfloat16)):
        ids = documents(2, time, 30)
        leaves = [leaf.detach() for leaf in inputs(2, heads, groups, time, 7, dtype, "cpu")]
        blocks = attend(leaves[0], leaves[1], leaves[2], block_mask(ids))
        expected = attend(leaves[0], leaves[1], leaves[2], document_mask(ids))
        assert blocks.dtype == dtype
        assert difference(blocks, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_document_by_document_is_the_mask(heads: int, groups: int) -> None:
    for time, mean in ((1, 2), (50, 2), (50, 20), (50, 1e9)):
        ids = documents(3, time, mean)
        leaves = inputs(3, heads, groups, time, 7, torch.float32, "cpu")
        actual = outputs_and_gradients(leaves, document_lengths(ids))
        expected = outputs_and_gradients(leaves, document_mask(ids))
        for value, wanted in zip(actual, expected, strict=True):
            assert difference(value, wanted, 1e-3) <= TOLERANCE[torch.float32]


def test_rows_that_are_one_document_need_no_borders() -> None:
    one = torch.tensor([[4, 4, 4], [7, 7, 7]]).int()
    assert one_each(one)
    assert not one_each(torch.tensor([[4, 4, 4], [7, 7, 8]]).int())
    assert document_lengths(one) == (3, 3), "and rows that follow one another are two"


def test_short_documents_share_a_mask() -> None:
    """A call for each would take longer."""
    assert isinstance(seen_in(documents(2, 64, 1), 32), Tensor)
    assert seen_in(torch.tensor([[0] * 40 + [1] * 24]).int(), 32) == (40, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("channels", [16, 40, 128])
def test_blocks_are_the_mask_on_a_gpu(
    channels: int, heads: int, groups: int, dtype: torch.dtype
) -> None:
    """Compiled, with gradients, for several batches and lengths of one number of heads."""
    for batch, time, mean in ((2, 300, 50), (1, 1024, 1e9), (3, 1024, 200), (2, 100, 3)):
        ids = documents(batch, time, mean).cuda()
        assert not isinstance(seen_in(ids, channels), Tensor)
        leaves = inputs(batch, heads, groups, time, channels, dtype, "cuda")
        actual = outputs_and_gradients(leaves, seen_in(ids, channels))
        exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
        expected = outputs_and_gradients(exact, document_mask(ids))
        for value, wanted in zip(actual, expected, strict=True):
            assert value.dtype == dtype
            assert difference(value, wanted) <= TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_long_row_takes_no_square_of_its_length_on_a_gpu() -> None:
    """A mask alone would be 2.4 GB; queries, keys, values and gradients are less than half."""
    ids = documents(1, 49_152, 2000).cuda()
    leaves = inputs(1, 10, 2, 49_152, 128, torch.bfloat16, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend(leaves[0], leaves[1], leaves[2], seen_in(ids, 128))
    out.backward(torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 1e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_heads_too_small_for_blocks_take_the_mask_on_a_gpu() -> None:
    assert isinstance(seen_in(documents(1, 9, 3).cuda(), LEAST_CHANNELS - 1), Tensor)
