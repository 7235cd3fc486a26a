"""config.json of Nemotron-H, of either era <-> sizes of a parent. No torch."""

import math
from pathlib import Path
from typing import Any

from elastic.config import ConfigError, ParentShape
from elastic.config.model import IDLE_HIGH, IDLE_LOW
from elastic.storage.foreign import read_object

SPELLINGS = {
    "linear_attention": "M",
    "mamba": "M",
    "mlp": "-",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
}
"""Both spellings of `layers_block_type`, by pattern letter."""

_ALIASES = {
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "use_conv_bias": ("mamba_conv_bias",),
    "time_step_limit": ("mamba_dt_limit",),
    "head_dim": ("attention_head_dim",),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
}
"""Older names of a field; those of Mamba win over the newer name in stock transformers too."""

_STALE = (
    "layers_block_type layer_types auto_map mtp_layers_block_type mtp_hybrid_override_pattern "
    "mamba_dt_min mamba_dt_max"
).split()
"""What a written config.json leaves out: other spellings of the same fields, remote code (never
run), and the kinds of layers for multi-token prediction, of which none are written."""

_NO_BIAS = {"use_bias": False, "mlp_bias": False, "mamba_proj_bias": False, "attention_bias": False}
"""Nemotron-H has none beside the convolution's; mlx-lm wants to be told."""


