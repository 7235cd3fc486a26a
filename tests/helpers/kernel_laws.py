"""Laws 1, 6 and 9 on the Triton kernels of mamba_ssm: what is computed twice, and compared.

Differences are shares of the largest logit and of each tensor's largest gradient. mamba_program.py
runs the cases in a process of its own, on a GPU or under Triton's interpreter on a CPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from helpers.documents import separately
from helpers.strategies import (
    TOLERANCE,
    difference,
    gradient_differences,
    gradients,
    probe,
    random_parent,
    random_tokens,
    stock_member,
    tiny_shape,
    with_own_norms,
)
from torch import Tensor

from elastic.config import ParentShape
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.parent import HybridParent, Keep, LayerKeep, Member
from elastic.routing.masks import hard_keep

FUSED, PIECES = "mamba_split_conv1d_scan_combined", "mamba_chunk_scan_combined"

CASES = {
    "fused": {
        "whole": FUSED,
        "sliced": FUSED,
        "masked": FUSED,
        "documents": FUSED,
        "own sliced": FUSED,
        "own masked": FUSED,
        "odd": PIECES,  # channels that causal_conv1d does not take
        "law 1": FUSED,
        "law 1 own": FUSED,
        "law 1 stock": FUSED,
        "law 9": FUSED,
    },
    "pieces": {
        "whole": PIECES,
        "sliced": PIECES,
        "masked": PIECES,
        "documents": PIECES,
        "soft": PIECES,
        "law 1 own": PIECES,
        "law 9": PIECES,
    },
}
"""Path -> case -> the kernel that must run, and no other."""

PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "autocast")}
"""Device -> everything in float32; weights in bfloat16 too; weights in float32 under autocast to
bfloat16, which the kernels take part in on a GPU alone."""


def faults(result: dict, precision: str, kernel: str, device: str) -> list[str]:
    """What of a case's result is more than rounding, by the table of tolerances."""
    if "error" in result:
        return [result["error"]]
    limit = TOLERANCE[torch.float32 if precision == "float32" else torch.bfloat16]
    if precision == "float32" and device == "cpu":
        limit /= 10  # interpreted code adds up in the order of ours
    # Gradients as in assert_gradients_near; in bfloat16 their terms are rounded one by one.
    of_gradients = limit * (10 if precision == "float32" else 4)
    found = [] if set(result["kernels"]) == {kernel} else [f"ran {result['kernels']}"]
    if not result["logits"] <= limit:
        found.append(f"logits off by {result['logits']:.2e}")
    for name, share in result["gradients"].items():
        if not share <= of_gradients:
            found.append(f"gradient of {name} off by {share:.2e}")
    return found


Outputs = tuple[Tensor, dict[str, Tensor]]
"""Logits, and the gradient of every tensor."""

Off = tuple[float, dict[str, float]]
"""Their differences."""


def cases(chunk: int, device: str) -> dict[str, Callable[[str], Off]]:
    """Case -> what computes its differences in a precision."""
    # Limits of the step size that often bind, an eps that weighs, two groups of two heads.
    sizes = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8}
    if device == "cuda":  # of the published models, but for the number of heads
        sizes = {"mamba_num_heads": 4, "mamba_head_dim": 80, "ssm_state_size": 128}
    shape = tiny_shape(pattern="-M*", time_step_limit=[0.3, 0.6], norm_eps=0.05, **sizes)
    half = sizes["mamba_head_dim"] // 2
    no_bias, stock = replace(shape, conv_bias=False), replace(shape, time_step_limit=None)
    mlp, attention = MLPLayer(0, 9), AttentionLayer(2, 4)
    member = Architecture(8, (mlp, MambaLayer(1, 2, half), attention))
    odd = Architecture(8, (mlp, MambaLayer(1, 2, half + 1), attention))
    heads = torch.tensor([[1.0, 0.6, 1.0, 0.6]], device=device)
    width = torch.tensor([0.8], device=device)
    soft = Keep(None, (LayerKeep(), LayerKeep(width, heads), LayerKeep()))
    with torch.device(device):
        keep = hard_keep(shape, member)
    borders = torch.zeros(2, 2 * chunk + 5, dtype=torch.int32)  # three chunks, the last one short
    borders[0, 5:] += 1  # inside the first chunk; the document reaches into the third
    borders[0, -1:] += 1  # one step long
    borders[1, chunk:] += 1  # between two chunks
    short = torch.zeros(1, chunk + 4, dtype=torch.int32)
    short[0, 5:] += 1
    short[0, 8:] += 1
    long = Subject(shape, (1, chunk + 4), device)
    own = replace(long, own=1)
    packed = Subject(shape, (2, 2 * chunk + 5), device, documents=borders)
    return {
        "whole": lambda p: law_6(long, None, p),
        "sliced": lambda p: law_6(replace(long, shape=no_bias), member, p),
        "masked": lambda p: law_6(long, keep, p),
        "documents": lambda p: law_6(packed, None, p),
        "own sliced": lambda p: law_6(own, member, p),
        "own masked": lambda p: law_6(own, keep, p),
        "odd": lambda p: law_6(long, odd, p),
        "soft": lambda p: law_6(long, soft, p),
        "law 1": lambda p: law_1(long, member, keep, p),
        "law 1 own": lambda p: law_1(own, member, keep, p),
        "law 1 stock": lambda p: stock_law_1(replace(long, shape=stock), member, p),
        "law 9": lambda p: law_9(replace(long, documents=short), member, p),
    }


