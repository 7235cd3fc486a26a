"""Members of a parent that limits its SSM steps, which stock transformers does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import difference, random_tokens, tiny_shape
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

import elastic
from elastic.extract.compare import VerificationError
from elastic.extract.export import extract
from elastic.extract.layerwise.model import NemotronHElasticForCausalLM
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.parent import HybridParent

MEMBER = Architecture(
    8, (MambaLayer(0, 4, 5), MLPLayer(1, 9), AttentionLayer(2, 4), MambaLayer(3, 4, 5))
)
WIDTHS = Architecture(
    8, (MambaLayer(0, 4, 5), MLPLayer(1, 9), AttentionLayer(2, 4), MLPLayer(4, 3))
)


@pytest.fixture(params=[[0.0, 0.3], [0.2, 1e30], [0.2, 0.3]], ids=str)
def limited(request: pytest.FixtureRequest, write: Callable[..., Any], tmp_path: Path) -> Any:
    """An elastic checkpoint whose limit binds."""
    shape = tiny_shape(time_step_limit=request.param)
    return write(tmp_path / "elastic", shape, {"even": MEMBER, "widths": WIDTHS})


def decoded(model: NemotronHForCausalLM, tokens: Tensor) -> Tensor:
    """Logits (b, t, v), a prompt of four at once and then a token at a time from the cache."""
    out = model(tokens[:, :4], use_cache=True)
    logits = [out.logits]
    for at in range(4, tokens.shape[1]):
        out = model(tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def as_ours(model: nn.Module, parent: HybridParent, member: Architecture) -> None:
    """Whole and from a cache it is the sliced parent."""
    tokens = random_tokens(parent.shape, time=12)
    expected = parent.logits(tokens, member)
    with torch.no_grad():
        assert difference(model(tokens, use_cache=False).logits, expected) < 1e-5
        assert difference(decoded(model, tokens), expected) < 1e-5


@pytest.mark.parametrize("budget", ["even", "widths"])
def test_load_honours_the_limit_with_and_without_a_cache(limited: Any, budget: str) -> None:
    as_ours(elastic.load(limited.path, budget), limited.parent, limited.member(budget))


def test_the_native_form_is_refused_until_asked_for(limited: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_dt_limit=true") as caught:
        extract(limited.config(tmp_path / "out", "even"))
    assert "\n" not in str(caught.value) and "must be per_layer" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", ["native", "padded"])
def test_asked_for_it_is_verified_against_our_model_and_the_card_says_so(
    limited: Any, tmp_path: Path, export: str, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = "even" if export == "native" else "widths"
    config = limited.config(tmp_path / "out", budget, export=export, allow_dt_limit=True)
    output = extract(config)
    assert "stock transformers loads it and computes another function" in capsys.readouterr().out
    said = json.loads((output / "config.json").read_text())
    assert said["model_type"] == "nemotron_h"
    assert said["time_step_limit"] == limited.parent.shape.time_step_limit
    card = (output / "README.md").read_text()
    assert "**Stock transformers computes another function**" in card and "Against the" in card
    model = elastic.load(output)
    assert isinstance(model, NemotronHElasticForCausalLM)
    as_ours(model, limited.parent, limited.member(budget))
    tokens = random_tokens(limited.parent.shape, time=12)
    stock = NemotronHForCausalLM.from_pretrained(output).eval()
    with torch.no_grad():
        assert difference(decoded(stock, tokens), decoded(model, tokens)) > 1e-3


@pytest.mark.parametrize("limited", [[0.0, 0.3], [0.2, 0.3]], indirect=True, ids=str)
def test_the_check_notices_a_limit_that_is_lost(
    limited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the guard: compared with stock itself the export must not pass. Stock has a lower
    limit for whole sequences, which is what is compared, and no upper one."""
    monkeypatch.setattr("elastic.extract.verify.model_class", lambda member: NemotronHForCausalLM)
    monkeypatch.setattr("elastic.extract.verify.model_config", lambda directory, member: None)
    with pytest.raises(VerificationError, match="differ by"):
        extract(limited.config(tmp_path / "out", "even", allow_dt_limit=True))


