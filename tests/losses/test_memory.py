"""What token losses in chunks cost: memory, matrix products, waiting for the device."""

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers.heads import (
    TEACHER_WIDTH,
    TOKENS,
    WEIGHTS,
    WIDTH,
    dense_terms,
    gradients,
    head,
    objective,
    targets,
    teacher_head,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.config.training import DIVERGENCES
from elastic.losses import token_terms


class Memory(TorchDispatchMode):
    """What operations do: their names, the largest tensor, and bytes made since and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = self.peak = 0
        self._made: list[weakref.ref[Tensor]] = []

    def alive(self) -> int:
        """Bytes of all memory that was made inside and is still held."""
        tensors = [tensor for made in self._made if (tensor := made()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        given = {
            a.untyped_storage().data_ptr()
            for a in (*args, *(kwargs or {}).values())
            if isinstance(a, Tensor)
        }
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
                if value.untyped_storage().data_ptr() not in given:
                    self._made.append(weakref.ref(value))
        self.peak = max(self.peak, self.alive())
        return out


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_of_all_tokens_never_exist(
    weights: str, temperature: float, top_k: int | None, divergence: str
) -> None:
    """At any time there are at most four buffers of a chunk's logits, and the gradients."""
    tokens, vocabulary, chunk = 400, 50, 16
    config = objective(
        weights, temperature=temperature, top_k=top_k, divergence=divergence, chunk_tokens=chunk
    )
    student, teacher = (
        head(width, 0, tokens, vocabulary, torch.float32) for width in (WIDTH, TEACHER_WIDTH)
    )
    text = targets(tokens, vocabulary)
    with Memory() as memory:
        gradients(token_terms(student, teacher, text, config)["total"], student)
    assert chunk * vocabulary <= memory.largest <= max(chunk * vocabulary, tokens * TEACHER_WIDTH)
    made = 4 * chunk * vocabulary + WIDTH * (tokens + vocabulary)
    small = 30 * chunk  # a few numbers per token of a chunk
    assert memory.peak <= 4 * (made + small) < 4 * tokens * vocabulary / 2
    with Memory() as dense:
        gradients(dense_terms(student, teacher, text, config)["total"], student)
    assert dense.peak > 4 * 2 * tokens * vocabulary, "guards the guard"


def test_between_forward_and_backward_only_gradients_are_kept() -> None:
    """No logits wait for the backward pass: it only scales."""
    student, teacher = head(dtype=torch.float32), teacher_head(torch.float32)
    with Memory() as memory:
        total = token_terms(student, teacher, targets(), objective("both"))["total"]
    gc.collect()
    expected = 4 * (student[0].numel() + student[1].numel())
    assert expected <= memory.alive() <= expected + 4 * 4
    del total
    assert memory.alive() == 0


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_operation_waits_for_the_device(weights: str, top_k: int | None) -> None:
    """Nothing reads a number back or makes a shape out of values."""
    config = objective(weights, top_k=top_k, temperature=2.0, chunk_tokens=4)
    student, counted = head(), torch.arange(0, TOKENS, 2)
    with Memory() as memory:
        terms = token_terms(student, teacher_head(), targets(), config, counted)
        gradients(terms["total"], student)
    assert "mm" in memory.names and not memory.names & {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "is_nonzero",
        "equal",
    }


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm_", "addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("weights", "models"), [("distillation", 2), ("cross-entropy", 1), ("both", 2)]
)
def test_every_chunk_makes_each_product_once(weights: str, models: int) -> None:
    """Student's logits, teacher's logits if it is wanted, and one product for either gradient."""
    student, teacher = head(dtype=torch.float32), teacher_head(torch.float32)
    config, chunks = objective(weights, chunk_tokens=10), 3
    with Products() as training:
        total = token_terms(student, teacher, targets(), config)["total"]
        gradients(total, student)
    with Products() as looking, torch.no_grad():
        token_terms(student, teacher, targets(), config)
    assert training.count == (models + 2) * chunks
    assert looking.count == models * chunks
