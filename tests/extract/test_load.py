"""`elastic.load` gives the extracted model, reads no more, and names what is wrong on disk."""

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import assert_near, random_tokens, tiny_shape
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

import elastic
from elastic.extract.export import extract
from elastic.extract.layerwise.model import NemotronHElasticForCausalLM
from elastic.members import cost
from elastic.members.architecture import Architecture
from elastic.storage.reading import StoredTensor


def stock(directory: Path, **options: Any) -> NemotronHForCausalLM:
    """What anyone gets without this package."""
    return NemotronHForCausalLM.from_pretrained(directory, local_files_only=True, **options).eval()


def assert_same_tensors(a: NemotronHForCausalLM, b: NemotronHForCausalLM) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("budget", ["full", "medium", "small"])
def test_loading_is_extracting_in_memory(checkpoint: Any, tmp_path: Path, budget: str) -> None:
    """Bit for bit the model that from_pretrained makes of the extracted directory."""
    extract(checkpoint.config(tmp_path / "out", budget))
    model, again = elastic.load(checkpoint.path, budget), stock(tmp_path / "out")
    assert type(model) is NemotronHForCausalLM and not model.training
    assert_same_tensors(model, again)
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    tokens = random_tokens(checkpoint.parent.shape)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert model.generation_config.to_dict() == again.generation_config.to_dict()
    assert model.generation_config.max_new_tokens == 5
    ours, theirs = model.config.to_dict(), again.config.to_dict()
    differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert differing <= {"_name_or_path"}


@pytest.mark.parametrize("budget", ["mixed", "uneven"])
def test_a_member_of_many_sizes_comes_at_true_size(
    checkpoint: Any, mixed: Any, budget: str
) -> None:
    """As a stock model's subclass, and it computes what the sliced parent computes."""
    written = mixed if budget == "mixed" else checkpoint
    tokens = random_tokens(written.parent.shape)
    model = elastic.load(str(written.path), budget)
    assert isinstance(model, NemotronHForCausalLM) and type(model) is NemotronHElasticForCausalLM
    params = sum(weight.numel() for weight in model.parameters())
    assert params == cost.parameters(written.parent.shape, written.member(budget))
    with torch.no_grad():
        assert_near(model(tokens).logits, written.parent.logits(tokens, written.member(budget)))


def assert_rounded(half: NemotronHForCausalLM, whole: NemotronHForCausalLM) -> None:
    """To bfloat16, but for the numbers of the scan: they are those of the file."""
    exact = dict(whole.named_parameters())
    for name, weight in half.named_parameters():
        kept = name.endswith(("A_log", ".D", "dt_bias"))
        assert weight.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(weight, exact[name].to(weight.dtype)), name


FORMS = [("small", "native"), ("mixed", "padded"), ("mixed", "per_layer"), ("uneven", "per_layer")]


