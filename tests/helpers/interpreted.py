"""The Triton kernels of mamba_ssm without a GPU: interpreted on a CPU, with plain convolutions.

For a process of its own (mamba_program.py): triton reads TRITON_INTERPRET when it is imported, and
a process that can import mamba_ssm has transformers call GPU kernels.
"""

import contextlib
import math
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # the real one is 256; what an interpreted kernel costs is the number of its chunks


def load_kernels() -> types.ModuleType:
    """mamba_ssm's combined scan, made to load and run without a GPU."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime.autotuner import Autotuner

    # Overflow of integers, which compiled kernels check in debug mode alone, is half of the time.
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    _compute_bfloat16()
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")  # Mamba 1
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
    one = types.SimpleNamespace(multi_processor_count=1)
    torch.cuda.get_device_properties = lambda *_: one  # type: ignore[assignment, misc]
    from mamba_ssm.ops.triton import ssd_combined

    for name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if name.startswith("mamba_ssm") else ():
            if isinstance(kernel, Autotuner):  # one configuration, nothing to time: the smallest
                kernel.configs = [min(kernel.configs, key=lambda c: math.prod(c.kwargs.values()))]
    return ssd_combined


def _compute_bfloat16() -> None:
    """The interpreter keeps bfloat16 as the integers of its bits, and would multiply those: have it
    compute in float32 and round, as a GPU does."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    dot, binary = Builder.create_dot, Builder.binary_op

    def widened(self: Builder, value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return value
        return self.cast_impl(value, tl.float32)

    def widened_dot(self: Builder, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(self, a), widened(self, b), *rest)

    def widened_binary(self: Builder, lhs: Any, rhs: Any, op: Any) -> Any:
        out = binary(self, widened(self, lhs), widened(self, rhs), op)
        return self.cast_impl(out, tl.bfloat16) if lhs.dtype.scalar == tl.bfloat16 else out

    Builder.create_dot, Builder.binary_op = widened_dot, widened_binary


# Plain twins of causal_conv1d, which has no CPU path; strict where the real functions are.


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """(b, channels, t), (channels, width), (channels,) -> (b, channels, t)."""
    width = weight.shape[1]
    assert weight.shape == (x.shape[1], width) and 2 <= width <= 4
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and x.stride(2) % 8 == 0, "channels last"
    assert bias is not None and initial_states is final_states_out is None and silu_activation
    windows = F.pad(x, (width - 1, 0)).unfold(2, width, 1)  # (b, channels, t, width)
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
        assert seq_idx.shape == (x.shape[0], x.shape[2]) and (seq_idx >= 0).all()
        of = F.pad(seq_idx, (width - 1, 0), value=-1).unfold(1, width, 1)  # (b, t, width)
        windows = windows * (of == seq_idx[..., None])[:, None]
    out = torch.einsum("bctw,cw->bct", windows.float(), weight.float()) + bias.float()[:, None]
    return F.silu(out).to(x.dtype)  # in float32 inside, whatever the types


def conv1d_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of x, written into `dx` too, of weight and of bias."""
    assert dfinal_states is None and not return_dinitial_states
    inputs = [value.detach().requires_grad_() for value in (x, weight, bias)]
    with torch.enable_grad():
        out = conv1d(*inputs, seq_idx, initial_states, None, silu_activation)
        gradients = torch.autograd.grad(out, inputs, dout)
    dx.copy_(gradients[0])
    return dx, gradients[1], gradients[2], None


def use_twins(kernels: types.ModuleType) -> None:
    """Have the fused kernel take the twins for causal_conv1d."""
    kernels.causal_conv1d_fwd_function = conv1d
    kernels.causal_conv1d_bwd_function = conv1d_backward
