"""Bring the parent's weights into their basis once, so that members are prefixes; the function
stays the same.

One table holds what happens to every tensor: its rows and columns are permuted, or rotated along
the residual stream. It is applied to a model in memory, and to a checkpoint on disk row block by
row block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elastic.config import ParentShape
from elastic.importance.basis import FINAL, check_rotation, readers, stream_norms
from elastic.importance.score import Orders
from elastic.members.cut import Ranges, tensor_shapes
from elastic.parent import HybridParent
from elastic.parent.small_files import copy_small_files
from elastic.parent.stock import read_config
from elastic.parent.weights import open_weights, save_weights
from elastic.storage.ahead import ahead
from elastic.storage.files import write_json
from elastic.storage.foreign import read_json
from elastic.storage.progress import Progress
from elastic.storage.reading import BLOCK_BYTES, StoredTensor
from elastic.storage.seals import Seals, damage
from elastic.storage.store import TensorStore
from elastic.storage.writing import Pending

RANKING = "ranking.json"
"""File with the ranking that a checkpoint was sorted by."""


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor: orders of its rows and columns (entry 0 is the index of what comes
    first, None leaves them), and its side along the residual stream, where that is rotated."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    turned: str | None = None
    """`rows`: Q^T W, `columns`: W Q, after the orders; `ones`: a norm whose weights are folded into
    its readers."""
    gain: str | None = None
    """Stored name of the norm whose weights are folded into the columns before they are turned."""


def head_units(order: Tensor, width: int) -> Tensor:
    """Order of heads -> order of their `width` consecutive units."""
    return (order[:, None] * width + torch.arange(width)).flatten()


def check_orders(shape: ParentShape, orders: Orders) -> None:
    """Assert that heads stay inside their group, to which B and C, K and V belong, and that a
    rotation is orthogonal."""
    if orders.rotation is not None:
        check_rotation(orders.rotation)
    for order, groups in (
        *((order, shape.n_groups) for order in orders.mamba_heads.values()),
        *((order, shape.num_key_value_heads) for order in orders.attention_heads.values()),
    ):
        size = order.numel() // groups
        group = torch.arange(order.numel()) // size
        assert torch.equal(order // size, group), "a head left its group"


def changes(shape: ParentShape, orders: Orders) -> dict[str, Change]:
    """What becomes of every stored tensor (arXiv 2511.16664, section 3.1), by its name."""
    stream = orders.hidden  # the object itself marks the sides along the stream
    table: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "backbone.embeddings.weight": (None, stream),
        "lm_head.weight": (None, stream),
        FINAL: (stream, None),
    }
    for index, kind in enumerate(shape.kinds):
        layer: dict[str, tuple[Tensor | None, Tensor | None]]
        if kind == "mlp":
            ffn = orders.ffn[index]
            layer = {"up_proj.weight": (ffn, stream), "down_proj.weight": (stream, ffn)}
        elif kind == "attention":
            units = head_units(orders.attention_heads[index], shape.head_dim)
            layer = {
                "q_proj.weight": (units, stream),
                "k_proj.weight": (None, stream),
                "v_proj.weight": (None, stream),
                "o_proj.weight": (stream, units),
            }
        else:
            layer = _mamba(shape, orders, index)
        prefix = f"backbone.layers.{index}"
        table[f"{prefix}.norm.weight"] = (stream, None)
        table |= {f"{prefix}.mixer.{name}": entry for name, entry in layer.items()}
    if orders.rotation is None:
        return {name: Change(*sides) for name, sides in table.items()}
    norms = set(stream_norms(shape))
    folded = {name: norm for norm in norms for name in readers(shape, norm)}
    found = {}
    for name, (rows, columns) in table.items():
        if name in norms:
            found[name] = Change(turned="ones")
        elif rows is stream:
            found[name] = Change(None, columns, "rows")
        elif columns is stream:
            found[name] = Change(rows, None, "columns", folded.get(name))
        else:
            found[name] = Change(rows, columns)
    return found


def mamba_units(shape: ParentShape, orders: Orders, index: int) -> Tensor:
    """Order of a layer's inner units (h * p,): heads within groups, channels alike in every
    head."""
    heads, channels = orders.mamba_heads[index], orders.mamba_channels[index]
    return (heads[:, None] * shape.mamba_head_dim + channels).flatten()


def _mamba(
    shape: ParentShape, orders: Orders, index: int
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """B and C are not touched."""
    heads, units = orders.mamba_heads[index], mamba_units(shape, orders, index)
    inner = units.numel()
    state = torch.arange(2 * shape.n_groups * shape.ssm_state_size)
    rows = [units, inner + units, 2 * inner + state, 2 * inner + state.numel() + heads]
    convolved = torch.cat([units, inner + state])  # x, B and C
    return {
        "in_proj.weight": (torch.cat(rows), orders.hidden),  # z, x, B and C, dt
        "conv1d.weight": (convolved, None),
        "conv1d.bias": (convolved, None),
        "A_log": (heads, None),
        "D": (heads, None),
        "dt_bias": (heads, None),
        "norm.weight": (units, None),
        "out_proj.weight": (orders.hidden, units),
    }


@torch.no_grad()
def sort_parent(parent: HybridParent, orders: Orders, check: bool = True) -> None:
    """Change every tensor in place.

    `check=False` is for tests that show why heads must stay in their group, and why a rotation must
    be orthogonal.
    """
    if check:
        check_orders(parent.shape, orders)
    assert orders.rotation is None or not parent.shape.tied_head, "a tied head cannot be rotated"
    table = changes(parent.shape, orders)
    weights = dict(parent.named_parameters())  # a tied head comes once
    gains = {name: weights[name].clone() for name in stream_norms(parent.shape)}
    for name, weight in weights.items():
        change = table[name]
        for dim, order in enumerate((change.rows, change.columns)):
            if order is not None:
                weight.copy_(weight.index_select(dim, order.to(weight.device)))
        if change.turned == "ones":
            weight.fill_(1.0)
        elif change.turned is not None:
            assert orders.rotation is not None
            rotation = orders.rotation.to(weight)
            if change.turned == "rows":
                weight.copy_(rotation.T @ weight)
            else:
                gain = 1.0 if change.gain is None else gains[change.gain]
                weight.copy_((weight * gain) @ rotation)


def sort_checkpoint(
    source: Path,
    target: Path,
    orders: Orders,
    key: str,
    max_shard_bytes: int = 4_000_000_000,
    seals: Seals | None = None,
) -> None:
    """Write a checkpoint in its basis, sealed, into an existing directory, a row block at a time.

    Every tensor keeps its type, and tokenizer and config files are copied. In memory there are a
    few row blocks, whatever the size of the checkpoint; with a rotation, the rotation in float32
    and one projection into the stream too. `seals` are the source's: see `open_weights`.

    Raises:
        ValueError: the source is not a whole Nemotron-H checkpoint.
        OSError: there is not enough space; nothing is written.
    """
    shape, store = open_weights(source, seals)
    check_orders(shape, orders)
    table = changes(shape, orders)
    rotation = orders.rotation
    if rotation is not None:
        rotation = rotation.float()
        assert not shape.tied_head, "a tied head cannot be rotated"
    tensors = []
    for name, size in tensor_shapes(shape).items():
        blocks = partial(_changed_blocks, store, name, table[name], rotation)
        tensors.append(Pending(name, size, store[name].dtype, blocks))
    with Progress(sum(tensor.bytes for tensor in tensors), "sorting") as progress:
        base = read_config(source)
        sealed = save_weights(target, shape, tensors, base, max_shard_bytes, progress)
    copy_small_files(source, target, seals=seals)
    write_json(target / RANKING, {"key": key})
    Seals.of(target, sealed).write()


def is_sorted(directory: Path, key: str) -> bool:
    """Whether `sort_checkpoint` has written this directory, after that ranking; every byte is
    compared, since nothing else is made of what differs than the same again."""
    try:
        found = read_json(directory / RANKING)
    except (OSError, ValueError):
        return False
    return bool(found == {"key": key}) and damage(directory) is None


def _changed_blocks(
    store: TensorStore, name: str, change: Change, rotation: Tensor | None
) -> Iterator[Tensor]:
    """A tensor in its new basis, by row blocks; products are in float32."""
    stored = store[name]
    if change.turned == "ones":
        yield torch.ones(stored.shape, dtype=stored.dtype)
        return
    if change.turned is None:
        yield from ahead(_sorted_blocks(stored, change))  # writing does not wait for it
        return
    assert rotation is not None
    if change.turned == "columns":
        gain = 1.0 if change.gain is None else store[change.gain].read(dtype=torch.float32)
        for block in ahead(_sorted_blocks(stored, change)):
            yield ((block.float() * gain) @ rotation).to(stored.dtype)
        return
    whole = stored.read(dtype=torch.float32)
    if change.columns is not None:
        whole = _with_columns(whole, change.columns)
    rows = max(1, BLOCK_BYTES // (whole[0].numel() * stored.dtype.itemsize))
    for turn in rotation.split(rows, dim=1):
        yield (turn.T @ whole).to(stored.dtype)


def _sorted_blocks(stored: StoredTensor, change: Change) -> Iterator[Tensor]:
    """Rows are read in their new order, columns reordered in memory."""
    cut = None
    if change.rows is not None:
        cut = (_runs(change.rows), *(None for _ in stored.shape[1:]))
        stored.prefetch()
    for block in stored.blocks(cut, once=cut is None):
        yield block if change.columns is None else _with_columns(block, change.columns)
    if cut is not None:
        stored.forget()


def _with_columns(block: Tensor, order: Tensor) -> Tensor:
    """`block.index_select(1, order)` in a quarter of the time, by numpy."""
    bits = block.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[block.element_size()])
    return torch.from_numpy(np.take(bits.numpy(), order.numpy(), axis=1)).view(block.dtype)


def _runs(order: Tensor) -> Ranges:
    """A permutation as ranges of consecutive indices, in its order."""
    breaks = (torch.nonzero(order.diff() != 1).flatten() + 1).tolist()
    ends, values = [0, *breaks, order.numel()], order.tolist()
    return tuple((values[a], values[b - 1] + 1) for a, b in pairwise(ends))
