"""How the parent runs while it is ranked: forwards alone, layer by layer.

In bfloat16 the matrices are rounded once, and products read and write bfloat16. The residual
stream, norms, softmax, step sizes and decays of the scan stay in float32, and so do vectors and
convolutions: what is summed over the calibration text is measured in them, and is added up in
float64. Shapes: b batch, t time, d hidden, v vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.cluster.place import Place, first_alone
from elastic.parent import HybridParent, LayerKeep

_WHOLE = LayerKeep()

GRAM_ROWS = 16_384
"""Rows of a matrix that are widened at a time."""


def make_ready(parent: HybridParent, device: torch.device, dtype: torch.dtype) -> HybridParent:
    """Move a float32 parent to a device, with its matrices in `dtype`; no second whole copy exists
    on the way."""
    for weight in parent.parameters():
        weight.data = weight.data.to(device, dtype if weight.ndim == 2 else torch.float32)
    return parent.eval()


def products(parent: HybridParent) -> torch.autocast:
    """The context in which products are made in the type of the matrices."""
    weight = parent.lm_head.weight
    narrow = weight.dtype == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=narrow)


def enter(parent: HybridParent, tokens: Tensor) -> Tensor:
    """(b, t) int64 -> (b, t, d) float32, the residual stream before the first layer."""
    return F.embedding(tokens, parent.backbone.embeddings.weight).float()


def through(parent: HybridParent, x: Tensor, layers: Iterable[int], documents: Tensor) -> Tensor:
    """The residual stream (b, t, d) float32 after some layers of the parent, one after another;
    `documents` (b, t) as in `HybridParent.forward`."""
    borders = parent.borders(documents)
    for index in layers:
        block: Any = parent.backbone.layers[index]
        x = block(x, None, {}, None, _WHOLE, borders.get(block.kind))
    return x


def gram(weight: Tensor) -> Tensor:
    """W^T W (d, d) float64 of a matrix (rows, d). Products of float32 on a GPU, whose sums are
    float64 from `GRAM_ROWS` on; of float64 elsewhere."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.detach().split(GRAM_ROWS):
        wide = rows.float() if rows.is_cuda else rows.double()
        total += (wide.T @ wide).double()
    return total


def require_finite(place: Place, found: Iterable[tuple[str, Tensor]]) -> None:
    """Hold what all processes have alike against infinity; the first one says what it finds.

    Weights are finite when they are read: these have overflowed, and NaN would sort anywhere.

    Raises:
        ValueError: a tensor is not finite; names it.
    """
    with first_alone(place):
        for what, values in found if place.rank == 0 else ():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"importance: {what} are not finite on the calibration text, though the "
                    "weights are; activations overflow, and the parent cannot be ranked: use "
                    "another one"
                )
