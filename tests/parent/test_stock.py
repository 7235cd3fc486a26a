"""config.json of either era: what is read, what is written, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import in_published_types, load_stock, reconfigure, refused, saved
from helpers.strategies import difference, random_parent, random_tokens, tiny_shape
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic.parent.stock import read_shape, stock_config
from elastic.parent.weights import load_parent, save_parent

NEW = ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]
"""M-*M- as stock's save_pretrained spells it."""


def test_the_spelling_that_every_reader_knows_is_written_and_all_are_read(tmp_path: Path) -> None:
    shape = tiny_shape()
    written = stock_config(shape, {"layers_block_type": NEW, "layer_types": NEW})
    assert written["hybrid_override_pattern"] == "M-*M-" and written["num_hidden_layers"] == 5
    assert not {"layers_block_type", "layer_types"} & written.keys()
    older = ("hybrid_override_pattern", "num_hidden_layers")
    bare = {key: value for key, value in written.items() if key not in older}
    first = [{"linear_attention": "mamba", "full_attention": "attention"}.get(k, k) for k in NEW]
    new = bare | {"layers_block_type": NEW}
    both = written | {"layers_block_type": NEW}
    for config in (written, new, both, bare | {"layers_block_type": first}):
        assert read_shape(config) == shape
    saved(tmp_path, shape)
    tokens = random_tokens(shape)
    logits = load_stock(tmp_path)(tokens).logits
    for config in (new, both):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert torch.equal(load_stock(tmp_path)(tokens).logits, logits)


def test_what_other_readers_require_is_written(tmp_path: Path) -> None:
    """Fields of mlx-lm's ModelArgs without a default, in finite numbers: JSON has no others."""
    saved(tmp_path, tiny_shape())
    text = (tmp_path / "config.json").read_text()
    config = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "__float__" not in text
    required = (
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers "
        "max_position_embeddings num_attention_heads num_key_value_heads attention_bias "
        "mamba_num_heads mamba_head_dim mamba_proj_bias ssm_state_size conv_kernel n_groups "
        "time_step_limit mlp_bias layer_norm_epsilon use_bias use_conv_bias hybrid_override_pattern"
    ).split()
    assert set(required) <= config.keys()
    assert not any(config[name] for name in required if name in ("use_bias", "mlp_bias"))


INFINITY = {"__float__": "Infinity"}
"""What stock's save_pretrained writes for it."""


@pytest.mark.parametrize(
    ("limit", "read"),
    [
        (None, None),
        ([0.0, INFINITY], None),
        ([0.0, float("inf")], None),
        ([0.0, "inf"], None),
        (["0", "Infinity"], None),
        ([0, None], None),
        ([0.0, 1e30], None),
        ([-1, 1e300], None),
        ([0.0, 0.02], [0.0, 0.02]),
        ([0.001, INFINITY], [0.001, 1e30]),
        ([0.001, 0.1], [0.001, 0.1]),
    ],
    ids=str,
)
def test_a_limit_of_the_step_is_read_in_every_spelling(
    limit: Any, read: list[float] | None
) -> None:
    config = stock_config(tiny_shape()) | {"time_step_min": 0.001, "time_step_limit": limit}
    shape = read_shape(config)
    assert shape.time_step_limit == read
    assert read_shape(stock_config(shape, config)) == shape
    alias = {key: value for key, value in config.items() if key != "time_step_limit"}
    assert read_shape(alias | {"mamba_dt_limit": limit}) == shape
    del config["time_step_limit"]
    assert read_shape(config).time_step_limit is None, "time_step_min is for a random start"


def test_stock_transformers_never_reaches_the_bounds_that_are_written(tmp_path: Path) -> None:
    """Steps of 1e-8: with the published `time_step_min` it computes another function."""
    shape = tiny_shape()
    parent = random_parent(shape)
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            if name.endswith("dt_bias"):
                weight.sub_(17)
    save_parent(parent, tmp_path, {"time_step_min": 0.001, "time_step_max": 0.1})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["time_step_min"] == 1e-30 and config["time_step_limit"] == [0.0, 1e30]
    tokens = random_tokens(shape, time=40)
    ours = parent.logits(tokens)
    assert difference(load_stock(tmp_path)(tokens).logits, ours) < 1e-6
    reconfigure(tmp_path, time_step_min=0.001)
    assert difference(load_stock(tmp_path)(tokens).logits, ours) > 1e-4
    assert difference(load_parent(tmp_path).logits(tokens), ours) == 0