@dataclass(frozen=True)
class Subject:
    """A random parent and text for it; `own` is the budget whose own norms count."""

    shape: ParentShape
    size: tuple[int, int]
    device: str
    own: int | None = None
    documents: Tensor | None = None

    def parent(self, kernels: str, precision: str) -> HybridParent:
        """In float32 of the same values where the precision is not that of the weights."""
        make = random_parent if self.own is None else with_own_norms
        made = make(self.shape, kernels=kernels)
        if precision == "bfloat16":
            made = made.bfloat16()
        return made.to(self.device)

    @property
    def tokens(self) -> Tensor:
        return random_tokens(self.shape, *self.size).to(self.device)

    def run(
        self, parent: HybridParent, member: Member, precision: str, separate: bool = False
    ) -> Outputs:
        """Logits and the gradient of every tensor."""
        documents = None if self.documents is None else self.documents.to(self.device)
        with _autocast(self.device, precision):
            if separate:
                logits = separately(parent, self.tokens, member, documents, self.own)
            else:
                logits = parent.logits(self.tokens, member, documents, self.own)
        found = gradients(parent, probe(logits))
        return logits.detach(), {name: gradient.float() for name, gradient in found.items()}


def _autocast(device: str, precision: str) -> AbstractContextManager:
    if precision == "autocast":
        return torch.autocast(device, torch.bfloat16)
    return nullcontext()


def _off(actual: Outputs, expected: Outputs) -> Off:
    return difference(actual[0], expected[0]), gradient_differences(actual[1], expected[1])


def law_6(subject: Subject, member: Member, precision: str) -> Off:
    """Kernels against our scan in float32 of the same weights."""
    ours = subject.parent("torch", precision).float()
    parent = subject.parent("mamba_ssm", precision)
    return _off(subject.run(parent, member, precision), subject.run(ours, member, "float32"))


def law_1(subject: Subject, member: Architecture, keep: Keep, precision: str) -> Off:
    """Sliced and masked, both on the kernels."""
    parent = subject.parent("mamba_ssm", precision)
    sliced = subject.run(parent, member, precision)
    return _off(subject.run(parent, keep, precision), sliced)


def stock_law_1(subject: Subject, member: Architecture, precision: str) -> Off:
    """Sliced on the kernels, and stock transformers in float32 with the cut weights."""
    parent = subject.parent("mamba_ssm", precision)
    stock = stock_member(subject.parent("torch", precision).cpu().float(), member)
    sliced, _ = subject.run(parent, member, precision)
    with torch.no_grad():
        expected = stock.to(subject.device)(subject.tokens).logits
    return difference(sliced, expected.float()), {}


def law_9(subject: Subject, member: Architecture, precision: str) -> Off:
    """Documents packed, and each in a call of its own."""
    parent = subject.parent("mamba_ssm", precision)
    alone = subject.run(parent, member, precision, separate=True)
    return _off(subject.run(parent, member, precision), alone)
