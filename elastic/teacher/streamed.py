"""A teacher too large for a device: its matrices are kept elsewhere and fetched when needed.

The matrices of a block are one run of bytes, kept in host memory or in equal shares on all
processes, and brought to one of two places on the device while the block before it computes. The
embedding and the LM head share a third place: the one is read first, the other last. A device never
holds more than that, and the vectors. torch's `fully_shard` would do for the shares, but needs a
process group even to keep weights on the host, and leaves embedding and head on every device
between calls.
"""

import logging
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from elastic.parent import HybridParent
from elastic.teacher.online import OnlineTeacher

log = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes; GPU kernels need operands that begin at a multiple."""


_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 has another name for it."""


class WeightStore(Protocol):
    """Where the bytes of one unit are while they are not in use."""

    size: int
    """Bytes that a place for them must have."""
    held: int
    """Bytes that this process keeps on the device."""

    def fetch(self, place: Tensor) -> Any:
        """Copy them to `place`, asynchronously. What is returned, if anything, has a `wait`."""


class HostWeights:
    """Host memory of this process, page-locked so that a GPU can copy while it computes."""

    def __init__(self, flat: Tensor, device: torch.device) -> None:
        self.flat = flat.pin_memory() if device.type == "cuda" else flat
        self.size, self.held = len(flat), 0

    def fetch(self, place: Tensor) -> None:
        place[: self.size].copy_(self.flat, non_blocking=True)


class PartitionedWeights:
    """An equal share on the device of every process."""

    def __init__(self, flat: Tensor, device: torch.device) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.held = -(-len(flat) // world_size)
        self.size = self.held * world_size
        share = flat[rank * self.held : (rank + 1) * self.held]
        self.share = torch.zeros(self.held, dtype=torch.uint8, device=device)
        self.share[: len(share)] = share

    def fetch(self, place: Tensor) -> Any:
        return _gather(place[: self.size], self.share, async_op=True)


class Unit:
    """Matrices that are fetched and released together."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.starts, size = weights, [], 0
        for weight in weights:
            self.starts.append(size)
            size += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        self.size = size
        self.kinds = [(weight.dtype, weight.shape, weight.nbytes) for weight in weights]
        self.views: list[Tensor] = []
        self.work: Any = None

    def offload(
        self, kind: type[HostWeights] | type[PartitionedWeights], device: torch.device
    ) -> None:
        """Move the weights off the device; the parameters are empty from now on."""
        flat = torch.zeros(self.size, dtype=torch.uint8)
        for weight, start in zip(self.weights, self.starts, strict=True):
            flat[start : start + weight.nbytes] = weight.data.flatten().view(torch.uint8)
        self.store: WeightStore = kind(flat, device)
        self.leave()

    def assign(self, place: Tensor) -> None:
        """Set where on the device the weights are fetched to."""
        self.place = place
        self.views = [
            place[start : start + size].view(dtype).view(shape)
            for start, (dtype, shape, size) in zip(self.starts, self.kinds, strict=True)
        ]

    def enter(self) -> None:
        """Let the parameters be the fetched weights."""
        for weight, view in zip(self.weights, self.views, strict=True):
            weight.data = view

    def leave(self) -> None:
        """Empty the parameters, so that reading one fails."""
        for weight, (dtype, _, _) in zip(self.weights, self.kinds, strict=True):
            weight.data = torch.empty(0, dtype=dtype)


class Stream:
    """Fetches the matrices of a model to the device, unit by unit, during its forward pass.

    Every process fetches the same units in the same order.
    """

    def __init__(
        self,
        model: HybridParent,
        kind: type[HostWeights] | type[PartitionedWeights],
        device: torch.device,
    ) -> None:
        embedding, head = model.backbone.embeddings.weight, model.lm_head.weight
        blocks = list(model.backbone.layers)
        self.first = Unit([embedding])
        self.last = self.first if head is embedding else Unit([head])
        self.blocks = [Unit([w for w in block.parameters() if w.ndim == 2]) for block in blocks]
        ends = [self.first] if self.last is self.first else [self.first, self.last]
        for unit in (*ends, *self.blocks):
            unit.offload(kind, device)
        model.to(device)  # the vectors, all that is left
        self.places = 0
        for group in (ends, self.blocks[::2], self.blocks[1::2]):
            size = max((unit.store.size for unit in group), default=0)
            place = torch.empty(size, dtype=torch.uint8, device=device)
            self.places += size
            for unit in group:
                unit.assign(place)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        model.register_forward_pre_hook(self._begin)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._enter(index))
            block.register_forward_hook(self._leave(self.blocks[index]))
        model.register_forward_hook(self._end)

    def held(self) -> int:
        """Bytes of matrices that this device holds at any time: the places, and shares."""
        units: Iterable[Unit] = {self.first, self.last, *self.blocks}
        return self.places + sum(unit.store.held for unit in units)

    def _fetch(self, unit: Unit) -> None:
        """Begin to fetch a unit, once all that was queued on the device so far is done with its
        place."""
        if self.copies is None:
            unit.work = unit.store.fetch(unit.place)
            return
        self.copies.wait_stream(torch.cuda.current_stream(self.copies.device))
        with torch.cuda.stream(self.copies):
            work = unit.store.fetch(unit.place)
            unit.work = self.copies.record_event() if work is None else work

    def _use(self, unit: Unit) -> None:
        """Make what follows wait for the unit."""
        if unit.work is not None:
            unit.work.wait()  # an event makes the stream wait, not the host
        unit.work = None
        unit.enter()

    def _begin(self, *_: Any) -> None:
        self.last.leave()
        self._fetch(self.first)
        self._fetch(self.blocks[0])
        self._use(self.first)

    def _enter(self, index: int) -> Any:
        after = self.blocks[index + 1] if index + 1 < len(self.blocks) else self.last

        def hook(*_: Any) -> None:
            if index == 0 and self.last is not self.first:
                self.first.leave()
            if after is not self.first:  # a head that is the embedding has stayed
                self._fetch(after)
            self._use(self.blocks[index])

        return hook

    def _leave(self, unit: Unit) -> Any:
        return lambda *_: unit.leave()

    def _end(self, *_: Any) -> None:
        if self.last is not self.first:
            self._use(self.last)


class StreamedTeacher(OnlineTeacher):
    """The parent in host memory of each process (`cpu_offload`), or partitioned over the processes
    (`zero3`), which must then all call it together.

    A call moves all matrices over the bus, or the network, once, so that micro-batches should be
    large.
    """

    def __init__(
        self,
        parent: HybridParent,
        precision: str,
        kind: type[HostWeights] | type[PartitionedWeights],
    ) -> None:
        super().__init__(parent, precision)
        self.kind = kind
        self.stream: Stream | None = None

    def start(self, device: torch.device, stage: str) -> None:
        if self.stream is not None:
            return
        whole = sum(weight.nbytes for weight in self.model.parameters())
        self.stream = Stream(self.model, self.kind, device)
        held = self.stream.held()
        log.info("teacher: %.1f MB on this device, of %.1f MB", held / 1e6, whole / 1e6)
