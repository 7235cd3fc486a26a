"""Any part of a stored tensor, read by byte ranges: the plain twin is indexing in memory."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from elastic.members.cut import Ranges
from elastic.storage import reading, seals
from elastic.storage.index import INDEX
from elastic.storage.opened import OpenFile
from elastic.storage.seals import SealBroken, Seals
from elastic.storage.store import WHOLE, TensorStore

SHAPES = {"matrix": (23, 37), "vector": (41,), "taps": (19, 1, 4), "half": (23, 37)}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    values["half"] = values["half"].bfloat16()
    directory = tmp_path_factory.mktemp("offline")
    save_file(values, directory / "model.safetensors")
    return directory, values


def flat(ranges: Ranges | None, size: int) -> list[int]:
    spans = ((0, size),) if ranges is None else ranges
    return [index for start, stop in spans for index in range(start, stop)]


@st.composite
def ranges_of(draw: st.DrawFn, size: int, ascending: bool) -> Ranges | None:
    """Any disjoint ranges, or None for all."""
    if draw(st.booleans()):
        return None
    ends = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=8)))
    ranges = list(zip(ends[::2], ends[1::2], strict=False))
    return tuple(ranges if ascending else draw(st.permutations(ranges)))


@given(st.data(), st.sampled_from(["matrix", "half"]), st.sampled_from([1, 200, 10**6]))
@pytest.mark.parametrize("sealed", [0, 64, 1 << 20])
@pytest.mark.parametrize("gap", [0, 20, 256])
@pytest.mark.parametrize(("page", "spare"), [(0, 0.0), (0, 0.1), (4096, 0.1)])
def test_rows_in_any_order_and_ascending_columns(
    tensors: tuple[Path, dict[str, torch.Tensor]],
    page: int,
    spare: float,
    gap: int,
    sealed: int,
    data: st.DataObject,
    name: str,
    block_bytes: int,
) -> None:
    """Equal to indexing, in blocks no larger than asked, in memory of their own; sealed in blocks
    of any size, or not at all."""
    directory, values = tensors
    rows = data.draw(ranges_of(23, ascending=False))
    columns = data.draw(ranges_of(37, ascending=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "GAP_BYTES", gap)
        patch.setattr(reading, "PAGE_BYTES", page)
        patch.setattr(reading, "SPARE", spare)
        patch.setattr(seals, "BLOCK_BYTES", sealed or seals.BLOCK_BYTES)
        found = Seals.of(directory) if sealed else None
        stored = TensorStore(directory, SHAPES, found)[name]
        blocks = list(stored.blocks((rows, columns), block_bytes))
        whole = stored.read((rows, columns))
    expected = values[name][flat(rows, 23)][:, flat(columns, 37)]
    assert torch.equal(torch.cat(blocks), expected) and torch.equal(whole, expected)
    for block in blocks:
        assert block.dtype == values[name].dtype
        assert len(block) == 1 or block.numel() * block.element_size() <= block_bytes


@pytest.mark.parametrize(
    ("width", "columns", "whole"),
    [
        (1024, ((0, 300),), True),  # a row of one page
        (1025, ((0, 300),), False),
        (3000, ((0, 2728),), True),  # a tenth more than is kept
        (3000, ((0, 2727),), False),
        (3000, ((0, 100), (150, 2700)), False),  # read in one piece, since the gap is small
    ],
)
def test_what_is_read_exceeds_what_is_kept_within_bounds(
    tmp_path: Path, width: int, columns: Ranges, whole: bool
) -> None:
    """Kept rows alone; in whole rows no system call for each; else at most the gaps more."""
    save_file({"a": torch.randn(40, width)}, tmp_path / WHOLE)
    stored = TensorStore(tmp_path, {"a": (40, width)})["a"]
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        read = OpenFile._read

        def counting(self: OpenFile, buffer: memoryview, offset: int) -> None:
            calls.append(len(buffer))
            read(self, buffer, offset)

        patch.setattr(OpenFile, "_read", counting)
        stored.read((((20, 35), (3, 5)), columns))
    kept = sum(stop - start for start, stop in columns)
    if whole:
        assert calls == [15 * width * 4, 2 * width * 4]
        assert width * 4 <= reading.PAGE_BYTES or width <= 1.1 * kept
    else:
        gaps = (len(columns) - 1) * reading.GAP_BYTES
        assert len(calls) == 17 and sum(calls) <= 17 * (kept * 4 + gaps)


@pytest.mark.parametrize("name", ["vector", "taps"])
def test_other_ranks_are_cut_by_rows(
    tensors: tuple[Path, dict[str, torch.Tensor]], name: str
) -> None:
    directory, values = tensors
    stored, rest = TensorStore(directory, SHAPES)[name], (None,) * (len(SHAPES[name]) - 1)
    rows = ((11, 17), (2, 3))
    assert torch.equal(stored.read((rows, *rest)), values[name][flat(rows, 0)])
    assert torch.equal(stored.read(), values[name])
    assert torch.equal(stored.read(dtype=torch.bfloat16), values[name].bfloat16())


def two_shards(directory: Path) -> dict[str, str]:
    """Two files and their index; returns the weight map."""
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, directory / "one.safetensors")
    save_file({"c": torch.zeros(4)}, directory / "two.safetensors")
    return {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def moved(weight_map: dict[str, str]) -> None:
    weight_map["b"] = "two.safetensors"


BAD_INDEX: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "no entry": (lambda m: m.pop("b"), "index.json: has no entry for tensor b of one.safetensors"),
    "no tensor": (lambda m: m.update(d="two.safetensors"), "two.safetensors: has no tensor d"),
    "another file": (moved, "puts tensor b into two.safetensors, but it is in one.safetensors"),
    "no file": (lambda m: m.update(d="three.safetensors"), "three.safetensors: shard is missing"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_an_index_that_disagrees_with_the_shards(tmp_path: Path, name: str) -> None:
    change, message = BAD_INDEX[name]
    weight_map = two_shards(tmp_path)
    expected = {"a": (2,), "b": (3,), "c": (4,)}
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert set(TensorStore(tmp_path, expected)) == set(expected)
    change(weight_map)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        TensorStore(tmp_path, expected)


def test_layers_for_multi_token_prediction_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"a": torch.zeros(2), "mtp.layers.0.w": torch.zeros(3)}, tmp_path / WHOLE)
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert set(TensorStore(tmp_path, {"a": (2,)})) == {"a"}
    said = "1 tensors of multi-token prediction are left out (mtp.layers.0.w"
    assert caplog.text.count(said) == 1, "once, however often the parent is opened"


def test_without_an_index_one_file_is_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An optimizer's state or averaged weights of the same names lie beside it."""
    save_file({"a": torch.ones(2)}, tmp_path / WHOLE)
    for name in ("ema", "optimizer", "zz"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    save_file({"r": torch.zeros(2)}, tmp_path / "router.safetensors")
    with caplog.at_level("INFO"):
        assert TensorStore(tmp_path, {"a": (2,)})["a"].read().tolist() == [1, 1]
    said = "model.safetensors is read, not ema.safetensors, optimizer.safetensors, zz.safetensors"
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [said]
    (tmp_path / WHOLE).unlink()
    with pytest.raises(ValueError, match="no model weights found: neither model.safetensors nor"):
        TensorStore(tmp_path, {"a": (2,)})


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Whichever the index means, the other one is somebody's mistake."""
    weight_map = two_shards(tmp_path)
    name = next(name for name, file in weight_map.items() if file == "one.safetensors")
    two = load_file(tmp_path / "two.safetensors")
    save_file(two | {name: torch.zeros(1)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"tensor {name} is in one.safetensors and in two.safe"):
        TensorStore(tmp_path, {"a": (2,), "b": (3,), "c": (4,)})


@pytest.mark.parametrize(
    ("stored", "hint"),
    [
        (["model.a"], r"a is missing .*; model\.\* is what transformers calls them in memory"),
        (["a", "layers.0.rotary_emb.inv_freq"], r"inv_freq \(1 in all\); .*buffer .* remove it$"),
        (["a", "z"], r"unknown tensor z \(1 in all\)$"),
    ],
    ids=["memory", "rotary", "none"],
)
def test_names_from_elsewhere_get_a_hint(tmp_path: Path, stored: list[str], hint: str) -> None:
    save_file({name: torch.zeros(2) for name in stored}, tmp_path / WHOLE)
    with pytest.raises(ValueError, match=hint):
        TensorStore(tmp_path, {"a": (2,)})


def test_other_tensors_and_types_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "z": torch.zeros(3)}, tmp_path / WHOLE)
    with pytest.raises(ValueError, match="unknown tensor z"):
        TensorStore(tmp_path, {"a": (2,)})
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / WHOLE)
    with pytest.raises(ValueError, match="tensor a is stored as I8; must be one of F64, F32, BF16"):
        TensorStore(tmp_path, {"a": (2,)})


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    """Never zeros in place of what is gone."""
    save_file({"a": torch.zeros(100)}, tmp_path / WHOLE)
    store = TensorStore(tmp_path, {"a": (100,)})
    with (tmp_path / WHOLE).open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ValueError, match="model.safetensors: shard is truncated"):
        store["a"].read()


