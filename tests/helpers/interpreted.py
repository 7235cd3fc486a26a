"""The parent on the real Triton kernels of mamba_ssm, interpreted on a CPU, beside our own scan.

A program of its own, which test_mamba_kernels.py starts: triton reads TRITON_INTERPRET when it is
imported, and a process that can import mamba_ssm has transformers call GPU kernels. The argument is
`fused`, with plain twins of causal_conv1d, or `pieces`, without. Prints, as one line of JSON, for
every case how far logits and the gradient of each tensor are from the plain path, as shares of
their largest value, and which kernels the Mamba layer ran.
"""

import contextlib
import json
import math
import sys
import types
from dataclasses import replace

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
    return F.silu(torch.einsum("bctw,cw->bct", windows, weight) + bias[:, None])


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


def main(path: str) -> None:
    kernels = load_kernels()
    # What follows imports transformers, which looks for mamba_ssm: it must be loadable by now.
    from helpers.strategies import (
        difference,
        gradient_differences,
        gradients,
        probe,
        random_parent,
        random_tokens,
        tiny_shape,
    )

    import elastic.parent.ssd
    from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
    from elastic.parent import Keep, LayerKeep
    from elastic.routing.masks import hard_keep

    elastic.parent.ssd.MAMBA_SSM_CHUNK = CHUNK
    kernels.causal_conv1d_fwd_function = conv1d if path == "fused" else None
    kernels.causal_conv1d_bwd_function = conv1d_backward if path == "fused" else None
    ran: list[str] = []

    def noting(name: str) -> None:
        function = getattr(kernels, name)
        setattr(kernels, name, lambda *a, **k: (ran.append(name), function(*a, **k))[1])

    noting("mamba_split_conv1d_scan_combined")
    noting("mamba_chunk_scan_combined")

    # Limits of the step size that often bind, an eps that weighs, two groups of two heads.
    shape = tiny_shape(
        pattern="-M*",
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        time_step_limit=[0.3, 0.6],
        norm_eps=0.05,
    )
    no_bias = replace(shape, conv_bias=False)
    mlp, attention = MLPLayer(0, 9), AttentionLayer(2, 4)
    member = Architecture(8, (mlp, MambaLayer(1, 2, 4), attention))
    odd = Architecture(8, (mlp, MambaLayer(1, 2, 5), attention))  # 10 + 32 channels
    heads = torch.tensor([[1.0, 0.6, 1.0, 0.6]])
    soft = Keep(None, (LayerKeep(), LayerKeep(torch.tensor([0.8]), heads), LayerKeep()))
    borders = torch.zeros(2, 2 * CHUNK + 5, dtype=torch.int32)  # three chunks, the last one short
    borders[0, 5:] += 1  # inside the first chunk; the document reaches into the third
    borders[0, -1:] += 1  # one step long
    borders[1, CHUNK:] += 1  # between two chunks
    one = torch.zeros(1, CHUNK + 4, dtype=torch.int32)  # only its shape is used
    cases = {
        "fused": {
            "whole": (shape, None, one),
            "sliced": (no_bias, member, one),
            "masked": (shape, hard_keep(shape, member), one),
            "documents": (shape, None, borders),
            "odd": (shape, odd, one),
        },
        "pieces": {
            "whole": (shape, None, one),
            "sliced": (shape, member, one),
            "masked": (shape, hard_keep(shape, member), one),
            "documents": (shape, None, borders[:1]),
            "soft": (shape, soft, one),
        },
    }
    results = {}
    for name, (sizes, run, documents) in cases[path].items():
        tokens, logits, found = random_tokens(sizes, *documents.shape), {}, {}
        ran.clear()
        for choice in ("torch", "mamba_ssm"):
            parent = random_parent(sizes, kernels=choice)
            logits[choice] = parent.logits(tokens, run, None if documents is one else documents)
            found[choice] = gradients(parent, probe(logits[choice]))
        results[name] = {
            "logits": difference(logits["mamba_ssm"], logits["torch"]),
            "gradients": gradient_differences(found["mamba_ssm"], found["torch"]),
            "kernels": ran.copy(),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
