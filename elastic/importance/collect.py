"""Forward passes over calibration text: statistics of every width axis, errors of every layer."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic.config import ImportanceConfig
from elastic.console import Bar
from elastic.importance.basis import GatedStatistic, StreamStatistic, stream_norms
from elastic.importance.score import normalised_error
from elastic.members.architecture import Architecture, droppable_layers
from elastic.parent import HybridParent

log = logging.getLogger(__name__)

Calibration = Tensor
"""Calibration tokens: (samples, t) int64."""


class _Statistic:
    """Sum over tokens of absolute activations, or the L2 norm over sequences of their mean."""

    def __init__(self, aggregation: str) -> None:
        self.aggregation = aggregation
        self.total: Tensor | None = None

    def add(self, activations: Tensor) -> None:
        """(b, t, ...): one batch."""
        values = activations.detach().abs().double()
        if self.aggregation == "sum":
            batch = values.sum(dim=(0, 1))
        else:
            batch = values.mean(dim=1).square().sum(dim=0)
        self.total = batch if self.total is None else self.total + batch

    @property
    def value(self) -> Tensor:
        assert self.total is not None, "no batch was seen"
        total = self.total if self.aggregation == "sum" else self.total.sqrt()
        return total.float().cpu()


def _heads_of(statistic: _Statistic, heads: int, part: slice) -> Callable[[Tensor], None]:
    """Add `part` of the last dimension to a statistic, as (..., heads, units per head)."""
    return lambda values: statistic.add(values[..., part].unflatten(-1, (heads, -1)))


@dataclass(frozen=True)
class Statistics:
    """What forward passes over calibration text leave."""

    scores: dict[str, Tensor]
    """`hidden` (d,) over the outputs of all norms, and per layer `layer.<index>`: (f,) for an MLP,
    (h, p) for Mamba's x projection, (q, head_dim) for the input of attention's output matrix."""
    covariances: dict[str, Tensor]
    """Norm of the stream by its stored name -> (d, d) float64, of its normalised inputs; (d,), the
    diagonal, where the stream is only sorted."""
    gated: dict[str, Tensor]
    """Gated norm by its stored name -> (units,), shares of energy within each group."""


@contextmanager
def _observing(
    parent: HybridParent, config: ImportanceConfig
) -> Iterator[tuple[dict[str, _Statistic], dict[str, StreamStatistic], dict[str, GatedStatistic]]]:
    """Hooks that add to the statistics while the block runs."""
    shape = parent.shape
    statistics = {"hidden": _Statistic(config.aggregation)}
    rotates = config.rotates(shape.tied_head)
    norms: list[Any] = [*(block.norm for block in parent.backbone.layers), parent.backbone.norm_f]
    streams = {
        name: StreamStatistic(norm, rotates)
        for name, norm in zip(stream_norms(shape), norms, strict=True)
    }
    gated: dict[str, GatedStatistic] = {}
    hooks = []

    def output_of(module: nn.Module, use: Callable[[Tensor], None]) -> None:
        hooks.append(module.register_forward_hook(lambda _m, _i, output: use(output)))

    def input_of(module: nn.Module, use: Callable[[Tensor], None]) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _m, inputs: use(inputs[0])))

    for norm, stream in zip(norms, streams.values(), strict=True):
        input_of(norm, stream.add)
    output_of(parent.backbone.norm_f, statistics["hidden"].add)
    block: Any  # nn.Module attributes have no types
    for index, block in enumerate(parent.backbone.layers):
        output_of(block.norm, statistics["hidden"].add)
        statistic = statistics[f"layer.{index}"] = _Statistic(config.aggregation)
        mixer = block.mixer
        if block.kind == "mlp" and config.ffn_score == "post_activation":
            input_of(mixer.down_proj, statistic.add)
        elif block.kind == "mlp":
            output_of(mixer.up_proj, statistic.add)
        elif block.kind == "attention":
            input_of(mixer.o_proj, _heads_of(statistic, shape.num_attention_heads, slice(None)))
        else:  # the x rows of in_proj follow those of z
            inner = shape.mamba_num_heads * shape.mamba_head_dim
            use = _heads_of(statistic, shape.mamba_num_heads, slice(inner, 2 * inner))
            output_of(mixer.in_proj, use)
            own = gated[f"backbone.layers.{index}.mixer.norm.weight"] = GatedStatistic(
                shape.n_groups
            )
            mixer.observe = own.add
    try:
        yield statistics, streams, gated
    finally:
        for hook in hooks:
            hook.remove()
        for block in parent.backbone.layers:
            if block.kind == "mamba":
                block.mixer.observe = None


@torch.no_grad()
def collect(parent: HybridParent, calibration: Calibration, config: ImportanceConfig) -> Statistics:
    """Statistics of every width axis (arXiv 2511.16664, section 3.1) and of every norm's inputs, by
    forward passes alone."""
    with _observing(parent, config) as (scores, streams, gated):
        for batch in _progress(calibration[: config.samples].split(config.batch_size), "width"):
            parent(batch)
    found = Statistics(
        {name: statistic.value for name, statistic in scores.items()},
        {name: statistic.value for name, statistic in streams.items()},
        {name: statistic.value for name, statistic in gated.items()},
    )
    for name in sorted(found.scores, key="hidden".__eq__):  # last: a layer says more
        _require_finite(found.scores[name], f"scores of {name.replace('layer.', 'layer ')}")
    for name, values in (*found.covariances.items(), *found.gated.items()):
        _require_finite(values, f"energies before {name}")
    return found


def _require_finite(values: Tensor, what: str) -> None:
    """Weights are finite when they are read: these have overflowed, and NaN would sort anywhere.

    Raises:
        ValueError: one is not finite.
    """
    if not torch.isfinite(values).all():
        raise ValueError(
            f"importance: {what} are not finite on the calibration text, though the weights are; "
            "activations overflow, and the parent cannot be ranked: use another one"
        )


@torch.no_grad()
def rank_layers(
    parent: HybridParent,
    calibration: Calibration,
    config: ImportanceConfig,
    count: int,
    generator: torch.Generator,
) -> tuple[list[int], list[dict[int, float]]]:
    """Layers to bypass, least important first, by the normalised MSE of the logits.

    `iterative` bypasses each remaining layer on trial, drops the one that changes the original
    logits least, and repeats on the reduced model; `one_pass` ranks all by their first trial. The
    logits are compared at random positions, the same for every trial.

    Returns `count` layer indices, and the error of every trial per round.

    Raises:
        ConfigError: fewer than `count` layers may be dropped.
    """
    full = Architecture.full(parent.shape)
    kinds = parent.shape.kinds
    candidates = droppable_layers(parent.shape, config.drop_attention, config.drop_ends, count)
    tokens = calibration[: config.depth_samples]
    time_steps = tokens.shape[1]
    positions = min(config.depth_positions, time_steps)
    chosen = torch.stack(
        [torch.randperm(time_steps, generator=generator)[:positions] for _ in tokens]
    ).to(tokens.device)  # (samples, positions)

    def logits(member: Architecture | None) -> Tensor:
        parts = []
        pairs = zip(tokens.split(config.batch_size), chosen.split(config.batch_size), strict=True)
        for batch, places in pairs:
            hidden = parent(batch, member)  # (b, t, d)
            picked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            parts.append((picked @ parent.head_weight().T).float().cpu())
        return torch.cat(parts)

    reference = logits(None)
    _require_finite(reference, "logits")
    order: list[int] = []
    rounds: list[dict[int, float]] = []
    trials = (
        len(candidates)
        if config.depth_method == "one_pass"
        else sum(len(candidates) - i for i in range(count))
    )
    bar = Bar(total=trials if count else 0, desc="rank depth", disable=not sys.stderr.isatty())
    while len(order) < count:
        start = time.monotonic()
        errors = {}
        for layer in candidates:
            if layer not in order:
                reduced = logits(full.without({*order, layer}))
                _require_finite(reduced, f"logits without {kinds[layer]} layer {layer}")
                errors[layer] = normalised_error(reference, reduced)
                bar.update()
        rounds.append(errors)
        ranked = sorted(errors, key=lambda layer: (errors[layer], layer))
        order.extend(ranked[:count] if config.depth_method == "one_pass" else ranked[:1])
        log.info(
            "depth ranking: %d of %d layers, next is %s %d (error %.4f), %.1f s",
            len(order),
            count,
            kinds[ranked[0]],
            ranked[0],
            errors[ranked[0]],
            time.monotonic() - start,
        )
    bar.close()
    return order, rounds


def _progress(batches: tuple[Tensor, ...], what: str) -> Iterator[Tensor]:
    """Batches under a progress bar with an ETA."""
    yield from Bar(batches, desc=f"rank {what}", disable=not sys.stderr.isatty())
