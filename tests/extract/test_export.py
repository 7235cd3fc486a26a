"""Laws 1 and 4 on disk: an extracted checkpoint is the member, and has the size counted."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import architectures, assert_near, random_tokens, shapes
from transformers import AutoTokenizer, NemotronHForCausalLM

from elastic import cost
from elastic.architecture import Architecture, MambaLayer
from elastic.config import ParentShape
from elastic.extract import extract
from elastic.extract.slice import stored_shape
from elastic.masks import hard_keep
from elastic.tensors import StoredTensor


def stock(directory: Path) -> NemotronHForCausalLM:
    """What anyone gets without this package."""
    return NemotronHForCausalLM.from_pretrained(directory, local_files_only=True).eval()


@st.composite
def extractable(draw: st.DrawFn, homogeneous: bool) -> tuple[ParentShape, Architecture]:
    """A drawn parent and a member of it; never Mamba layers of several sizes."""
    shape = draw(shapes())
    architecture = draw(architectures(shape, homogeneous))
    mamba = [layer for layer in architecture.layers if isinstance(layer, MambaLayer)]
    layers = tuple(
        replace(mamba[0], index=layer.index) if isinstance(layer, MambaLayer) else layer
        for layer in architecture.layers
    )
    return shape, Architecture(architecture.hidden_size, layers)


def check_one_function(
    write: Callable[..., Any], shape: ParentShape, architecture: Architecture
) -> NemotronHForCausalLM:
    """Masked parent == sliced parent == extracted checkpoint in stock transformers."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(Path(folder) / "elastic", shape, {"drawn": architecture})
        output = Path(folder) / "out"
        extract(checkpoint.config(output, "drawn", verify=False, max_shard_bytes=2000))
        model = stock(output)
        tokens = random_tokens(shape, time=20)
        with torch.no_grad():
            extracted = model(tokens, use_cache=False).logits
            masked = checkpoint.parent.logits(tokens, hard_keep(shape, architecture))
            assert_near(extracted, masked)
            assert_near(extracted, checkpoint.parent.logits(tokens, architecture))
    return model


@settings(max_examples=20)
@given(drawn=extractable(homogeneous=True))
def test_an_extracted_member_is_the_masked_and_the_sliced_parent(
    write: Callable[..., Any], drawn: tuple[ParentShape, Architecture]
) -> None:
    """And its parameters are as many as cost.py says, exactly."""
    shape, architecture = drawn
    model = check_one_function(write, shape, architecture)
    counted = sum(weight.numel() for weight in model.parameters())
    assert counted == cost.parameters(shape, architecture)


@settings(max_examples=12)
@given(drawn=extractable(homogeneous=False))
def test_a_member_of_many_widths_is_exact_when_padded(
    write: Callable[..., Any], drawn: tuple[ParentShape, Architecture]
) -> None:
    """MLP widths and query heads that differ from layer to layer."""
    shape, architecture = drawn
    model = check_one_function(write, shape, architecture)
    padded = stored_shape(shape, architecture)
    counted = sum(weight.numel() for weight in model.parameters())
    assert counted == cost.parameters(padded, Architecture.full(padded))
    assert counted >= cost.parameters(shape, architecture)


