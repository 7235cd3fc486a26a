"""Signals that ask a run to stop: real processes, real Lightning fits, real signals."""

import gc
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.cluster_processes import Processes, processes, wait_until_allowed
from helpers.waiting import until
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from elastic.cluster.place import Place, PlaceEnvironment, wait_for_all
from elastic.cluster.rendezvous import joined
from elastic.cluster.signals import AgreedExit, StopOnSignal, StopSignals, agree, exit_code

CPU = torch.device("cpu")
CODES = {signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGTERM: 143}

Tell = Callable[[str], None]


class Tiny(L.LightningModule):
    """One weight, two passes per step."""

    def __init__(self, tell: Tell, signal_at: int = 0) -> None:
        super().__init__()
        self.weight, self.passes = torch.nn.Parameter(torch.ones(1)), 0
        self.tell, self.signal_at = tell, signal_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.002)
        self.passes += 1
        if self.passes == self.signal_at:
            signal.raise_signal(signal.SIGUSR1)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)

    def on_train_start(self) -> None:
        self.tell("training")


def fit(rank: int, count: int, tell: Tell, how: str) -> None:
    """A run of one weight.

    how:
      forever  steps without end
      slow     and saving takes as long as the test wants
      before   waits before the fit
      odd      rank 1 receives SIGUSR1 in the first pass of a step, its 21st
      last     three steps, and rank 0 receives SIGUSR1 when they are done
      plain    three steps
    """

    def save(trainer: L.Trainer, module: Tiny) -> None:
        tell(f"saving {module.passes}")
        if how == "slow":
            wait_until_allowed("the end of saving")
        wait_for_all()
        tell("saved")

    class Late(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if rank == 0:
                signal.raise_signal(signal.SIGUSR1)

    place = Place(rank, rank, count, count)
    torch.set_num_threads(1)
    with StopSignals() as signals, joined(place, CPU, "test"):
        if how == "before":
            tell("before")
            wait_until_allowed("anything")
        strategy: Any = SingleDeviceStrategy(CPU)
        if count > 1:
            strategy = DDPStrategy(cluster_environment=PlaceEnvironment(place))
        stop = StopOnSignal(signals, lambda module: module.passes % 2 == 0, save)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=count,
            strategy=strategy,
            max_steps=3 if how in ("last", "plain") else -1,
            max_epochs=-1,
            accumulate_grad_batches=2,
            callbacks=[signals, *([Late()] if how == "last" else []), stop],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Tiny(tell, 21 if how == "odd" and rank == 1 else 0)
        try:
            trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(9999), batch_size=1))
            tell("trained")
        except SystemExit as stopped:
            tell(f"{type(stopped).__name__} {stopped.code}")
            raise


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_all_processes_save_at_the_same_step_and_leave_with_one_code(
    number: signal.Signals, count: int, tmp_path: Path
) -> None:
    """Though only one process is asked."""
    with processes(tmp_path, fit, count, "forever") as run:
        run.wait_until("training")
        time.sleep(0.1)
        run.send(count - 1, number)
        assert run.codes() == [CODES[number]] * count
        told = run.told(0)
        assert told == ["training", told[1], "saved", f"AgreedExit {CODES[number]}"]
        assert all(run.told(rank) == told for rank in range(count))
        errors = "".join(run.errors(rank) for rank in range(count))
        assert errors.count("a checkpoint is written; the same command goes on") == 1
        assert number.name in errors and "Traceback" not in errors


def is_saving(run: Processes) -> bool:
    return any(line.startswith("saving") for line in run.told(0))


