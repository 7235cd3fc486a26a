"""The stream is a pure function of where it stands: ranks share it, and resuming goes on in it."""

from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from elastic.config import ConfigError
from elastic.data.datamodule import TextDataModule, permutation

LENGTH = 4
SEQUENCES = 50
TOKENS = np.arange(SEQUENCES * LENGTH + 1, dtype=np.uint16)  # so a window's number is readable


def make(**settings: Any) -> TextDataModule:
    defaults: dict[str, Any] = dict(
        train=TOKENS,
        validation=TOKENS,
        sequence_length=LENGTH,
        batch_sequences=3,
        validation_sequences=7,
        validation_batch=3,
        seed=5,
        stage_name="elastic",
    )
    return TextDataModule(**(defaults | settings))


def batches(count: int, **settings: Any) -> list[Tensor]:
    return list(islice(make(**settings).train_dataloader(), count))


def numbers(batches: list[Tensor]) -> list[int]:
    """Which windows these are, in order."""
    return (torch.cat(batches)[:, 0] // LENGTH).tolist()


def test_batches_are_whole_windows() -> None:
    for batch in batches(40):
        assert batch.shape == (3, LENGTH + 1) and batch.dtype == torch.int64
        torch.testing.assert_close(batch - batch[:, :1], torch.arange(LENGTH + 1).expand(3, -1))
        assert (batch[:, 0] % LENGTH == 0).all()


def test_an_epoch_is_every_sequence_once_in_another_order_each_time() -> None:
    seen = numbers(batches(50))  # 150 sequences: three epochs, their borders inside batches
    epochs = [seen[start : start + SEQUENCES] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(SEQUENCES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(SEQUENCES))


@pytest.mark.parametrize("start", [1, 16, 17, 40])
def test_starting_later_is_going_on(start: int) -> None:
    whole = batches(start + 20, rank=1, world_size=2)
    late = batches(20, rank=1, world_size=2, start_micro_step=start)
    torch.testing.assert_close(torch.stack(late), torch.stack(whole[start:]))


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_repeated_batch_is_the_same_text_and_the_next_one_follows(repeats: int) -> None:
    """However often batches repeat, the text comes in the same order, border of epochs included."""
    plain = torch.stack(batches(20, rank=1, world_size=2))
    repeated = torch.stack(batches(20 * repeats, rank=1, world_size=2, repeats=repeats))
    torch.testing.assert_close(repeated, plain.repeat_interleave(repeats, dim=0))


@pytest.mark.parametrize("start", range(8))
def test_a_stream_goes_on_between_the_repeats_of_a_batch(start: int) -> None:
    whole = batches(start + 10, repeats=3)
    late = batches(10, repeats=3, start_micro_step=start)
    torch.testing.assert_close(torch.stack(late), torch.stack(whole[start:]))


def test_ranks_share_one_stream_and_never_overlap_within_an_epoch() -> None:
    ranks = [batches(10, rank=rank, world_size=3, batch_sequences=2) for rank in range(3)]
    one = batches(10, batch_sequences=6)
    for micro_step in range(10):
        together = torch.cat([rank[micro_step] for rank in ranks])
        torch.testing.assert_close(together, one[micro_step])
    first_epoch = numbers([rank[m] for rank in ranks for m in range(8)])  # 48 of 50 sequences
    assert len(set(first_epoch)) == len(first_epoch) == 48


@pytest.mark.parametrize("other", [{"seed": 6}, {"stage_name": "short"}])
def test_seed_and_stage_choose_the_order(other: dict[str, Any]) -> None:
    assert numbers(batches(5)) == numbers(batches(5))
    assert numbers(batches(5)) != numbers(batches(5, **other))


def test_the_order_does_not_touch_or_follow_the_global_generator() -> None:
    torch.manual_seed(0)
    first = permutation(1, "a", 0, 10)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert permutation(1, "a", 0, 10).tolist() == first.tolist()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_of_an_epoch_is_pinned() -> None:
    """A run must resume into the order that it left, in later versions too."""
    assert permutation(0, "elastic", 0, 8).tolist() == [2, 0, 1, 4, 3, 6, 7, 5]


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (7, 7), (50, 50), (80, 50)])
def test_validation_is_fixed_and_spread_evenly(asked: int, given: int) -> None:
    module = make(validation_sequences=asked)
    chosen = numbers(list(module.val_dataloader()))
    assert chosen == numbers(list(module.val_dataloader()))
    assert chosen == numbers(list(make(validation_sequences=asked, seed=9).val_dataloader()))
    assert len(chosen) == given and chosen[0] == 0
    gaps = np.diff([*chosen, SEQUENCES])
    assert gaps.min() >= SEQUENCES // given and gaps.max() <= -(-SEQUENCES // given)
    assert all(len(batch) <= 3 for batch in module.val_dataloader())


@pytest.mark.parametrize("which", ["train", "validation"])
def test_text_shorter_than_a_sequence_stops_at_once(which: str) -> None:
    text = {"train": "training text", "validation": "validation text"}[which]
    message = rf"^curriculum\.stages\.elastic\.sequence_length=4: .* the {text}, .*4 tokens"
    with pytest.raises(ConfigError, match=message):
        make(**{which: TOKENS[:LENGTH]})


class Recorder(L.LightningModule):
    """Keeps what Lightning hands to a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


@pytest.mark.filterwarnings("ignore")
def test_lightning_passes_the_stream_on_unchanged() -> None:
    module = Recorder()
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=make(start_micro_step=2))
    torch.testing.assert_close(torch.stack(module.batches), torch.stack(batches(5)[2:]))


@pytest.mark.parametrize("wrong", ["train", "validation"])
def test_batches_are_held_against_the_vocabulary(wrong: str) -> None:
    """Of the text that has the token; the other one gives its batches."""
    right = {"train": "validation", "validation": "train"}[wrong]
    settings: dict[str, Any] = {right: TOKENS % 7}
    module = make(vocabulary=7, **settings)
    loaders = {"train": module.train_dataloader(), "validation": module.val_dataloader()}
    assert len(list(islice(loaders[right], 3))) == 3
    with pytest.raises(ConfigError, match=r"text: has token \d+, the parent's vocabulary is 7; "):
        list(islice(loaders[wrong], 3))