@pytest.fixture(scope="module")
def small(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One extracted directory; tests must not change it."""
    output = tmp_path_factory.mktemp("extracted") / "deep" / "small"
    return extract(checkpoint.config(output, max_shard_bytes=3000))


def test_the_directory_is_a_plain_checkpoint(small: Path) -> None:
    """Config, shards, index, tokenizer, licence and provenance; nothing of router or run."""
    files = {path.name for path in small.iterdir()}
    shards = {name for name in files if name.startswith("model-")}
    assert len(shards) > 1 and all(name.endswith(".safetensors") for name in shards)
    assert files - shards == {
        "config.json",
        "model.safetensors.index.json",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
    }
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_config_has_both_spellings(small: Path) -> None:
    """Stock transformers reads one, other engines the other."""
    config = json.loads((small / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-*-"
    assert config["num_hidden_layers"] == 4
    assert config["layers_block_type"] == ["linear_attention", "mlp", "full_attention", "mlp"]
    assert config["hidden_size"] == 8 and config["mamba_head_dim"] == 5
    assert not config["tie_word_embeddings"], "embedding and head are stored apart"


def test_the_tokenizer_comes_along(small: Path) -> None:
    assert AutoTokenizer.from_pretrained(small)("a member")["input_ids"]


def test_provenance_says_where_every_layer_came_from(small: Path, checkpoint: Any) -> None:
    found = json.loads((small / "provenance.json").read_text())
    assert found["budget"] == "small" and found["target"] == {"params": 0.5}
    assert found["params"] == cost.parameters(checkpoint.parent.shape, checkpoint.member("small"))
    assert [layer["index"] for layer in found["architecture"]["layers"]] == [0, 1, 2, 4]
    assert found["training"] == {"tokens_seen": 7}
    assert found["checkpoint"] == str(checkpoint.path) and found["elastic_version"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["source", "float32", "bfloat16", "float16"])
def test_dtype_converts_and_source_keeps(
    write: Callable[..., Any], checkpoint: Any, tmp_path: Path, stored: torch.dtype, dtype: str
) -> None:
    """Tensors and config.json agree, and the conversion passes verification."""
    architecture = checkpoint.member("small")
    written = write(tmp_path / "e", checkpoint.parent.shape, {"small": architecture}, dtype=stored)
    output = extract(written.config(tmp_path / "out", dtype=dtype))
    expected = stored if dtype == "source" else getattr(torch, dtype)
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == str(expected).removeprefix("torch.")
    assert next(stock(output).parameters()).dtype == expected


def test_the_summary_names_sizes_and_place(
    checkpoint: Any, mixed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for a member, one more when it is padded: the stored size next to the true one."""
    extract(checkpoint.config(tmp_path / "small"))
    params = cost.parameters(checkpoint.parent.shape, checkpoint.member("small"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"small: {params:,} parameters (") and lines[0].endswith("hidden 8")
    assert lines[1].startswith("verified:") and lines[2] == f"written to {tmp_path / 'small'}"
    extract(mixed.config(tmp_path / "mixed", "mixed"))
    line = capsys.readouterr().out.splitlines()[1]
    true = cost.parameters(mixed.parent.shape, mixed.member("mixed"))
    stored = sum(weight.numel() for weight in stock(tmp_path / "mixed").parameters())
    assert "zero-padded" in line and f"{stored:,}" in line and f"{true:,}" in line


def test_greedy_generation_is_the_same_with_and_without_cache(small: Path) -> None:
    """Step sizes are far above time_step_min here: stock decoding does not clamp to it."""
    model, prompt = stock(small), torch.tensor([[5, 9, 17], [4, 4, 30]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **options)
    plain = model.generate(prompt, use_cache=False, **options)
    assert cached.shape == (2, 15) and torch.equal(cached, plain)


def test_an_existing_output_is_refused_and_kept(checkpoint: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("here")
    with pytest.raises(FileExistsError, match="exists already; nothing was written"):
        extract(checkpoint.config(output))
    assert [path.name for path in output.iterdir()] == ["mine"]


@pytest.mark.parametrize("budget", ["unknown", "uneven"])
def test_a_refused_extraction_leaves_nothing(checkpoint: Any, tmp_path: Path, budget: str) -> None:
    """Not even the folders above the output."""
    with pytest.raises(ValueError, match=budget):
        extract(checkpoint.config(tmp_path / "new" / "folder" / "out", budget))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_extraction_leaves_nothing(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up in the middle of the shards."""
    reads = iter(range(100))
    read = StoredTensor.blocks

    def failing(self: StoredTensor, *arguments: Any) -> Iterator[torch.Tensor]:
        if next(reads) == 7:
            raise OSError(28, "No space left on device")
        return read(self, *arguments)

    monkeypatch.setattr(StoredTensor, "blocks", failing)
    with pytest.raises(OSError, match="No space left"):
        extract(checkpoint.config(tmp_path / "new" / "out", max_shard_bytes=3000))
    assert not list(tmp_path.iterdir())
