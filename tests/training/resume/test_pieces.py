"""Pieces: whoever wrote them, whoever reads them, every element comes back to where it was."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic.training.resume import Pieces, load_state, local_pieces

Model = tuple[nn.Module, torch.optim.Optimizer]


def written(directory: Path, *files: dict[str, Tensor]) -> Pieces:
    paths = [directory / f"{number}.safetensors" for number in range(len(files))]
    for path, tensors in zip(paths, files, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return Pieces(paths)


def model(dtype: torch.dtype = torch.float32, steps: int = 0, fused: bool = True) -> Model:
    """Weights of odd sizes, one of them smaller than there are processes; trained a little."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 1)).to(dtype)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, fused=fused)
    for step in range(steps):
        train(layers, optimizer, step)
    return layers, optimizer


def train(layers: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 7, generator=generator).to(next(layers.parameters()).dtype)
    optimizer.zero_grad()
    layers(x).square().mean().backward()
    optimizer.step()


def pieces_of(one: Model, world_size: int) -> tuple[list[dict[str, Tensor]], int]:
    """What each of so many processes writes, and the number of steps they all tell."""
    files, steps = [], set()
    for rank in range(world_size):
        pieces, step = local_pieces(*one, rank, world_size)
        files.append(pieces)
        steps.add(step)
    (step,) = steps
    return files, step


def tensors(one: Model) -> Iterator[tuple[str, Tensor]]:
    layers, optimizer = one
    for name, weight in layers.named_parameters():
        yield name, weight
        for key, value in optimizer.state[weight].items():
            yield f"{key} of {name}", value


def assert_same(one: Model, other: Model) -> None:
    """Weights, moments and steps, bit for bit, in type too."""
    mine, wanted = dict(tensors(one)), dict(tensors(other))
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name


