"""Laws 1 and 4 on disk: an extracted checkpoint is the member, and has the size counted."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.strategies import assert_near, members, random_tokens, tiny_shape
from hypothesis import given, settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHForCausalLM

import elastic  # noqa: F401  # so that AutoModelForCausalLM knows members at true size
from elastic.config import ParentShape
from elastic.extract.card import LOADERS
from elastic.extract.export import extract
from elastic.extract.layerwise.model import NemotronHElasticForCausalLM
from elastic.extract.slice import open_member, stored_shape
from elastic.members import cost
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer
from elastic.routing.masks import hard_keep
from elastic.storage.reading import StoredTensor


def stock(directory: Path) -> NemotronHForCausalLM:
    """What anyone gets without this package."""
    return NemotronHForCausalLM.from_pretrained(directory, local_files_only=True).eval()


def auto(directory: Path) -> NemotronHForCausalLM:
    """What anyone gets who has imported this package."""
    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()


def check_one_function(
    write: Callable[..., Any], shape: ParentShape, architecture: Architecture, export: str
) -> NemotronHForCausalLM:
    """Masked parent == sliced parent == extracted checkpoint in transformers."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(Path(folder) / "elastic", shape, {"drawn": architecture})
        output = Path(folder) / "out"
        settings = {"verify": False, "max_shard_bytes": 2000, "export": export}
        extract(checkpoint.config(output, "drawn", **settings))
        model = auto(output) if export == "per_layer" else stock(output)
        tokens = random_tokens(shape, time=20)
        with torch.no_grad():
            extracted = model(tokens, use_cache=False).logits
            masked = checkpoint.parent.logits(tokens, hard_keep(shape, architecture))
            assert_near(extracted, masked)
            assert_near(extracted, checkpoint.parent.logits(tokens, architecture))
    return model


def count(model: NemotronHForCausalLM) -> int:
    return sum(weight.numel() for weight in model.parameters())


def random_member(seed: int, even: tuple[str, ...] = ()) -> tuple[ParentShape, Architecture]:
    """A parent of seven layers and a member that drops some of them, every other size drawn anew
    for each layer unless its kind is `even`; hypothesis likes small ones too much for that."""
    draw = random.Random(seed)
    groups, kv_heads = draw.randint(1, 3), draw.randint(1, 3)
    shape = tiny_shape(
        pattern="".join(draw.sample("MMM--**", 7)),
        hidden_size=draw.randint(8, 24),
        intermediate_size=24,
        num_attention_heads=4 * kv_heads,
        num_key_value_heads=kv_heads,
        mamba_num_heads=4 * groups,
        mamba_head_dim=7,
        n_groups=groups,
        conv_bias=draw.random() < 0.5,
        norm_eps=draw.choice([1e-5, 1e-3]),
    )
    makers = {
        "mamba": lambda i: MambaLayer(i, groups * draw.randint(1, 4), draw.randint(1, 7)),
        "mlp": lambda i: MLPLayer(i, draw.randint(1, 24)),
        "attention": lambda i: AttentionLayer(i, kv_heads * draw.randint(1, 4)),
    }
    layers = [makers[kind](i) for i, kind in enumerate(shape.kinds)]
    for kind in even:
        first = next(layer for layer in layers if layer.kind == kind)
        layers = [replace(first, index=x.index) if x.kind == kind else x for x in layers]
    whole = Architecture(draw.randint(5, shape.hidden_size), tuple(layers))
    return shape, whole.without(set(draw.sample(range(7), draw.randint(0, 2))))


def check_native(write: Callable[..., Any], shape: ParentShape, architecture: Architecture) -> None:
    """Its parameters are as many as cost.py says, exactly."""
    model = check_one_function(write, shape, architecture, "native")
    assert count(model) == cost.parameters(shape, architecture)


@pytest.mark.parametrize("seed", range(8))
def test_an_extracted_member_is_the_masked_and_the_sliced_parent(
    write: Callable[..., Any], seed: int
) -> None:
    """One size per kind, on all axes jointly, layers dropped."""
    check_native(write, *random_member(seed, even=("mamba", "mlp", "attention")))


@settings(max_examples=12)
@given(drawn=members(homogeneous=True))
def test_the_smallest_members_are_the_masked_and_the_sliced_parent(
    write: Callable[..., Any], drawn: tuple[ParentShape, Architecture]
) -> None:
    """Down to one channel, one head and one layer."""
    shape, architecture = drawn
    check_native(write, replace(shape, time_step_limit=None), architecture)


@pytest.mark.parametrize("seed", range(10))
def test_a_member_of_many_widths_is_exact_when_padded(write: Callable[..., Any], seed: int) -> None:
    """MLP widths and query heads that differ from layer to layer."""
    shape, architecture = random_member(seed, even=("mamba",))
    model = check_one_function(write, shape, architecture, "padded")
    padded = stored_shape(shape, architecture)
    assert count(model) == cost.parameters(padded, Architecture.full(padded))
    assert count(model) > cost.parameters(shape, architecture)


