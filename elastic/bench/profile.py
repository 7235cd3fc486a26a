"""bench profile: where the time of one training step goes, and how near it comes to the machine's
own rate of multiplying matrices."""

import math
import statistics
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from elastic.bench.measure import Work, interleave, synchronise
from elastic.bench.result import Figures, Result, table
from elastic.bench.subjects import (
    TrainingStep,
    balanced_members,
    random_parent,
    random_tokens,
    shape_of,
)
from elastic.config import ProfileBenchConfig
from elastic.members.architecture import Architecture

GROUPS = {
    "matmul": "mm bmm addmm addmm_ baddbmm baddbmm_ mv dot",
    "attention": "_scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_for_cpu_backward _flash_attention_forward "
    "_flash_attention_backward _efficient_attention_forward _efficient_attention_backward "
    "_cudnn_attention_forward _cudnn_attention_backward",
    "convolution": "convolution_backward mkldnn_convolution cudnn_convolution _conv_depthwise2d",
    "reduction": "sum mean amax amin cumsum linalg_vector_norm _foreach_norm logsumexp any all",
    "softmax": "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data",
    "copying": "copy_ clone cat stack constant_pad_nd flip",
    "filling": "zero_ fill_ masked_fill_ empty empty_like empty_strided new_empty",
    "indexing": "index_select embedding_dense_backward index index_add_ _index_put_impl_ gather "
    "scatter_ scatter_add_ triu tril triu_ tril_ topk",
    "optimizer": "_fused_adamw_ _foreach_mul_ _foreach_add_",
}
"""Kind of op by its name in aten; every other op works element by element."""

_KIND = {f"aten::{name}": kind for kind, names in GROUPS.items() for name in names.split()}

_VIEWS = frozenset(
    "aten::" + name
    for name in "view _unsafe_view reshape transpose t permute unflatten flatten expand expand_as "
    "unsqueeze squeeze slice select narrow split split_with_sizes as_strided detach detach_ alias "
    "chunk view_as _reshape_alias unbind to _to_copy item _local_scalar_dense resolve_conj "
    "resolve_neg resize_ linear matmul conv1d convolution _convolution softmax log_softmax pad "
    "embedding embedding_backward contiguous zeros zeros_like ones ones_like full full_like "
    "scaled_dot_product_attention einsum".split()
)
"""What moves no data itself: views, and ops made of others."""


def measure(config: ProfileBenchConfig, device: torch.device) -> Result:
    """Seconds and products of a step, the machine's rate beside it, then a profile of the step."""
    shape = shape_of(config.parent)
    member: Architecture | None = None
    if config.share < 1:
        (choice,) = balanced_members(config.space, shape, [config.share]).values()
        member = choice.architecture
    parent = random_parent(config.parent, config.seed, device)
    batch = random_tokens(shape.vocab_size, config.sequences, config.sequence_length, config.seed)
    step = TrainingStep(parent, batch, config.chunk_tokens, config.precision, config.teacher)
    work = partial(step, member)
    works: dict[str, Work] = {"step": work, "square": _square(config, device)}
    times = interleave(works, config.repeats, config.warmup, "profile", device)
    flops = matmul_flops(work)
    achieved = flops / times.median("step") / 1e9
    machine = 2 * config.square**3 / times.median("square") / 1e9
    groups, ops = _profile(work, config.repeats, device)
    total = sum(groups.values())
    share = {kind: seconds / total for kind, seconds in _descending(groups)}
    multiplying = flops / groups["matmul"] / 1e9
    largest = {name: seconds / total for name, seconds in _descending(ops)[:12]}
    tokens = config.sequences * config.sequence_length
    figures: Figures = {
        "share": share,
        "ops": largest,
        "seconds": times.median("step"),
        "tokens_per_second": tokens / times.median("step"),
        "achieved_gflops": achieved,
        "machine_gflops": machine,
        "achieved_over_machine": achieved / machine,
        "matmul_over_machine": multiplying / machine,
        "profiled_over_plain": total / times.median("step"),
    }
    milliseconds = 1000 * times.median("step")
    lines: list[list[str | float | None]] = [
        [name, 100 * part, milliseconds * part]
        for name, part in [*share.items(), *((f"  {name}", part) for name, part in largest.items())]
    ]
    summary = (
        f"{milliseconds:,.0f} ms per step, {tokens / times.median('step'):,.0f} tokens/s. GFLOP/s "
        f"of matrix products: {achieved:,.1f} over the whole step, {multiplying:,.1f} while it "
        f"multiplies; {machine:,.1f} is the machine's rate."
    )
    return Result(figures, table(("kind of op", "%", "ms"), lines) + "\n" + summary)


def _square(config: ProfileBenchConfig, device: torch.device) -> Work:
    """The product of two large square matrices: the best that this machine can do."""
    dtype = torch.float32 if config.precision == "32-true" else torch.bfloat16
    a, b = torch.randn(2, config.square, config.square, device=device).to(dtype)
    return lambda: a @ b


def matmul_flops(work: Work) -> int:
    """Floating-point operations in the matrix products of a piece of work, backward pass
    included."""
    aten: Any = torch.ops.aten
    in_place = dict.fromkeys((aten.addmm_, aten.baddbmm_), _added)  # torch does not know these
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    counts = counter.get_flop_counts().get("Global", {})
    products = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, *in_place)
    return sum(int(counts.get(product, 0)) for product in products)


def _added(_: torch.Size, a: torch.Size, b: torch.Size, **rest: Any) -> int:
    """Of a product (..., m, k) x (k, n) that is added to something."""
    return 2 * math.prod(a) * b[-1]


def _profile(
    work: Work, repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per step by kind of op and by op, each op without those that it calls.

    What is left of the wall clock is `between_ops`: Python, dispatch and autograd.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        times = interleave({"profiled": work}, repeats, 0, "profile", device)
        synchronise(device)
    groups: dict[str, float] = defaultdict(float)
    ops: dict[str, float] = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds = microseconds / 1e6 / repeats
        is_op = event.key.startswith("aten::") and event.key not in _VIEWS
        if event.device_type != DeviceType.CPU or not (is_op or on_gpu):
            continue  # a kernel counts for the op that launched it
        if seconds > 0:
            groups[_KIND.get(event.key, "elementwise") if is_op else "other_kernels"] += seconds
            ops[event.key] = seconds
    wall = statistics.fmean(times.seconds["profiled"])
    groups["between_ops"] = max(wall - sum(groups.values()), 0.0)
    return dict(groups), ops


def _descending(values: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda item: -item[1])
