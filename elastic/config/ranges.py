"""The outer range of every number among the settings, by its name.

What a number means bounds it closer, in the class that has it (positive, a multiple of another).
This table keeps out what no machine, no float32 and no int64 can hold, before anything is computed
from it. Every name is in it: tests/hostile/test_ranges.py walks all settings of all commands.
"""

import math
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from elastic.config.checks import ConfigError, require

COUNT = 10**15
"""Tokens, parameters, bytes or FLOPs per token: above all text and every model there are, and its
products with sizes are still whole in 64 bits."""

LENGTH = 10**9
"""Steps, tokens of one sequence or rows of one batch."""

WIDTH = 10**6
"""One side of a matrix."""

WEIGHT = 1e6
"""Factors of a loss and rates: float32 has seven digits, a larger one drowns all others."""

_BY_MOST: tuple[tuple[float, str], ...] = (
    (2**32 - 1, "seed seeds"),  # what every library's generator takes
    (
        COUNT,
        "tokens target_tokens prepare_inline_tokens max_characters params active_params "
        "weight_bytes cache_bytes flops batch_tokens micro_batch_tokens max_shard_bytes "
        "shard_bytes",
    ),
    (
        LENGTH,
        "sequence_length depth_sequence_length chunk_tokens context contexts samples depth_samples "
        "depth_positions sequences validation_sequences validation_every batch_size batch "
        "shard_sequences problems preview warmup_steps settled_steps draws budgets_per_batch "
        "noise_groups validate_every families checkpoint_every keep_checkpoints max_bad_steps "
        "log_every max_position_embeddings new_tokens answer_tokens time steps repeats warmup "
        "chunks stock_chunks",
    ),
    (10**7, "vocab_size tokenizer_vocab vocabulary top_k gpus"),
    (
        WIDTH,
        "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
        "mamba_num_heads mamba_head_dim n_groups ssm_state_size hidden ffn mamba_heads "
        "attention_heads depth heads channels groups state square patience worker workers "
        "num_nodes loader_workers",
    ),
    (10**4, "hidden_units devices jobs threads"),
    (64, "conv_kernel candidates rounds difficulties"),
    (
        WEIGHT,
        "distillation_weight cross_entropy_weight budget_weight budget_rate temperature "
        "temperature_start temperature_end scale_start scale_end full_bias model_lr router_lr "
        "round_share weight_decay tolerance freeze_at hard_probability final_lr_ratio "
        "budget_probabilities weight weights max_skip_fraction beta1 beta2 utilisation share "
        "shares scale",
    ),
    (
        1e9,
        "gradient_clip gpu_gib reserve_gib node_gib gpu_tflops price_per_gpu_hour megabytes "
        "tokens_per_core_second",
    ),
    (1e30, "time_step_limit"),
    (1, "eps norm_eps"),
)
MOST = {name: most for most, names in _BY_MOST for name in names.split()}
"""Largest amount of every number, and of those in a list or a mapping, by its name."""

LEAST = {
    "temperature": 1e-6,
    "temperature_start": 1e-6,
    "temperature_end": 1e-6,
    "eps": 1e-30,
    "norm_eps": 1e-30,
    "gradient_clip": 1e-30,
}
"""Smallest number above 0 of what is divided by: below it float32 has nothing, or infinity."""


def check_ranges(value: Any, schema: Any, key: str = "") -> None:
    """Hold every number in settings (plain values, of the types of `schema`) against its range.

    Raises:
        ConfigError: one is too large, too near to 0, or not a finite number.
    """
    if is_dataclass(schema) and isinstance(value, dict):
        hints = get_type_hints(schema)
        for field in fields(schema):
            if field.name in value:
                inner = f"{key}.{field.name}" if key else field.name
                check_ranges(value[field.name], hints[field.name], inner)
    elif get_origin(schema) in (Union, types.UnionType):
        for kind in get_args(schema):
            if value is not None and kind is not type(None):
                check_ranges(value, kind, key)
    elif get_origin(schema) is dict and isinstance(value, dict):
        kind = get_args(schema)[1]
        for name, entry in value.items():
            if is_dataclass(kind):
                check_ranges(entry, kind, f"{key}.{name}")
            else:
                _check(key, entry)
    elif isinstance(value, list):
        for entry in value:
            _check(key, entry)
    else:
        _check(key, value)


def _check(key: str, value: Any) -> None:
    """One number; anything else passes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    require(isinstance(value, int) or math.isfinite(value), key, value, "a finite number")
    name = key.rpartition(".")[2]
    most, least = MOST.get(name, COUNT), LEAST.get(name, 0)
    if abs(value) > most:
        bound = f"at most {most:,}" if value > 0 else f"at least -{most:,}"
        raise ConfigError(f"{key}={_shown(value)}: must be {bound}")
    require(not 0 < value < least, key, value, f"0, or at least {least:g}")


def _shown(value: float) -> str:
    """A number, however many digits it has: Python refuses to write some thousand of them."""
    if isinstance(value, float) or abs(value) < 10**30:
        return f"{value}"
    return f"{'-' if value < 0 else ''}(about 2^{value.bit_length()})"


def check_sizes(sizes: Any, where: str) -> None:
    """The numbers of a dataclass that does not come through the gate, by type and range.

    Raises:
        ConfigError: one is no number, a fraction where a whole number is needed, or out of range.
    """
    for name, kind in get_type_hints(type(sizes)).items():
        value = getattr(sizes, name)
        if kind in (int, float) and (
            isinstance(value, bool) or not isinstance(value, int if kind is int else int | float)
        ):
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{where}.{name}={ascii(value)[:60]}: must be {what}")
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(f"{where}.{name}={ascii(value)[:60]}: must be true or false")
        if kind is str and not isinstance(value, str):
            raise ConfigError(f"{where}.{name}={ascii(value)[:60]}: must be text")
        _check(f"{where}.{name}", value)
