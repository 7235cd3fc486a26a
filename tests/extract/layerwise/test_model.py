"""A model with sizes per layer behaves as stock Nemotron-H does: generation, caches, init, saving.

That it computes what the sliced parent computes is law 1, in tests/extract.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.layerwise import SIZES
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from elastic.extract.layerwise.config import NemotronHElasticConfig
from elastic.extract.layerwise.model import NemotronHElasticForCausalLM

LAYERS = {
    0: {"mamba_num_heads": 4, "mamba_head_dim": 3},
    1: {"intermediate_size": 7},
    2: {"num_attention_heads": 4},
    3: {"mamba_head_dim": 7},
}
PROMPT = torch.tensor([[5, 9, 17, 2], [4, 4, 30, 11]])


@pytest.fixture
def model() -> NemotronHElasticForCausalLM:
    """Every layer of a size of its own, random weights that all matter."""
    torch.manual_seed(0)
    made = NemotronHElasticForCausalLM(NemotronHElasticConfig(**SIZES, per_layer_config=LAYERS))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            scale = 0.3 if weight.ndim == 1 else 2 / weight.shape[-1] ** 0.5
            weight.add_(scale * torch.randn(weight.shape))
            if name.endswith("embeddings.weight"):
                weight.normal_()
    return made.eval()


def test_greedy_generation_is_the_same_with_and_without_cache(
    model: NemotronHElasticForCausalLM,
) -> None:
    """Each layer's state has that layer's sizes; sequences of unequal length are padded left."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for attention_mask in (torch.ones_like(mask), mask):
        options["attention_mask"] = attention_mask
        cached = model.generate(PROMPT, use_cache=True, **options)
        plain = model.generate(PROMPT, use_cache=False, **options)
        assert cached.shape == (2, 16) and torch.equal(cached, plain)
    assert len(set(cached[0].tolist())) > 4, "the model says more than one word"


def test_states_have_their_layers_sizes(model: NemotronHElasticForCausalLM) -> None:
    """(b, h, p, n) of every Mamba layer, KV heads of the attention layer, nothing for an MLP."""
    cache = model(PROMPT, use_cache=True).past_key_values
    shapes = [tuple(cache.layers[i].recurrent_states[0].shape) for i in (0, 3)]
    assert shapes == [(2, 4, 3, 4), (2, 6, 7, 4)]
    assert tuple(cache.layers[2].keys.shape) == (2, 2, 4, 4)


def test_with_one_size_it_is_the_stock_model() -> None:
    """The plain twin: same weights, same logits, bit for bit."""
    torch.manual_seed(0)
    stock = NemotronHForCausalLM(NemotronHConfig(**SIZES)).eval()
    ours = NemotronHElasticForCausalLM(NemotronHElasticConfig(**SIZES)).eval()
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(ours(PROMPT).logits, stock(PROMPT).logits)


def test_blocks_of_one_size_start_as_stock_ones_do() -> None:
    """Initial weights of mixers too, which stock draws by the size that the whole model has."""
    torch.manual_seed(0)
    stock = NemotronHForCausalLM(NemotronHConfig(**SIZES)).state_dict()
    torch.manual_seed(0)
    ours = NemotronHElasticForCausalLM(NemotronHElasticConfig(**SIZES)).state_dict()
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


def test_saving_and_loading_is_the_identity(
    model: NemotronHElasticForCausalLM, tmp_path: Path
) -> None:
    """Stored names are those of Nemotron-H checkpoints; config.json says the sizes per layer."""
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "backbone.layers.3.mixer.A_log" in stored and "lm_head.weight" in stored
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "nemotron_h_elastic"
    assert {int(k): v for k, v in written["per_layer_config"].items()} == LAYERS
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is NemotronHElasticForCausalLM
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    stack = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(stack(PROMPT).last_hidden_state, model.model(PROMPT).last_hidden_state)


def test_how_it_attends_can_be_set_afterwards(model: NemotronHElasticForCausalLM) -> None:
    """On the whole, as for any model: layers do not keep what they were built with."""
    before = model(PROMPT).logits
    model.set_attn_implementation("eager")
    seen = model(PROMPT, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in seen.attentions] == [(2, 4, 4, 4)]
    assert len(seen.hidden_states) == 6
    torch.testing.assert_close(seen.logits, before)


def test_it_trains(model: NemotronHElasticForCausalLM) -> None:
    """Every weight gets a gradient."""
    model.train()(PROMPT, labels=PROMPT).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