@pytest.mark.parametrize("budget", ["even", "widths"])
def test_per_layer_is_exact_also_for_members_of_one_size(
    limited: Any, tmp_path: Path, budget: str
) -> None:
    output = extract(limited.config(tmp_path / "out", budget, export="per_layer"))
    assert json.loads((output / "provenance.json").read_text())["export"] == "per_layer"
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    as_ours(model, limited.parent, limited.member(budget))


def small_steps(parent: HybridParent) -> None:
    """Steps of about 1e-8."""
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            if name.endswith("dt_bias"):
                weight.sub_(17)


@pytest.mark.parametrize("export", ["native", "padded", "per_layer"])
def test_without_a_limit_nothing_clamps_small_steps(
    write: Callable[..., Any], tmp_path: Path, export: str
) -> None:
    """In what stock transformers loads, and in our own; whole, and a token at a time."""
    budget = "even" if export == "native" else "widths"
    members = {"even": MEMBER, "widths": WIDTHS}
    written = write(tmp_path / "elastic", tiny_shape(), members, fill=small_steps)
    output = extract(written.config(tmp_path / "out", budget, export=export))
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    as_ours(model, written.parent, written.member(budget))
    as_ours(elastic.load(output), written.parent, written.member(budget))
    assert "`time_step_min: 1e-30`" in (output / "README.md").read_text()
    if export != "per_layer":
        stock = NemotronHForCausalLM.from_pretrained(output)
        stock.save_pretrained(tmp_path / "tuned")
        text = (tmp_path / "tuned" / "config.json").read_text()
        changed = json.loads(text) | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
        changed["time_step_min"] = 0.001
        (tmp_path / "tuned" / "config.json").write_text(json.dumps(changed))
        as_ours(elastic.load(tmp_path / "tuned"), written.parent, written.member(budget))


@pytest.mark.parametrize("exported", [False, True], ids=["cut", "exported"])
@pytest.mark.parametrize("budget", ["even", "widths"])
def test_steps_are_float32_in_a_bfloat16_model_of_ours(
    write: Callable[..., Any], tmp_path: Path, budget: str, exported: bool
) -> None:
    """Stock adds dt_bias and takes softplus in bfloat16; ours does not, whole and from a cache,
    whichever class the model is of."""
    written = write(tmp_path / "elastic", tiny_shape(), {"even": MEMBER, "widths": WIDTHS})
    if exported:
        output = extract(written.config(tmp_path / "out", budget, export="per_layer"))
        model = elastic.load(output, dtype="bfloat16")
    else:
        model = elastic.load(written.path, budget, dtype="bfloat16")
    assert (type(model) is NemotronHForCausalLM) == (budget == "even")
    seen: list[Tensor] = []
    from transformers.models.nemotron_h import modeling_nemotron_h as stock

    scan, update = stock.mamba2_chunk_scan, stock.mamba2_selective_state_update
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            stock,
            "mamba2_chunk_scan",
            lambda x, dt, *a, **k: (seen.append(dt), scan(x, dt, *a, **k))[1],
        )
        patch.setattr(
            stock,
            "mamba2_selective_state_update",
            lambda s, x, dt, *a, **k: (seen.append(dt), update(s, x, dt, *a, **k))[1],
        )
        decoded(model, random_tokens(tiny_shape(), time=6))
    layers = {"even": 2, "widths": 1}[budget]
    assert len(seen) == 3 * layers and {dt.dtype for dt in seen} == {torch.float32}
    wide = [name for name, w in model.named_parameters() if w.dtype == torch.float32]
    assert {name.split(".")[-1] for name in wide} == {"A_log", "D", "dt_bias"}
