"""Forward passes over calibration text: statistics of every width axis, and of every norm's inputs.

Each process passes its part of the text; then all sums are added up.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic.cluster.place import ALONE, Place, add_up
from elastic.config import ImportanceConfig
from elastic.console import Bar
from elastic.data import Batch
from elastic.importance.basis import GatedStatistic, StreamStatistic, stream_norms
from elastic.importance.passes import enter, products, require_finite, through
from elastic.parent import HybridParent


class _Statistic:
    """Sum over tokens of absolute activations, or the L2 norm over sequences of their mean."""

    def __init__(self, aggregation: str, size: tuple[int, ...], device: torch.device) -> None:
        self.aggregation = aggregation
        self.total = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, activations: Tensor) -> None:
        """(b, t, ...): one batch."""
        values = activations.detach().abs().double()
        if self.aggregation == "sum":
            self.total += values.sum(dim=(0, 1))
        else:
            self.total += values.mean(dim=1).square().sum(dim=0)

    def share(self) -> None:
        """Have what all processes have seen."""
        add_up(self.total)

    @property
    def value(self) -> Tensor:
        total = self.total if self.aggregation == "sum" else self.total.sqrt()
        return total.float().cpu()


def _heads_of(statistic: _Statistic, heads: int, part: slice) -> Callable[[Tensor], None]:
    """Add `part` of the last dimension to a statistic, as (..., heads, units per head)."""
    return lambda values: statistic.add(values[..., part].unflatten(-1, (heads, -1)))


def _without_autocast(use: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """What is measured is not rounded again: a covariance is a product."""

    def used(values: Tensor) -> None:
        with torch.autocast(values.device.type, enabled=False):
            use(values)

    return used


@dataclass(frozen=True)
class Statistics:
    """What forward passes over calibration text leave."""

    scores: dict[str, Tensor]
    """`hidden` (d,) over the outputs of all norms, and per layer `layer.<index>`: (f,) for an MLP,
    (h, p) for Mamba's x projection, (q, head_dim) for the input of attention's output matrix."""
    covariances: dict[str, Tensor]
    """Norm of the stream by its stored name -> (d, d) float64, of its normalised inputs; (d,), the
    diagonal, where the stream is only sorted. Of every n-th norm alone, n processes; where they
    were measured."""
    gated: dict[str, Tensor]
    """Gated norm by its stored name -> (units,), shares of energy within each group."""


@contextmanager
def _observing(
    parent: HybridParent, config: ImportanceConfig
) -> Iterator[tuple[dict[str, _Statistic], dict[str, StreamStatistic], dict[str, GatedStatistic]]]:
    """Hooks that add to the statistics while the block runs."""
    shape, device = parent.shape, parent.lm_head.weight.device

    def statistic_of(*size: int) -> _Statistic:
        return _Statistic(config.aggregation, size, device)

    statistics = {"hidden": statistic_of(shape.hidden_size)}
    rotates = config.rotates(shape.tied_head)
    norms: list[Any] = [*(block.norm for block in parent.backbone.layers), parent.backbone.norm_f]
    streams = {
        name: StreamStatistic(norm, rotates)
        for name, norm in zip(stream_norms(shape), norms, strict=True)
    }
    gated: dict[str, GatedStatistic] = {}
    hooks = []

    def output_of(module: nn.Module, use: Callable[[Tensor], None]) -> None:
        use = _without_autocast(use)
        hooks.append(module.register_forward_hook(lambda _m, _i, output: use(output)))

    def input_of(module: nn.Module, use: Callable[[Tensor], None]) -> None:
        use = _without_autocast(use)
        hooks.append(module.register_forward_pre_hook(lambda _m, inputs: use(inputs[0])))

    for norm, stream in zip(norms, streams.values(), strict=True):
        input_of(norm, stream.add)
    output_of(parent.backbone.norm_f, statistics["hidden"].add)
    block: Any  # nn.Module attributes have no types
    for index, block in enumerate(parent.backbone.layers):
        output_of(block.norm, statistics["hidden"].add)
        mixer, name = block.mixer, f"layer.{index}"
        if block.kind == "mlp":
            statistic = statistics[name] = statistic_of(shape.intermediate_size)
            if config.ffn_score == "post_activation":
                input_of(mixer.down_proj, statistic.add)
            else:
                output_of(mixer.up_proj, statistic.add)
        elif block.kind == "attention":
            heads = shape.num_attention_heads
            statistic = statistics[name] = statistic_of(heads, shape.head_dim)
            input_of(mixer.o_proj, _heads_of(statistic, heads, slice(None)))
        else:  # the x rows of in_proj follow those of z
            heads, inner = shape.mamba_num_heads, shape.mamba_num_heads * shape.mamba_head_dim
            statistic = statistics[name] = statistic_of(heads, shape.mamba_head_dim)
            output_of(mixer.in_proj, _heads_of(statistic, heads, slice(inner, 2 * inner)))
            own = GatedStatistic(mixer.norm, shape.n_groups)
            gated[f"backbone.layers.{index}.mixer.norm.weight"] = own
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
def collect(
    parent: HybridParent,
    calibration: Batch,
    config: ImportanceConfig,
    place: Place = ALONE,
) -> Statistics:
    """Statistics of every width axis (arXiv 2511.16664, section 3.1) and of every norm's inputs, by
    forward passes alone.

    Args:
        parent: where it is to run, as `passes.make_ready` leaves it.
        calibration: (samples, t), the same on every process.
        place: takes a part of it, and every n-th norm's covariance, n processes.

    Raises:
        ValueError: a statistic is not finite.
    """
    batches = calibration.first(config.samples).split(config.batch_size)
    of, rank, layers = place.world_size, place.rank, range(len(parent.shape.kinds))
    mine = batches[len(batches) * rank // of : len(batches) * (rank + 1) // of]
    with _observing(parent, config) as (scores, streams, gated), products(parent):
        for batch in Bar(mine, desc="rank width", disable=rank > 0 or not sys.stderr.isatty()):
            x = enter(parent, batch.inputs)
            parent.backbone.norm_f(through(parent, x, layers, batch.documents))
    for measured in (scores, streams, gated):
        for statistic in measured.values():
            statistic.share()
    energies = {name: statistic.value for name, statistic in (streams | gated).items()}
    found = {name: statistic.value for name, statistic in scores.items()}
    named = sorted(found, key="hidden".__eq__)  # last: a layer says more
    require_finite(
        place,
        [
            *((f"scores of {name.replace('layer.', 'layer ')}", found[name]) for name in named),
            *((f"energies before {name}", values) for name, values in energies.items()),
        ],
    )
    own = list(streams)[rank::of]
    return Statistics(
        found, {name: energies[name] for name in own}, {name: energies[name] for name in gated}
    )