def read_config(directory: Path, model_types: tuple[str, ...] = ("nemotron_h",)) -> dict[str, Any]:
    """config.json of a Nemotron-H checkpoint; `ValueError` for another model."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; {directory} is not a Hugging Face checkpoint")
    config = read_object(path)
    if config.get("model_type") not in model_types:
        raise ValueError(
            f"{path}: model_type={config.get('model_type')} must be {' or '.join(model_types)}; "
            "other models cannot be a parent"
        )
    return config


def read_shape(config: dict[str, Any]) -> ParentShape:
    """Sizes of a Nemotron-H config.json, of either era.

    Raises:
        ValueError: a field is missing, or sets something that this parent does not compute.
    """
    fixed = {
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "sliding_window": None,
        **_NO_BIAS,
    }
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name}={_short(config[name])} must be {value}")
    _refuse_quantized(config)
    chunk = config.get("chunk_size", 128)
    if type(chunk) is not int or not 0 < chunk <= 1 << 16:
        raise ValueError(
            f"config.json: chunk_size={_short(chunk)} must be a whole number up to 65,536: tokens "
            "that a scan takes at a time"
        )
    pattern = _pattern(config)
    config = dict(config)
    for name, aliases in _ALIASES.items():
        newer_first = (name, *aliases) if name in ("head_dim", "layer_norm_epsilon") else aliases
        for alias in (*newer_first, name):
            if alias in config:
                config[name] = config[alias]
                break
    try:
        return ParentShape(
            pattern=pattern,
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            mamba_num_heads=config["mamba_num_heads"],
            mamba_head_dim=config["mamba_head_dim"],
            n_groups=config["n_groups"],
            ssm_state_size=config["ssm_state_size"],
            conv_kernel=config.get("conv_kernel", 4),
            conv_bias=config.get("use_conv_bias", True),
            tied_head=config.get("tie_word_embeddings", False),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
            time_step_limit=_limit(config.get("time_step_limit")),
            max_position_embeddings=config.get("max_position_embeddings", 4096),
        )
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]} is missing") from error
    except TypeError as error:
        raise ValueError(f"config.json: a size is not a number ({error})") from error
    except ConfigError as error:
        raise ValueError(f"config.json: {error}".replace("parent.shape.", "")) from error


def _refuse_quantized(config: dict[str, Any]) -> None:
    """Quantized weights come with scales, and some fill a config.json with the names of layers."""
    value = config.get("quantization_config")
    if value is None:
        return
    method = value.get("quant_method") if isinstance(value, dict) else value
    raise ValueError(
        f"config.json: quantization_config (quant_method={_short(method)}): quantized weights can "
        "neither be trained nor cut; use the bfloat16 checkpoint that they were made of"
    )


def _short(value: object, most: int = 60) -> str:
    """A value of somebody else's file, for a line."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _limit(value: Any) -> list[float] | None:
    """Bounds of the step size in any spelling: stock's save_pretrained writes infinity as
    {"__float__": "Infinity"}, others as a word, as null, or as the Infinity of Python's JSON."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"config.json: time_step_limit={_short(value)} must be two numbers")
    bounds = []
    for bound, unbounded in zip(value, (0.0, math.inf), strict=True):
        if isinstance(bound, dict):
            bound = bound.get("__float__", bound)
        try:
            bounds.append(unbounded if bound is None else float(bound))
        except (TypeError, ValueError):
            bounds.append(math.nan)
        if math.isnan(bounds[-1]):
            raise ValueError(f"config.json: time_step_limit={_short(value)} must be two numbers")
    return bounds


def step_limits(shape: ParentShape) -> dict[str, Any]:
    """What config.json says of the step size, in finite numbers: JSON has no others.

    Stock transformers ignores `time_step_limit` and clamps at `time_step_min`, which for everybody
    else is a setting of a random start: below any step its clamp is idle, and its initialiser can
    still take a logarithm.
    """
    low, high = shape.dt_limit
    return {"time_step_limit": [low, min(high, IDLE_HIGH)], "time_step_min": max(low, IDLE_LOW)}


def _pattern(config: dict[str, Any]) -> str:
    """One letter per layer, from whichever spelling there is."""
    types = config.get("layers_block_type") or config.get("layer_types") or []
    if not isinstance(types, list):
        raise ValueError(f"config.json: layers_block_type={_short(types)} must be a list of kinds")
    older = config.get("hybrid_override_pattern")
    if older is not None and not isinstance(older, str):
        raise ValueError(f"config.json: hybrid_override_pattern={_short(older)} must be letters")
    unknown = [name for name in types if not isinstance(name, str) or name not in SPELLINGS]
    if unknown:
        raise ValueError(
            f"config.json: layers_block_type has {_short(unknown[0])}; must be one of "
            + ", ".join(SPELLINGS)
        )
    newer = "".join(SPELLINGS[name] for name in types)
    if types and older is not None and older != newer:
        raise ValueError(
            f"config.json: hybrid_override_pattern={_short(older)} and layers_block_type ({newer}) "
            "disagree; one of them is wrong"
        )
    pattern = newer if older is None else older
    layers = config.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise ValueError(
            f"config.json: num_hidden_layers={layers}, but the layer pattern {_short(pattern)} has "
            f"{len(pattern)}; one of them is wrong"
        )
    return str(pattern)


def stock_config(shape: ParentShape, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json for these sizes, over the other fields of `base`.

    Every reader knows `hybrid_override_pattern` with `num_hidden_layers`; `layers_block_type` has
    two spellings, each refused by some (docs/compatibility.md).
    """
    config = dict(base or {"chunk_size": 128, "torch_dtype": "float32"})
    for stale in (*_STALE, *(alias for aliases in _ALIASES.values() for alias in aliases)):
        config.pop(stale, None)
    return config | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": shape.pattern,
        "num_hidden_layers": len(shape.pattern),
        "num_nextn_predict_layers": 0,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "mamba_num_heads": shape.mamba_num_heads,
        "mamba_head_dim": shape.mamba_head_dim,
        "n_groups": shape.n_groups,
        "ssm_state_size": shape.ssm_state_size,
        "conv_kernel": shape.conv_kernel,
        "use_conv_bias": shape.conv_bias,
        "tie_word_embeddings": shape.tied_head,
        "layer_norm_epsilon": shape.norm_eps,
        **step_limits(shape),
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        **_NO_BIAS,
    }
