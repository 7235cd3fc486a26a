"""Nemotron-H's Mamba-2 mixer of transformers with the step sizes that are published.

Stock clamps a step at `time_step_min` where a whole sequence is read, knows no upper limit, clamps
nothing where one token follows a cache, and computes softplus in the type of the activations.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.nemotron_h import modeling_nemotron_h as stock


class PublishedMamba2Mixer(stock.NemotronHMamba2Mixer):
    """Every step is softplus(dt + dt_bias) in float32, within the configuration's
    `time_step_limit`: in the scan, in its kernels, and in one step of decoding."""

    @classmethod
    def adopt(cls, mixer: stock.NemotronHMamba2Mixer) -> None:
        """Make a stock mixer one of these: it has the same weights and draws no others."""
        mixer.__class__ = cls
        low, high = mixer.config.time_step_limit
        mixer.time_step_limit = (float(low), float(high))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As stock's."""
        out: Tensor = _forward(self.time_step_limit)(self, *args, **kwargs)
        return out


def adopt_mixers(model: nn.Module) -> None:
    """Let every stock Mamba layer of a model compute the published step sizes."""
    for module in model.modules():
        if isinstance(module, stock.NemotronHMamba2Mixer):
            PublishedMamba2Mixer.adopt(module)


def chunk_scan(hidden_states: Tensor, dt: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stock's scan of a sequence, which honours a limit; dt (b, t, h) in float32."""
    return stock.mamba2_chunk_scan(hidden_states, dt.float(), *args, **kwargs)


def state_update(
    limit: tuple[float, float],
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    *args: Any,
    dt_bias: Tensor,
    dt_softplus: bool,
    **kwargs: Any,
) -> Tensor:
    """Stock's step of decoding, with a step size that is ready: dt and dt_bias (b, h, p) and (h, p)
    are the same for all p, and the kernel wants to see that in their strides."""
    assert dt_softplus
    ready = F.softplus(dt[..., :1].float() + dt_bias[..., :1].float()).clamp(*limit)
    out: Tensor = stock.mamba2_selective_state_update(
        state, hidden_states, ready.expand(dt.shape), *args, **kwargs
    )
    return out


@cache
def _forward(limit: tuple[float, float]) -> Callable[..., Tensor]:
    """Stock's forward, calling the two functions above in place of its own.

    It has no argument for either, and keeps its caches in ways that differ between releases: so it
    is taken as it is, with other global names. All but those two are looked up when they are
    called, since whoever replaces a kernel replaces it there.
    """
    forward = inspect.unwrap(stock.NemotronHMamba2Mixer.forward)
    own: dict[str, Callable[..., Any]] = {
        "mamba2_chunk_scan": chunk_scan,
        "mamba2_selective_state_update": lambda *args, **kwargs: state_update(
            limit, *args, **kwargs
        ),
    }
    names = set(forward.__code__.co_names)
    assert own.keys() <= names, "transformers has renamed the scans of Nemotron-H"
    live = {name: _live(name) for name in names if inspect.isfunction(vars(stock).get(name))}
    made = FunctionType(
        forward.__code__, {**vars(stock), **live, **own}, "forward", forward.__defaults__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    hooked: Callable[..., Tensor] = force_accelerate_hooks("conv1d")(made)
    return hooked


def _live(name: str) -> Callable[..., Any]:
    """What the module calls so at the time of the call."""
    return lambda *args, **kwargs: getattr(stock, name)(*args, **kwargs)
