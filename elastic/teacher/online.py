"""A teacher that computes: the frozen parent, whole on every device."""

import copy
from typing import Any

import torch
from torch import nn

from elastic.data import Batch
from elastic.losses import Head
from elastic.parent import HybridParent
from elastic.teacher.base import Teacher


def weight_dtype(precision: str) -> torch.dtype:
    """Type of a teacher's matrices under `trainer.precision`."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


class OnlineTeacher(Teacher):
    """A copy of the parent as it is now; later changes of the original do not reach it.

    In bfloat16 it is what a float32 copy is under autocast, at half the bytes: the matrices, which
    autocast would round for every product, are rounded once. Vectors and convolutions, A_log,
    dt_bias and D among them, stay in float32, and so does the residual stream: they are small, and
    the scan feeds them to an exponential. Only the embedding is rounded where autocast would not.
    Autocast around a call changes nothing.

    Args:
        parent: unsorted, in float32, on the host.
        precision: as trainer.precision.
    """

    def __init__(self, parent: HybridParent, precision: str) -> None:
        self.dtype = weight_dtype(precision)
        self.model = _frozen_copy(parent, self.dtype)
        if self.dtype != torch.float32:
            self.model.backbone.layers[0].register_forward_pre_hook(_widen)

    def start(self, device: torch.device, stage: str) -> None:
        self.model.to(device)

    @torch.no_grad()
    def distributions(self, batch: Batch, split: str, first: int) -> Head:
        """Hidden states (b * t, d) and the head (v, d), both in the matrices' type."""
        narrow = self.dtype != torch.float32
        with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16, enabled=narrow):
            hidden = self.model(batch.inputs, None, batch.documents)
        return hidden.flatten(0, 1).to(self.dtype), self.model.head_weight()


def _frozen_copy(parent: HybridParent, dtype: torch.dtype) -> HybridParent:
    """A copy in evaluation mode, matrices in `dtype`; no second whole copy exists on the way."""
    copied: dict[int, Any] = {}
    for weight in parent.parameters():
        kind = dtype if weight.ndim == 2 else torch.float32
        data = weight.detach().to(kind, copy=True)
        copied[id(weight)] = nn.Parameter(data, requires_grad=False)
    model = copy.deepcopy(parent, copied)  # takes the weights that it is given
    model.activation_checkpointing = False
    return model.eval()


def _widen(block: nn.Module, inputs: tuple) -> tuple:
    """Start the residual stream in float32."""
    return (inputs[0].float(), *inputs[1:])