def test_the_written_bounds_leave_the_initialiser_of_stock_alone(tmp_path: Path) -> None:
    """Somebody may train from this configuration: steps are finite, and no smaller than its
    floor."""
    saved(tmp_path, tiny_shape())
    model = NemotronHForCausalLM(NemotronHConfig.from_pretrained(tmp_path))
    steps = torch.nn.functional.softplus(model.model.layers[0].mixer.dt_bias)
    assert (steps > 0.9e-4).all() and (steps < 0.11).all()


def test_numbers_of_the_scan_are_those_of_the_file(tmp_path: Path) -> None:
    """Stock's initialiser runs after loading too; it must find nothing to do."""
    parent = in_published_types(saved(tmp_path, tiny_shape()))
    save_parent(parent, tmp_path)
    stock = load_stock(tmp_path).state_dict()
    ours = load_parent(tmp_path).state_dict()
    for name, weight in parent.state_dict().items():
        if name.endswith(("A_log", ".D", "dt_bias")):
            assert weight.dtype == torch.float32 and torch.equal(ours[name], weight)
            theirs = stock[name.replace("backbone.", "model.", 1)]
            assert torch.equal(theirs, weight.to(theirs.dtype)), name


def test_the_config_that_transformers_itself_saves_is_read(tmp_path: Path) -> None:
    """`save_pretrained` drops the old spelling; the round trip through stock must lose nothing."""
    shape = tiny_shape(conv_bias=False, norm_eps=1e-3)
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
        "time_step_limit": "mamba_dt_limit",
        "head_dim": "attention_head_dim",
        "layer_norm_epsilon": "rms_norm_eps",
    }
    older = {renamed.get(name, name): value for name, value in config.items()}
    assert read_shape(older) == tiny_shape()
    written = stock_config(tiny_shape(), older | {"num_nextn_predict_layers": 1})
    assert not set(written) & {*renamed.values()}
    assert written["num_nextn_predict_layers"] == 0, "their tensors are not written either"


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
            {"hybrid_override_pattern": "ME*M-"},
            r"pattern=ME\*M-: .*E \(mixture of experts\)",
        ),
        (
            {"hybrid_override_pattern": "M-*M", "layers_block_type": NEW},
            r"=M-\*M and layers_block_type \(M-\*M-\) disagree",
        ),
        (
            {"hybrid_override_pattern": "M-*M"},
            r"num_hidden_layers=5, but the layer pattern M-\*M has 4",
        ),
        (
            {
                "hybrid_override_pattern": "M-*M",
                "num_hidden_layers": 4,
            },
            r"unknown tensor backbone\.layers\.4",
        ),
        ({"layers_block_type": ["mamba", "conv"]}, r"layers_block_type has conv; must be one of"),
        (
            {"quantization_config": {"quant_method": "fp8", "ignore": ["layer"] * 100_000}},
            r"^.{,40}\(quant_method=fp8\): quantized .{,150}bfloat16 checkpoint",
        ),
        ({"time_step_limit": [0.0]}, r"time_step_limit=\[0\.0\] must be two numbers"),
        ({"time_step_limit": ["low", 1.0]}, r"time_step_limit=.* must be two numbers"),
        ({"time_step_limit": [0.2, 0.1]}, r"time_step_limit=\[0\.2, 0\.1\]: must be null, or the"),
        ({"mlp_hidden_act": "x" * 1_000_000}, r"^.{,100}\(1,000,000 characters\) must be relu2"),
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
    del config["hybrid_override_pattern"], config["time_step_limit"]
    config["layers_block_type"], config["num_hidden_layers"] = ["linear_attention", "moe"], 2
    with pytest.raises(ValueError, match="mixture of experts"):
        read_shape(config)