@pytest.mark.parametrize(("budget", "export"), FORMS)
def test_an_exported_directory_loads_without_a_budget(
    checkpoint: Any, mixed: Any, reads: Any, tmp_path: Path, budget: str, export: str
) -> None:
    """The very model that transformers makes of it; every tensor is read once."""
    written = mixed if budget == "mixed" else checkpoint
    settings = {"export": export, "verify": False, "max_shard_bytes": 3000}
    output = extract(written.config(tmp_path / "out", budget, **settings))
    reads.bytes = 0
    model = elastic.load(output)
    assert reads.elements == sum(weight.numel() for weight in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(output, local_files_only=True).eval()
    assert type(model) is type(again) and not model.training
    assert (type(model) is NemotronHForCausalLM) == (export != "per_layer")
    assert_same_tensors(model, again)
    tokens = random_tokens(written.parent.shape)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    half = elastic.load(output, dtype="bfloat16")
    assert_rounded(half, model)
    assert half.config.dtype == torch.bfloat16


def test_a_budget_goes_with_an_elastic_checkpoint_only(checkpoint: Any, tmp_path: Path) -> None:
    """A missing one lists those there are, one too many is refused, each in one line."""
    output = extract(checkpoint.config(tmp_path / "out", verify=False))
    with pytest.raises(ValueError, match="budget: .* must be one of full, medium, small, uneven$"):
        elastic.load(checkpoint.path)
    with pytest.raises(ValueError, match="budget=small: .*out is a single model and loads without"):
        elastic.load(output, "small")
    for budget in (None, "small"):
        with pytest.raises(ValueError, match="nowhere"):
            elastic.load(tmp_path / "nowhere", budget)


BAD_LAYERS: dict[str, Any] = {
    "a layer too many": {"9": {"intermediate_size": 3}},
    "a word for a size": {"1": {"intermediate_size": "wide"}},
    "another size than is stored": {"1": {"intermediate_size": 4}},
    "a list": [3, 4],
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_damaged_sizes_per_layer_are_one_line(checkpoint: Any, tmp_path: Path, name: str) -> None:
    """Of config.json itself, or of the tensors that do not go with it."""
    settings = {"export": "per_layer", "verify": False}
    output = extract(checkpoint.config(tmp_path / "out", "uneven", **settings))
    edit_json("config.json", lambda e: e | {"per_layer_config": BAD_LAYERS[name]})(output)
    with pytest.raises(ValueError, match="out.*(makes no model|config.json gives)") as caught:
        elastic.load(output)
    assert len(str(caught.value).splitlines()) == 1


def test_budgets_of_one_directory_share_nothing(checkpoint: Any, reads: Any) -> None:
    """Each has memory of its own and reads its own bytes, whatever was loaded before."""
    models, counts = {}, []
    for budget in ("small", "medium", "small"):
        before = reads.elements
        model = elastic.load(checkpoint.path, budget)
        counts.append(reads.elements - before)
        assert counts[-1] == cost.parameters(checkpoint.parent.shape, checkpoint.member(budget))
        models[len(models)] = model
    places = [{weight.data_ptr() for weight in m.state_dict().values()} for m in models.values()]
    assert not places[0] & places[1] and not places[0] & places[2]
    with torch.no_grad():
        for weight in models[0].parameters():
            weight.zero_()
    assert_same_tensors(models[2], elastic.load(checkpoint.path, "small"))


DEVICES = ["cpu", torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_go_to_the_device_block_by_block(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    """Nothing of the model is in memory but blocks that were asked for one at a time; nothing is
    left on meta."""
    if str(device) == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    made, blocks = [], StoredTensor.blocks

    def small_blocks(self: StoredTensor, cut: Any, *_: Any) -> Iterator[torch.Tensor]:
        for block in blocks(self, cut, 200):
            made.append(weakref.ref(block))
            yield block
            del block
            alive = sum(reference() is not None for reference in made)
            assert alive <= 1, "the block before is gone when the next is read"

    monkeypatch.setattr(StoredTensor, "blocks", small_blocks)
    model = elastic.load(checkpoint.path, "medium", dtype="bfloat16", device=device)
    assert len(made) > 100
    where = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}
    assert where == {torch.device(device).type}
    monkeypatch.undo()
    assert_same_tensors(model.cpu(), elastic.load(checkpoint.path, "medium", "bfloat16"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "mps:x"])
def test_a_bad_device_is_one_line_and_nothing_is_read(
    checkpoint: Any, reads: Any, device: str
) -> None:
    with pytest.raises(ValueError, match=f"device={device}: must be .*cpu or cuda:0") as caught:
        elastic.load(checkpoint.path, "small", device=device)
    assert len(str(caught.value).splitlines()) == 1 and reads.bytes == 0


def test_loading_reads_the_members_elements_only(checkpoint: Any, reads: Any) -> None:
    model = elastic.load(checkpoint.path, "small")
    assert reads.elements == sum(weight.numel() for weight in model.parameters())
    assert reads.elements < sum(weight.numel() for weight in checkpoint.parent.parameters()) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype_converts(checkpoint: Any, dtype: torch.dtype | str) -> None:
    model = elastic.load(checkpoint.path, "small", dtype=dtype)
    assert_rounded(model, elastic.load(checkpoint.path, "small"))
    assert model.config.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(random_tokens(checkpoint.parent.shape)).logits.isfinite().all()


def test_a_bad_dtype_names_the_allowed(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="dtype=int8: must be one of source, float32, bfloat16, f"):
        elastic.load(checkpoint.path, "small", dtype=torch.int8)


def test_importing_elastic_imports_no_torch() -> None:
    """Settings are checked, and help is shown, without seconds of imports."""
    heavy = "'torch' in sys.modules or 'transformers' in sys.modules"
    code = f"import elastic, elastic.cli.command, sys; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage by changing a JSON file."""

    def damage(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def edit_shard(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Damage by changing the tensors of the first shard."""

    def damage(directory: Path) -> None:
        path = sorted(directory.glob("model-*.safetensors"))[0]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


def truncate(directory: Path) -> None:
    path = first_shard(directory)
    path.write_bytes(path.read_bytes()[:-7])


def small(entry: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = entry["budgets"]["small"]
    return found


EMBEDDING = "backbone.embeddings.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda d: (d / "elastic.json").unlink(), "elastic.json not found"),
    "half a manifest": (
        lambda d: (d / "elastic.json").write_text('{"format_version": 1, "budgets'),  # type: ignore
        "elastic.json: damaged",
    ),
    "manifest without budgets": (
        edit_json("elastic.json", lambda e: {"format_version": 1}),
        "elastic.json: damaged",
    ),
    "other format": (
        edit_json("elastic.json", lambda e: e | {"format_version": 3}),
        "format_version=3, this version reads 1 and 2",
    ),
    "too wide": (
        edit_json(
            "elastic.json", lambda e: (small(e)["architecture"].update(hidden_size=99), e)[1]
        ),
        "budget small: architecture: hidden_size=99 must be in 1..13",
    ),
    "other size": (
        edit_json("elastic.json", lambda e: (small(e).update(params=5), e)[1]),
        "params=5, but its architecture has",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: not found"),
    "config of another model": (
        edit_json("config.json", lambda e: e | {"model_type": "llama"}),
        "model_type=llama must be nemotron_h",
    ),
    "config is a list": (
        edit_json("config.json", lambda e: [e]),
        "must be a JSON object, not list",
    ),
    "config with a word for a size": (
        edit_json("config.json", lambda e: e | {"hidden_size": "wide"}),
        "config.json: hidden_size='wide': must be a whole number",
    ),
    "missing shard": (lambda d: first_shard(d).unlink(), "shard is missing"),
    "truncated shard": (truncate, "shard is truncated or damaged"),
    "damaged index": (
        edit_json("model.safetensors.index.json", lambda e: [e]),
        "index.json: damaged",
    ),
    "wrong shape": (
        edit_shard(lambda t: t.update({EMBEDDING: torch.ones(3, 2)})),
        r"tensor backbone.embeddings.weight has shape \(3, 2\), config.json gives \(40, 13\)",
    ),
    "missing tensor": (
        edit_shard(lambda t: t.pop(EMBEDDING)),
        f"has no tensor {EMBEDDING}, though",
    ),  # type: ignore
    "unknown tensor": (
        edit_shard(lambda t: t.update(extra=torch.ones(1))),
        "has no entry for tensor extra",
    ),
    "integers": (
        edit_shard(lambda t: t.update({EMBEDDING: t[EMBEDDING].int()})),
        "is stored as I32; must be one of F64, F32, BF16, F16",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(checkpoint: Any, tmp_path: Path, name: str) -> None:
    """`ValueError`, whose message says what is wrong with which file."""
    damage, message = DAMAGE[name]
    directory = tmp_path / "elastic"
    shutil.copytree(checkpoint.path, directory)
    damage(directory)
    with pytest.raises(ValueError, match=message) as caught:
        elastic.load(directory, "small")
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_budget_lists_the_known(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="budget=tiny: must be one of full, medium, small, uneven"):
        elastic.load(checkpoint.path, "tiny")


def test_a_head_that_is_not_stored_needs_a_tied_parent(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    """The embedding stands in for a tied head; an untied head that is absent is damage."""
    shape = tiny_shape(tied_head=True)
    full = Architecture.full(shape)
    directory = write(tmp_path / "elastic", shape, {"full": full}).path
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    model = elastic.load(directory, "full")
    assert torch.equal(model.lm_head.weight, model.model.embeddings.weight)
    assert sum(weight.numel() for weight in model.parameters()) == cost.parameters(shape, full)
    edit_json("config.json", lambda entry: entry | {"tie_word_embeddings": False})(directory)
    with pytest.raises(ValueError, match="tensor lm_head.weight is missing"):
        elastic.load(directory, "full")
