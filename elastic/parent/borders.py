"""Borders between the documents of a batch, in the forms that Mamba layers take.

Made once for a batch, and shared by all its layers. Shapes: b batch, t time, j convolved channels,
k taps of the convolution; n steps near a border.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from elastic.parent.ssd_chunk import ChunkBorders, chunk_borders
from elastic.parent.ssd_ref import CHUNK


@dataclass(frozen=True)
class Windows:
    """Steps from which a convolution reaches across a border: few, and the only ones that need
    care.

    `rows` and `steps` (n,) are where; `others` (n, k) are the steps at a distance of 0 to k - 1;
    `same` and `across` (n, k, 1) are 1.0 where such a step is of the same document, of another one.
    """

    rows: Tensor
    steps: Tensor
    others: Tensor
    same: Tensor
    across: Tensor

    def at(self, value: Tensor) -> Tensor:
        """(b, j, t) -> (n, j) at the steps themselves."""
        return value[self.rows, :, self.steps]

    def around(self, value: Tensor) -> Tensor:
        """(b, j, t) -> (n, k, j) at the others; a step outside the row is any other."""
        return value[self.rows[:, None], :, self.others]


@dataclass(frozen=True)
class Borders:
    """`ids` (b, t) int32 never fall along a row, and change where a document begins; `width` is
    the number of taps. The rest is made when a layer in plain torch asks for it."""

    ids: Tensor
    width: int

    @cached_property
    def chunks(self) -> ChunkBorders:
        """For the scan in chunks."""
        return chunk_borders(self._padded, min(CHUNK, self.ids.shape[1]))

    @cached_property
    def earlier(self) -> Windows:
        """What the convolution reads."""
        return self._windows(-1)

    @cached_property
    def later(self) -> Windows:
        """What reads a step, for the gradient."""
        return self._windows(1)

    @property
    def _padded(self) -> Tensor:
        """Filled up to whole chunks, as `mixer_core` fills up its row: by the last document, which
        nothing there changes."""
        padding = -self.ids.shape[1] % min(CHUNK, self.ids.shape[1])
        return torch.cat([self.ids, self.ids[:, -1:].expand(-1, padding)], dim=1)

    def _windows(self, direction: int) -> Windows:
        ids = self._padded
        time = torch.arange(ids.shape[1], device=ids.device)[:, None]
        others = time + direction * torch.arange(self.width, device=ids.device)  # (t, k)
        inside = (others >= 0) & (others < len(time))
        others = others.clamp(0, len(time) - 1)
        equal = ids[:, others] == ids[:, :, None]  # (b, t, k)
        across = inside & ~equal
        rows, steps = across.any(-1).nonzero(as_tuple=True)
        same, across = (z[rows, steps, :, None].float() for z in (inside & equal, across))
        return Windows(rows, steps, others[steps], same, across)