def test_a_flipped_bit_is_named_with_its_tensor(tmp_path: Path) -> None:
    """Headers are compared at once, data where it is read; the other tensor is read as it is."""
    save_file({"a": torch.zeros(2000), "b": torch.ones(2000)}, tmp_path / "model.safetensors")
    expected: dict[str, tuple[int, ...]] = {"a": (2000,), "b": (2000,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seals, "BLOCK_BYTES", 512)
        Seals.of(tmp_path).write()
        content = bytearray((tmp_path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (tmp_path / "model.safetensors").write_bytes(content)
        store = TensorStore(tmp_path, expected)
        assert torch.equal(store["a"].read(), torch.zeros(2000))
        with pytest.raises(SealBroken, match="safetensors: block .* seen in tensor b; restore"):
            store["b"].read()
        content[20] ^= 1
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(SealBroken, match="model.safetensors: block 0 .* seen in the header"):
            TensorStore(tmp_path, expected)


@given(st.data(), st.sampled_from(list(reading.DTYPES.values())))
def test_finite_is_what_torch_calls_finite(data: st.DataObject, dtype: torch.dtype) -> None:
    """Of any bits: the largest numbers, those too small to be normal, every kind of NaN."""
    integers, infinite = reading.INTEGERS[dtype]
    most = 1 << (8 * dtype.itemsize - 1)
    near = [infinite - most + d for d in (-1, 0, 1)] + [infinite + d for d in (-1, 0, 1)]
    ends = [*near, -most, -1, 0, 1, most - 1]
    bits = st.one_of(st.sampled_from(ends), st.integers(-most, most - 1))
    values = torch.tensor(data.draw(st.lists(bits, max_size=5)), dtype=integers).view(dtype)
    assert reading.all_finite(values) == bool(values.isfinite().all())
    spread = torch.stack((values, values), dim=1)[:, 0]  # not contiguous
    assert reading.all_finite(spread) == bool(values.isfinite().all())


VALUES = (math.nan, -math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", reading.DTYPES.values(), ids=str)
@pytest.mark.parametrize("value", VALUES, ids=["nan", "-nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_named_wherever_it_is(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    """With its tensor and row, whole or in a cut, first or last in its block."""
    for row, column in ((0, 0), (7, 12), (22, 36)):
        weight = torch.randn(23, 37).to(dtype)
        weight[row, column] = value
        save_file({"a": weight}, tmp_path / WHOLE)
        stored = TensorStore(tmp_path, {"a": (23, 37)})["a"]
        line = rf"model\.safetensors: tensor a has -?(nan|inf) in row {row}; weights must be finite"
        cuts = (None, (((20, 23), (0, 9)), None), (None, ((0, 1), (12, 13), (30, 37))))
        for cut in cuts:
            for block_bytes in (200, 10**6):
                with pytest.raises(ValueError, match=line):
                    list(stored.blocks(cut, block_bytes))


def test_a_cut_checks_what_it_keeps_and_no_more(tmp_path: Path) -> None:
    """Nor what is read because it lies in a gap; the largest finite values are finite."""
    for dtype in reading.DTYPES.values():
        weight = torch.full((4, 6), torch.finfo(dtype).max, dtype=dtype)
        weight[:, 1] = torch.finfo(dtype).min
        weight[2], weight[:, 3] = math.nan, math.inf
        save_file({"a": weight}, tmp_path / WHOLE)
        stored = TensorStore(tmp_path, {"a": (4, 6)})["a"]
        kept = stored.read((((3, 4), (0, 2)), ((0, 3), (4, 6))))
        assert torch.equal(kept, weight[[3, 0, 1]][:, [0, 1, 2, 4, 5]])