# Round trips


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 100])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(
    world_size: int, dtype: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    """Bit for bit, however many processes have shared the writing; then it is trained on."""
    one = model(dtype, steps=3, fused=fused)
    files, steps = pieces_of(one, world_size)
    pieces = written(tmp_path, *files)
    assert steps == 3
    other = model(dtype, steps=0, fused=fused)
    pieces.load_weights(other[0])
    load_state(*other, pieces, steps, rank=0)
    assert_same(other, one)
    train(*one, step=3)
    train(*other, step=3)
    assert_same(other, one)


def test_what_is_loaded_replaces_what_was_there(tmp_path: Path) -> None:
    one, other = model(steps=2), model(steps=5)
    files, steps = pieces_of(one, 2)
    pieces = written(tmp_path, *files)
    pieces.load_weights(other[0])
    load_state(*other, pieces, steps, rank=0)
    assert_same(other, one)


def test_before_the_first_step_there_are_weights_alone(tmp_path: Path) -> None:
    one = model()
    (file,), steps = pieces_of(one, 1)
    assert steps == 0 and all(key.startswith("weight:") for key in file)
    other = model(steps=0)
    load_state(*other, written(tmp_path, file), steps, rank=0)
    assert_same(other, one)


def test_processes_share_the_writing_fairly_and_nothing_twice() -> None:
    one = model(steps=1)
    files, _ = pieces_of(one, 3)
    assert len({key for file in files for key in file}) == sum(len(file) for file in files)
    sizes = [sum(tensor.numel() for tensor in file.values()) for file in files]
    everything = 3 * sum(weight.numel() for weight in one[0].parameters())
    assert sum(sizes) == everything and max(sizes) - min(sizes) < 0.1 * everything


def test_what_is_written_is_a_view() -> None:
    """No second copy of the model in memory."""
    one = model(steps=1)
    (file,), _ = pieces_of(one, 1)
    for name, weight in one[0].named_parameters():
        assert file[f"weight:{name}:0"].data_ptr() == weight.data_ptr()
        moment = one[1].state[weight]["exp_avg"]
        assert file[f"exp_avg:{name}:0"].data_ptr() == moment.data_ptr()


# Partitioned


class Flat(torch.optim.Optimizer):
    """What is partitioned as DeepSpeed does it: AdamW steps one flat float32 range per process."""

    def __init__(self, layers: nn.Module, stage: int, rank: int, world_size: int) -> None:
        weights = list(layers.parameters())
        if stage == 3:  # a share of every weight, padded
            sizes = [-(-weight.numel() // world_size) for weight in weights]
            self.fp32_partitioned_groups_flat = [torch.zeros(sum(sizes)).requires_grad_()]
            self.owned = self.fp32_partitioned_groups_flat
            places = [sum(sizes[:number]) for number in range(len(sizes))]
            self.grad_position = {
                number: (0, place, size)
                for number, (place, size) in enumerate(zip(places, sizes, strict=True))
            }
            self.numbers = {id(weight): number for number, weight in enumerate(weights)}
            for weight in weights:
                weight.ds_numel = weight.numel()
        else:  # a share of all weights, one after another
            total = sum(weight.numel() for weight in weights)
            size = -(-total // world_size)
            self.bit16_groups = [weights]
            self.single_partition_of_fp32_groups = [torch.zeros(size).requires_grad_()]
            self.owned = self.single_partition_of_fp32_groups
            first = 0
            for weight in weights:
                start, stop = first, first + weight.numel()
                low, high = max(start, rank * size), min(stop, (rank + 1) * size)
                low_address = SimpleNamespace(start=low - start, numel=high - low)
                high_address = SimpleNamespace(start=low - rank * size)
                weight._hp_mapping = None
                if low < high:
                    weight._hp_mapping = SimpleNamespace(
                        lp_fragment_address=low_address, hp_fragment_address=high_address
                    )
                first = stop
        self.optimizer = torch.optim.AdamW(self.owned)

    def get_param_id(self, weight: nn.Parameter) -> int:
        return self.numbers[id(weight)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_plain_optimizer_goes_into_shares_and_comes_back(
    stage: int, world_size: int, tmp_path: Path
) -> None:
    """Plain, partitioned, plain: bit for bit; and the masters come from the checkpoint, not from
    the rounded weights that the forward pass reads."""
    one = model(steps=3)
    files, steps = pieces_of(one, 2)
    pieces = written(tmp_path, *files)
    shares = []
    for rank in range(world_size):
        layers = model(torch.bfloat16)[0]
        share = Flat(layers, stage, rank, world_size)
        load_state(layers, share, pieces, steps, rank)
        part, found = local_pieces(layers, share, rank, world_size)
        assert found == 3 and all(tensor.dtype == torch.float32 for tensor in part.values())
        shares.append(part)
    (tmp_path / "shares").mkdir()
    gathered = written(tmp_path / "shares", *shares)
    other = model()
    gathered.load_weights(other[0])
    load_state(*other, gathered, 3, rank=0)
    assert_same(other, one)


# Ranges


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int], int, int, int]:
    """A size, where it is cut, among how many files, and a range to read."""
    size = draw(st.integers(1, 40))
    inner = draw(st.sets(st.integers(1, max(1, size - 1)), max_size=8))
    places = sorted({0, size} | {place for place in inner if place < size})
    start = draw(st.integers(0, size - 1))
    return size, places, draw(st.sampled_from([1, 2, 3, 5])), start, draw(st.integers(1, size))


@given(cuts())
def test_any_range_is_put_together_from_any_cuts(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[int, list[int], int, int, int]
) -> None:
    """A range that reaches past the end is refused."""
    size, places, count, start, wanted = drawn
    whole = torch.arange(size, dtype=torch.float32)
    files: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for number, (first, last) in enumerate(pairwise(places)):
        files[number % count][f"weight:w:{first}"] = whole[first:last]
    pieces = written(tmp_path_factory.mktemp("cuts"), *files)
    if start + wanted <= size:
        assert torch.equal(pieces.read("weight", "w", start, wanted), whole[start : start + wanted])
    else:
        with pytest.raises(ValueError, match=f"weight of w has no elements from {size} on"):
            pieces.read("weight", "w", start, wanted)


def test_a_gap_is_refused(tmp_path: Path) -> None:
    pieces = written(tmp_path, {"weight:w:0": torch.zeros(3)}, {"weight:w:5": torch.zeros(3)})
    assert pieces.read("weight", "w", 1, 2).shape == (2,)
    for start, count in ((0, 4), (2, 4), (3, 1), (4, 2)):
        missing = max(start, 3)
        with pytest.raises(ValueError, match=f"no elements from {missing} on"):
            pieces.read("weight", "w", start, count)
    with pytest.raises(ValueError, match="exp_avg of w has no elements from 0 on"):
        pieces.read("exp_avg", "w", 0, 1)
    with pytest.raises(ValueError, match="weight of v has no elements from 0 on"):
        pieces.read("weight", "v", 0, 1)


def test_a_weight_has_the_shape_and_type_that_it_had(tmp_path: Path) -> None:
    whole = torch.randn(3, 5).bfloat16()
    flat = whole.flatten()
    pieces = written(tmp_path, {"weight:w:0": flat[:4]}, {"weight:w:4": flat[4:]})
    assert pieces.dtype("w") == torch.bfloat16
    assert torch.equal(pieces.weight("w", (3, 5)), whole)
