"""What is in memory while something runs: bytes of the tensors that operations made and that still
live, and what autograd keeps for the backward pass."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Bytes of memory made inside and still held, now and at the peak; each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(a.untyped_storage()) for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in given:
                self._enter(value.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known:
            return
        self._known[address] = weakref.finalize(storage, self._leave, address, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _leave(self, address: int, size: int) -> None:
        self.now -= size
        del self._known[address]


def saved_bytes(forward: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, `weights` left out."""
    sizes: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        held.append(value)  # an address is given out again once it is free
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = forward()
    del out
    for weight in weights:
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    return sum(sizes.values())
