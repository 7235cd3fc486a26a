"""Budget -> distribution over the choices of every axis (arXiv 2511.16664, section 3.3).

Each budget has one small network per axis, and shares no weight with another budget: a step that
draws one leaves the choices of all others where they are. Their logits, scaled and with Gumbel
noise, give a softmax whose temperature falls while training goes on. Nothing here is random by
itself: the noise comes from a generator that the caller seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from elastic.config import OptimConfig, RouterConfig
from elastic.members.architecture import WIDTH_AXIS, Space
from elastic.members.cost import LayerSize
from elastic.routing.masks import Distributions, constant, layer_gates

LEAK = 0.1
"""Slope of the leaky ReLU."""


@dataclass(frozen=True)
class Schedule:
    """Gumbel-softmax temperature and factor on what the networks say at one moment."""

    temperature: float
    scale: float


def schedule(config: RouterConfig, progress: float) -> Schedule:
    """Temperature falls geometrically, scale grows linearly; `progress` 0..1 is the way to the
    freeze."""
    progress = min(max(progress, 0.0), 1.0)
    ratio = config.temperature_end / config.temperature_start
    scale = config.scale_start + (config.scale_end - config.scale_start) * progress
    return Schedule(config.temperature_start * ratio**progress, scale)


class Router(nn.Module):
    """Two layers per budget and elastic axis. What they say is scaled; the head start of the
    full-size choice is added to that, so that it stays what it is while the scale grows.

    Args:
        budgets: how many budgets have a choice; the whole parent has none.
        goals: the most that one of them asks for.
    """

    multipliers: Tensor
    """(budgets, goals): prices of being above a goal; see `losses.router_terms`."""

    def __init__(
        self,
        space: Space,
        budgets: int,
        config: RouterConfig,
        generator: torch.Generator,
        goals: int = 1,
    ) -> None:
        super().__init__()
        self.space, self.head_start = space, config.full_bias
        self.register_buffer("multipliers", torch.zeros(budgets, goals), persistent=False)
        self.budgets = nn.ModuleList()
        for _ in range(budgets):
            axes = nn.ModuleDict()
            for axis in space.elastic_axes:
                outputs = space.decisions(axis) * len(space.choices[axis])
                axes[axis] = two_layers(config.hidden_units, outputs, generator)
            self.budgets.append(axes)

    def forward(self, budget: int, scale: float) -> dict[str, Tensor]:
        """Logits of a budget, axis -> (1, decisions, choices), in float32 whatever the precision
        around it; their softmax is how probable each choice is."""
        axes, logits = self.budgets[budget], {}
        assert isinstance(axes, nn.ModuleDict)
        with torch.autocast(self.multipliers.device.type, enabled=False):
            for axis, network in axes.items():
                said = network(self.multipliers.new_ones(1, 1))
                logits[axis] = scale * said.unflatten(-1, (self.space.decisions(axis), -1))
                logits[axis][..., 0] += self.head_start
        return logits

    @torch.no_grad()
    def log_probabilities(self, budget: int, scale: float) -> dict[str, np.ndarray]:
        """Noise-free log-probabilities per axis, (decisions, choices), for the decision."""
        return {
            axis: torch.log_softmax(values[0].double(), dim=-1).cpu().numpy()
            for axis, values in self(budget, scale).items()
        }


def two_layers(hidden_units: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """A network of the paper's form (arXiv 2511.16664, section 3.3) for one budget: what a layer
    makes of a one-hot budget is the column of that budget."""
    first, second = nn.Linear(1, hidden_units), nn.Linear(hidden_units, outputs)
    with torch.no_grad():
        for layer in (first, second):
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_(noise * 0.1)
            layer.bias.zero_()
    return nn.Sequential(first, nn.LeakyReLU(LEAK), second)


class RouterOptimizer:
    """AdamW on the routers, in float32 and alike on every process, whatever the strategy.

    They are a few thousand weights: outside the strategy nothing partitions or rounds them, and
    their steep gradients are clipped apart from the model's, which they must not shrink.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, router: nn.Module, config: OptimConfig) -> None:
        self.weights, self.clip = dict(router.named_parameters()), config.gradient_clip
        assert isinstance(router.multipliers, Tensor)
        self.multipliers = router.multipliers
        betas = (config.beta1, config.beta2)
        group = {"params": list(self.weights.values())}
        self.adam = torch.optim.AdamW(
            [group], betas=betas, eps=config.eps, weight_decay=0.0, fused=True
        )

    def step(self, rate: float) -> bool:
        """Step by the mean gradient of all processes; False if it is not finite: nothing moves.

        Nor does a budget that no pass of the step drew: its weights have no gradient.
        """
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        if not gradients:  # frozen, or nothing to choose
            return True
        if dist.is_initialized():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
                gradient.copy_(mean.view_as(gradient))
        finite = bool(clip_grad_norm_(self.weights.values(), self.clip).isfinite())
        if finite:
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
        self.forget()
        return finite

    def forget(self) -> None:
        """Drop the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Weights, multipliers, moments and steps by name, for a checkpoint."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors["multipliers"] = self.multipliers
        for name, weight in self.weights.items():
            for key in ("step", *self.MOMENTS):
                if weight in self.adam.state:
                    tensors[f"{key}.{name}"] = self.adam.state[weight][key]
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self.multipliers.copy_(tensors["multipliers"])
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            if f"step.{name}" in tensors:
                self.adam.state[weight] = {
                    key: tensors[f"{key}.{name}"].to(weight.device).clone()
                    for key in ("step", *self.MOMENTS)
                }


def sample(
    logits: Mapping[str, Tensor],
    temperature: float,
    generator: torch.Generator,
    hard_probability: float = 0.0,
) -> dict[str, Tensor]:
    """Gumbel-softmax of every axis; with `hard_probability` all axes are drawn hard instead.

    A hard draw is one-hot forward and has the soft gradient (straight-through). The noise is drawn
    on the CPU, so that every device and rank gets the same.
    """
    hard = bool(torch.rand((), generator=generator) < hard_probability)
    drawn = {}
    for axis, gumbel in _gumbel(logits, generator).items():
        values = logits[axis]
        soft = torch.softmax((values + gumbel) / temperature, dim=-1)
        if hard:
            one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
            soft = one_hot + soft - soft.detach()
        drawn[axis] = soft
    return drawn


def _gumbel(logits: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Gumbel noise for every axis, in one copy to the device that waits for nothing."""
    if not logits:
        return {}
    noise = []
    for values in logits.values():
        uniform = torch.rand(values.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
        noise.append(-torch.log(-torch.log(uniform)).flatten())
    flat, like = torch.cat(noise), next(iter(logits.values()))
    if like.is_cuda:
        flat = flat.pin_memory()
    parts = flat.to(like.device, non_blocking=True).to(like.dtype).split([n.numel() for n in noise])
    return {
        axis: part.view_as(values)
        for (axis, values), part in zip(logits.items(), parts, strict=True)
    }


def expected_sizes(
    space: Space, drop_order: Sequence[int], distributions: Distributions
) -> tuple[Tensor | float, list[LayerSize]]:
    """Expected hidden size and layers under independent choices: (b,) each, differentiable.

    Costs are linear in every axis on its own: `Measure.of` these sizes is the expected cost.
    """

    def expected(axis: str) -> Tensor | list[list[float]]:
        if axis not in distributions:
            return [[float(space.choices[axis][0])]]
        choices = tuple(space.choices[axis])
        return distributions[axis] @ constant(torch.tensor, (choices,), distributions[axis])

    sizes = {axis: expected(axis) for axis in space.choices if axis != "depth"}

    def at(axis: str, layer: int) -> Tensor | float:
        position = space.layers_of(axis).index(layer) if axis in space.heterogeneous else 0
        value = sizes[axis]
        return value[:, position] if isinstance(value, Tensor) else value[0][0]

    gates = None
    if "depth" in distributions:
        gates = layer_gates(distributions["depth"], space, drop_order)
    layers = [
        LayerSize(
            kind,
            width=at(WIDTH_AXIS[kind], index),
            channels=at("mamba_head_dim", index) if kind == "mamba" else 1,
            gate=1.0 if gates is None else gates[:, index],
        )
        for index, kind in enumerate(space.shape.kinds)
    ]
    hidden = sizes["hidden"]
    return hidden[:, 0] if isinstance(hidden, Tensor) else hidden[0][0], layers


def entropy(distributions: Distributions) -> Tensor:
    """Mean entropy of all decisions, as a share of its maximum: 1 undecided, 0 decided."""
    parts = [
        (-(p * p.clamp_min(1e-12).log()).sum(-1) / math.log(p.shape[-1])).flatten()
        for p in distributions.values()
    ]
    return torch.cat(parts).mean() if parts else torch.zeros(())
