"""The least settings of a run, one changed, and the line that refuses it."""

import copy
from typing import Any

import pytest
from omegaconf import OmegaConf

from elastic.config import (
    ConfigError,
    RunConfig,
    parse,
)

SHAPE = {
    "pattern": "M-*",
    "hidden_size": 8,
    "vocab_size": 300,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "mamba_num_heads": 2,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 4,
}
STAGE = {"tokens": 100, "sequence_length": 16, "batch_tokens": 64, "model_lr": 1e-3}


def run_settings() -> dict[str, Any]:
    """The least that `train.py` can be told."""
    return {
        "name": "test",
        "run_dir": "runs/test",
        "parent": {"shape": dict(SHAPE)},
        "budgets": {"full": {"params": 1.0}, "small": {"params": 0.5}},
        "space": {"hidden": [8, 4], "ffn": [8, 4]},
        "importance": {},
        "norms": {},
        "router": {},
        "objective": {},
        "curriculum": {"stages": {"warm": STAGE | {"mode": "pretrain"}, "all": dict(STAGE)}},
        "data": {"sources": {"text": {"kind": "stdlib"}}},
        "optim": {},
        "trainer": {},
        "logger": {},
    }


def changed(key: str, value: Any) -> dict[str, Any]:
    """A run with one setting replaced; `a.b.c` is its key."""
    settings = copy.deepcopy(run_settings())
    *path, last = key.split(".")
    inner = settings
    for name in path:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return settings


def refusal(settings: dict[str, Any], schema: type = RunConfig) -> str:
    """The one line with which the gate refuses."""
    with pytest.raises(ConfigError) as caught:
        parse(OmegaConf.create(settings), schema)
    line = str(caught.value)
    assert line and "\n" not in line
    return line