@pytest.mark.parametrize("seed", range(20))
def test_any_member_is_exact_at_true_size(write: Callable[..., Any], seed: int) -> None:
    """Mamba widths that differ from layer to layer too; not a parameter more than the member's."""
    shape, architecture = random_member(seed)
    assert {layer.kind for layer in architecture.layers} == {"mamba", "mlp", "attention"}
    model = check_one_function(write, shape, architecture, "per_layer")
    assert type(model) is NemotronHElasticForCausalLM
    assert count(model) == cost.parameters(shape, architecture)


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
        "README.md",
    }
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_config_has_the_spelling_that_all_read(small: Path) -> None:
    """The other one has two forms, each refused by some."""
    config = json.loads((small / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-*-"
    assert config["num_hidden_layers"] == 4
    assert "layers_block_type" not in config
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
    for name, tensor in load_file(output / "model.safetensors").items():
        exact = name.endswith(("A_log", ".D", "dt_bias")) and stored == torch.float32
        assert tensor.dtype == (stored if exact else expected), name
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == str(expected).removeprefix("torch.")
    assert next(stock(output).parameters()).dtype == expected


def test_the_summary_names_sizes_loaders_and_place(
    checkpoint: Any, mixed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for the member and one for who can load it, with what padding costs."""
    extract(checkpoint.config(tmp_path / "small"))
    params = cost.parameters(checkpoint.parent.shape, checkpoint.member("small"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"small: {params:,} parameters (") and lines[0].endswith("hidden 8")
    assert lines[1] == f"native: {LOADERS['native']}"
    assert lines[2].startswith("verified:") and lines[3] == f"written to {tmp_path / 'small'}"
    extract(mixed.config(tmp_path / "mixed", "mixed", export="padded"))
    line = capsys.readouterr().out.splitlines()[1]
    true = cost.parameters(mixed.parent.shape, mixed.member("mixed"))
    stored = count(stock(tmp_path / "mixed"))
    assert line.startswith(f"padded: {LOADERS['padded']}: {stored:,} parameters are stored for")
    assert f"the {true:,} of the member ({stored / true - 1:+.1%})" in line
    extract(mixed.config(tmp_path / "true", "mixed", export="per_layer"))
    assert capsys.readouterr().out.splitlines()[1] == f"per_layer: {LOADERS['per_layer']}"


REFUSED = {
    "native, widths": (
        "mixed",
        "native",
        ["MLP widths: 8, 3", "query heads: 4, 2", "padded (", " or per_layer ("],
    ),
    "native, Mamba": (
        "uneven",
        "native",
        ["Mamba heads x channels: 4x6, 2x7", "must be per_layer ("],
    ),
    "padded, Mamba": (
        "uneven",
        "padded",
        ["(4x6, 2x7)", "not be zero-padded", "must be per_layer ("],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_hold_the_member_is_refused_with_the_others(
    checkpoint: Any, mixed: Any, tmp_path: Path, name: str
) -> None:
    """One line that says what differs, which form does it, and what that costs."""
    budget, export, words = REFUSED[name]
    written = mixed if budget == "mixed" else checkpoint
    with pytest.raises(ValueError, match=f"budget={budget}: export={export}: ") as caught:
        extract(written.config(tmp_path / "new" / "out", budget, export=export))
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and not list(tmp_path.iterdir())
    exact = cost.parameters(written.parent.shape, written.member(budget))
    for word in (*words, f"{exact:,}"):
        assert word in message
    if "padded (" in message:
        assert (
            f"padded ({open_member(written.path, budget, export='padded').stored_parameters:,} "
            in message
        )


@pytest.mark.parametrize("export", ["padded", "per_layer"])
def test_a_member_with_one_size_per_kind_is_native_in_any_case(
    checkpoint: Any, small: Path, tmp_path: Path, export: str
) -> None:
    output = extract(checkpoint.config(tmp_path / "out", export=export, verify=False))
    assert json.loads((output / "provenance.json").read_text())["export"] == "native"
    assert (output / "config.json").read_bytes() == (small / "config.json").read_bytes()


def test_an_output_without_room_is_refused_before_anything_is_written(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed and what is free; the disk is that of the nearest folder there is."""
    asked = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=4096)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    output = tmp_path / "new" / "out"
    with pytest.raises(OSError, match=r"out: needs 4\.2\d MB, but only 4,096 bytes are free there"):
        extract(checkpoint.config(output))
    assert asked == [tmp_path] and not list(tmp_path.iterdir())


def test_code_is_never_copied_nor_referred_to(checkpoint: Any, tmp_path: Path) -> None:
    """Neither Python files, nor what unpickles, nor auto_map in any JSON."""
    source = tmp_path / "elastic"
    shutil.copytree(checkpoint.path, source)
    remote = {"AutoTokenizer": ["tokenization_x.X", None]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        value = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(value | {"auto_map": remote}))
    for name in ("tokenizer_x.py", "modeling_x.py", "tokenizer.pkl"):
        (source / name).write_text("raise SystemExit\n")
    (source / "README.md").write_text("---\nlicense: mit\n---\nthe parent's own words\n")
    output = extract(replace(checkpoint.config(tmp_path / "out"), checkpoint=str(source)))
    assert not [path for path in output.iterdir() if path.suffix in (".py", ".pkl")]
    assert not [path for path in output.glob("*.json") if "auto_map" in path.read_text()]
    assert "the parent's own words" not in (output / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(output)("a member")["input_ids"]


def test_greedy_generation_is_the_same_with_and_without_cache(small: Path) -> None:
    """Also for steps far below the published time_step_min, which only one of the two clamps at."""
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


def test_an_unknown_budget_leaves_nothing(checkpoint: Any, tmp_path: Path) -> None:
    """Not even the folders above the output."""
    with pytest.raises(ValueError, match="budget=unknown"):
        extract(checkpoint.config(tmp_path / "new" / "folder" / "out", "unknown"))
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
