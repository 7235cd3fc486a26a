"""config.json of either era: what is read, what is written, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import load_stock, reconfigure, refused, saved
from helpers.strategies import difference, random_tokens, tiny_shape

from elastic.parent.stock import read_shape, stock_config
from elastic.parent.weights import load_parent


def test_config_json_has_both_spellings_and_each_alone_is_enough(tmp_path: Path) -> None:
    shape = tiny_shape()
    both = stock_config(shape)
    old = {key: value for key, value in both.items() if key != "layers_block_type"}
    new = {
        key: value
        for key, value in both.items()
        if key not in ("hybrid_override_pattern", "num_hidden_layers")
    }
    assert "hybrid_override_pattern" in old and "layers_block_type" in new
    assert read_shape(both) == read_shape(old) == read_shape(new) == shape
    saved(tmp_path, shape)
    tokens = random_tokens(shape)
    logits = load_stock(tmp_path)(tokens).logits
    for spelling in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(spelling))
        assert torch.equal(load_stock(tmp_path)(tokens).logits, logits)


def test_block_types_of_the_first_release_are_read() -> None:
    config = stock_config(tiny_shape(pattern="M-*"))
    del config["hybrid_override_pattern"], config["num_hidden_layers"]
    config["layers_block_type"] = ["mamba", "mlp", "attention"]
    assert read_shape(config).pattern == "M-*"


def test_the_config_that_transformers_itself_saves_is_read(tmp_path: Path) -> None:
    """`save_pretrained` drops the old spelling; the round trip through stock must lose nothing."""
    shape = tiny_shape(conv_bias=False, norm_eps=1e-3, time_step_min=0.05)
    (tmp_path / "ours").mkdir()
    parent, tokens = saved(tmp_path / "ours", shape), random_tokens(shape)
    load_stock(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_parent(tmp_path / "theirs")
    assert again.shape == shape
    assert difference(again.logits(tokens), parent.logits(tokens)) == 0


def test_names_of_other_eras_are_read_and_stay_behind(tmp_path: Path) -> None:
    """Those that stock transformers renames; a stale one would win over the size of a member."""
    config = stock_config(tiny_shape())
    renamed = {
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
        "use_conv_bias": "mamba_conv_bias",
        "time_step_min": "mamba_dt_min",
        "head_dim": "attention_head_dim",
        "layer_norm_epsilon": "rms_norm_eps",
    }
    older = {renamed.get(name, name): value for name, value in config.items()}
    assert read_shape(older) == tiny_shape()
    written = stock_config(tiny_shape(), older | {"num_nextn_predict_layers": 1})
    assert not set(written) & {*renamed.values(), "num_nextn_predict_layers"}


def test_base_config_is_kept_but_never_overrides_the_sizes(tmp_path: Path) -> None:
    base = {"bos_token_id": 7, "hidden_size": 999, "auto_map": {"AutoModel": "remote.py"}}
    base |= {"layer_types": ["moe"], "torch_dtype": "bfloat16", "norm_eps": 0.5}
    saved(tmp_path, tiny_shape(), base_config=base)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["bos_token_id"] == 7
    assert config["hidden_size"] == 13
    assert config["torch_dtype"] == "float32"
    assert not {"auto_map", "layer_types", "norm_eps"} & config.keys()
    assert read_shape(config) == tiny_shape()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"config\.json: model_type=llama must be nemotron_h"),
        (
            {"hybrid_override_pattern": "ME*M-", "layers_block_type": None},
            r"pattern=ME\*M-: .*E \(mixture of experts\)",
        ),
        ({"hybrid_override_pattern": "M-*M"}, r"=M-\*M and layers_block_type \(M-\*M-\) disagree"),
        (
            {"hybrid_override_pattern": "M-*M", "layers_block_type": None},
            r"num_hidden_layers=5, but the layer pattern M-\*M has 4",
        ),
        (
            {
                "hybrid_override_pattern": "M-*M",
                "layers_block_type": None,
                "num_hidden_layers": 4,
            },
            r"unknown tensor backbone\.layers\.4",
        ),
        ({"layers_block_type": ["mamba", "conv"]}, r"layers_block_type has conv; must be one of"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config=.* must be None"),
        ({"mlp_bias": True}, r"config\.json: mlp_bias=True must be False"),
        ({"use_bias": True}, r"config\.json: use_bias=True must be False"),
        ({"attention_bias": True}, r"config\.json: attention_bias=True must be False"),
        ({"mamba_proj_bias": True}, r"config\.json: mamba_proj_bias=True must be False"),
        ({"mlp_hidden_act": "silu"}, r"config\.json: mlp_hidden_act=silu must be relu2"),
        ({"mamba_hidden_act": "gelu"}, r"config\.json: mamba_hidden_act=gelu must be silu"),
        ({"sliding_window": 128}, r"config\.json: sliding_window=128 must be None"),
        ({"n_groups": 4}, r"config\.json: mamba_num_heads=6: must be a multiple of n_groups=4"),
        ({"hidden_size": "13"}, r"config\.json: "),
        ({"intermediate_size": [17, 9]}, r"config\.json: "),
        ({"hidden_size": 12}, r"has shape \(11, 13\), config\.json gives \(11, 12\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_configs_that_this_parent_does_not_compute_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    saved(tmp_path, tiny_shape())
    reconfigure(tmp_path, **changes)
    refused(tmp_path, message)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    saved(tmp_path, tiny_shape())
    reconfigure(tmp_path, remove=("ssm_state_size",))
    refused(tmp_path, r"config\.json: ssm_state_size is missing")


def test_moe_in_the_new_spelling_is_refused() -> None:
    config = stock_config(tiny_shape())
    del config["hybrid_override_pattern"]
    config["layers_block_type"], config["num_hidden_layers"] = ["linear_attention", "moe"], 2
    with pytest.raises(ValueError, match="mixture of experts"):
        read_shape(config)
