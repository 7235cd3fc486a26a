"""Permute the parent's weights once, so that members are prefixes; the function stays the same."""

from typing import Any

import torch
from torch import Tensor

from elastic.config import ParentShape
from elastic.importance.score import Orders
from elastic.parent import HybridParent


def head_units(order: Tensor, width: int) -> Tensor:
    """Order of heads -> order of their `width` consecutive units."""
    return (order[:, None] * width + torch.arange(width)).flatten()


def check_orders(shape: ParentShape, orders: Orders) -> None:
    """Assert that heads stay inside their group: B and C, K and V belong to the group."""
    for order, groups in (
        *((order, shape.n_groups) for order in orders.mamba_heads.values()),
        *((order, shape.num_key_value_heads) for order in orders.attention_heads.values()),
    ):
        size = order.numel() // groups
        group = torch.arange(order.numel()) // size
        assert torch.equal(order // size, group), "a head left its group"


@torch.no_grad()
def sort_parent(parent: HybridParent, orders: Orders, check: bool = True) -> None:
    """Reorder every tensor in place (arXiv 2511.16664, section 3.1).

    `check=False` is for the test that shows why heads must stay in their group.
    """
    shape = parent.shape
    if check:
        check_orders(shape, orders)
    hidden = orders.hidden
    _permute(parent.backbone.embeddings.weight, 1, hidden)
    if not shape.tied_head:
        _permute(parent.lm_head.weight, 1, hidden)
    _permute(parent.backbone.norm_f.weight, 0, hidden)
    block: Any  # nn.Module attributes have no types
    for index, block in enumerate(parent.backbone.layers):
        mixer = block.mixer
        _permute(block.norm.weight, 0, hidden)
        if block.kind == "mlp":
            _permute(mixer.up_proj.weight, 1, hidden)
            _permute(mixer.up_proj.weight, 0, orders.ffn[index])
            _permute(mixer.down_proj.weight, 1, orders.ffn[index])
            _permute(mixer.down_proj.weight, 0, hidden)
        elif block.kind == "attention":
            units = head_units(orders.attention_heads[index], shape.head_dim)
            for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
                _permute(projection.weight, 1, hidden)
            _permute(mixer.q_proj.weight, 0, units)
            _permute(mixer.o_proj.weight, 1, units)
            _permute(mixer.o_proj.weight, 0, hidden)
        else:
            _sort_mamba(mixer, shape, orders.mamba_heads[index], orders.mamba_channels[index])
            _permute(mixer.in_proj.weight, 1, hidden)
            _permute(mixer.out_proj.weight, 0, hidden)


def _sort_mamba(mixer: Any, shape: ParentShape, heads: Tensor, channels: Tensor) -> None:
    """Heads within groups, channels alike in every head; B and C are not touched."""
    width = shape.mamba_head_dim
    units = (heads[:, None] * width + channels).flatten()  # (h * p,)
    inner = units.numel()
    state = torch.arange(2 * shape.n_groups * shape.ssm_state_size)
    rows = [units, inner + units, 2 * inner + state, 2 * inner + state.numel() + heads]
    _permute(mixer.in_proj.weight, 0, torch.cat(rows))  # z, x, B and C, dt
    convolved = torch.cat([units, inner + state])  # x, B and C
    _permute(mixer.conv1d.weight, 0, convolved)
    if mixer.conv1d.bias is not None:
        _permute(mixer.conv1d.bias, 0, convolved)
    for weight in (mixer.A_log, mixer.D, mixer.dt_bias):
        _permute(weight, 0, heads)
    _permute(mixer.norm.weight, 0, units)
    _permute(mixer.out_proj.weight, 1, units)


def _permute(weight: Tensor, dim: int, order: Tensor) -> None:
    weight.copy_(weight.index_select(dim, order.to(weight.device)))