def test_the_step_that_has_begun_is_finished_first(tmp_path: Path) -> None:
    with processes(tmp_path, fit, 2, "odd") as run:
        assert run.codes() == [75, 75]
        for rank in (0, 1):
            assert run.told(rank) == ["training", "saving 22", "saved", "AgreedExit 75"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_does_not_wait_for_the_checkpoint(
    number: signal.Signals, tmp_path: Path
) -> None:
    with processes(tmp_path, fit, 1, "slow") as run:
        run.wait_until("training")
        run.send(0, number)
        until(lambda: is_saving(run))
        run.send(0, number)
        assert run.codes() == [CODES[number]]
        assert run.told(0)[-1] == f"SystemExit {CODES[number]}" and "saved" not in run.told(0)


def test_sigterm_lets_a_checkpoint_that_sigusr1_asked_for_be_finished(tmp_path: Path) -> None:
    """Slurm sends both, one after the other."""
    with processes(tmp_path, fit, 1, "slow") as run:
        run.wait_until("training")
        run.send(0, signal.SIGUSR1)
        until(lambda: is_saving(run))
        run.send(0, signal.SIGTERM)
        run.allow("the end of saving")
        assert run.codes() == [75]
        assert run.told(0)[-2:] == ["saved", "AgreedExit 75"]


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_outside_a_fit_a_run_leaves_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with processes(tmp_path, fit, 1, "before") as run:
        run.wait_until("before")
        run.send(0, number)
        assert run.codes() == [CODES[number]]
        assert run.told(0) == ["before"]


def test_a_signal_after_the_last_step_is_not_forgotten(tmp_path: Path) -> None:
    """While the end of the stage is measured and saved, which need not be done again."""
    with processes(tmp_path, fit, 2, "last") as run:
        assert run.codes() == [75, 75]
        assert run.told(0) == run.told(1) == ["training", "AgreedExit 75"]


def test_without_a_signal_a_fit_ends_as_ever(tmp_path: Path) -> None:
    with processes(tmp_path, fit, 2, "plain") as run:
        assert run.codes() == [0, 0]
        assert run.told(0) == ["training", "trained"]


def vote(rank: int, count: int, tell: Tell, votes: list[signal.Signals | None]) -> None:
    with joined(Place(rank, rank, count, count), CPU, "test"):
        tell(str(agree(votes[rank], CPU)))


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        ([None, None], None),
        ([None, signal.SIGUSR1], signal.SIGUSR1),
        ([signal.SIGTERM, signal.SIGUSR1], signal.SIGTERM),
    ],
)
def test_everybody_hears_of_what_anybody_received(
    votes: list[signal.Signals | None], outcome: signal.Signals | None, tmp_path: Path
) -> None:
    with processes(tmp_path, vote, 2, votes) as run:
        assert run.codes() == [0, 0]
        assert run.told(0) == run.told(1) == [str(outcome)]


def test_a_single_process_asks_nobody() -> None:
    assert agree(signal.SIGUSR1, CPU) is signal.SIGUSR1 and agree(None, CPU) is None


# The handlers


def test_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number in CODES]
    with StopSignals():
        assert [signal.getsignal(number) for number in CODES] != before
    assert [signal.getsignal(number) for number in CODES] == before


def test_native_code_cannot_change_what_a_signal_raises() -> None:
    """As torch does in a broadcast, when it asks a storage for its length."""

    def ask() -> None:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except SystemExit:
            raise ValueError("could not determine the shape") from None

    with StopSignals() as signals, pytest.raises(SystemExit) as left, signals.kept():
        ask()
    assert left.value.code == 75 and isinstance(left.value.__cause__, ValueError)
    with StopSignals() as signals, pytest.raises(ValueError, match="its own"), signals.kept():
        raise ValueError("its own")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_native_code_has_dropped_still_waits() -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGUSR1)

    with StopSignals() as signals:
        Dying()
        gc.collect()
        assert signals.requested is signal.SIGUSR1


def test_after_an_agreement_signals_change_nothing() -> None:
    """srun sends SIGTERM to whoever has not left when the first one has."""
    before = {number: signal.getsignal(number) for number in CODES}
    try:
        with pytest.raises(AgreedExit), StopSignals() as signals:
            signals.ended = True
            signal.raise_signal(signal.SIGTERM)
            raise AgreedExit(75)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_first_signal_is_remembered() -> None:
    with StopSignals() as signals:
        signals.held = True
        assert signals.requested is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested is signal.SIGUSR1


@pytest.mark.parametrize("first", CODES, ids=lambda number: number.name)
def test_a_second_ctrl_c_leaves_whatever_was_asked_before(first: signal.Signals) -> None:
    with StopSignals() as signals:
        signals.held = True
        signal.raise_signal(first)
        if first != signal.SIGINT:
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGINT)
        assert left.value.code == 130 and signals.requested is first


def test_handlers_of_a_fit_do_not_stay(tmp_path: Path) -> None:
    """Lightning puts back what was there before it, which is ours."""
    with StopSignals() as signals:
        ours = signal.getsignal(signal.SIGTERM)
        during: list[object] = []
        module = Tiny(lambda line: during.append(signal.getsignal(signal.SIGTERM)))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=1,
            callbacks=[signals],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(9), batch_size=1))
        assert during == [ours] and signal.getsignal(signal.SIGTERM) == ours


def test_another_thread_installs_nothing() -> None:
    """Python lets only the main thread."""
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def inside() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_codes_are_what_slurm_scripts_look_for() -> None:
    assert {number: exit_code(number) for number in CODES} == CODES
