"""Ctrl-C, SIGTERM and SIGUSR1 end a run between two steps, on all processes, with a
checkpoint."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from elastic.console import write_now

log = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGTERM: 143}
"""What a run leaves with: EX_TEMPFAIL, "start me again", at SIGUSR1; for the others what they mean
everywhere (128 + their number). SIGINT is Ctrl-C."""


class AgreedExit(SystemExit):
    """All processes leave with this code, each by itself, and what they know is on disk."""


def exit_code(received: signal.Signals) -> int:
    """What a run leaves with after a signal."""
    return EXIT_CODES[received]


def agree(requested: signal.Signals | None, device: torch.device) -> signal.Signals | None:
    """The signal that any process has received, on all processes alike: the first of
    SIGTERM, SIGUSR1, SIGINT.

    Signals reach processes at different moments, or only one of them. Everybody must call this at
    the same place; it waits for the device.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return requested
    number = torch.tensor(int(requested or 0), device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return signal.Signals(int(number)) if number else None


class StopSignals(Callback):
    """Catches the signals of `EXIT_CODES`: at once where nothing would be lost, else for
    `StopOnSignal`.

    A context around all that a process does, from its first moments; and the first of Lightning's
    callbacks, since Lightning puts a handler of its own in front of ours in every fit. That one
    starts a broadcast from inside the handler, which no other process takes part in.

    While `held`, a signal waits in `requested` for the end of the step; a second Ctrl-C does not
    wait, whatever came before, nor does a second SIGTERM. Else it raises SystemExit with its exit
    code: the last checkpoint is all there is to go on from. Once the run has `ended` it changes
    nothing.

    Native code that calls Python may turn that exception into one of its own, or drop it: `kept`
    turns it back, and what was dropped still waits in `requested`.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.held = False
        self.ended = False
        self._interrupted = False
        self._raised: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in EXIT_CODES}
            self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # After an agreement the exit code is fixed: srun sends SIGTERM to those still leaving.
            signal.signal(number, signal.SIG_IGN if self.ended else handler)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What leaves the block after a signal has raised SystemExit in it is that SystemExit."""
        try:
            yield
        except BaseException as error:
            if self._raised is None or isinstance(error, SystemExit):
                raise
            raise SystemExit(exit_code(self._raised)) from error

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._before:
            self._install()

    def _install(self) -> None:
        for number in EXIT_CODES:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.ended:
            return
        received = signal.Signals(number)
        again = self.requested == received == signal.SIGTERM
        if received == signal.SIGINT:
            again, self._interrupted = self._interrupted, True
            _acknowledge(self.held and not again)
        self.requested = self.requested or received
        if not self.held or again:
            self._raised = received
            raise SystemExit(exit_code(received))


def _acknowledge(waits: bool) -> None:
    """Acknowledge Ctrl-C on the terminal; once, though all processes of a terminal get
    the signal."""
    if os.environ.get("RANK", "0") == "0":
        then = "a checkpoint follows the step at hand; again: leave at once" if waits else "leaving"
        write_now(f"\nCtrl-C: {then}. The same command goes on.\n")


class StopOnSignal(Callback):
    """Leaves a fit at the end of the step in which any process was asked to. The last callback.

    Args:
        signals: where requests wait.
        between_steps: whether no gradient is half accumulated.
        save: writes a checkpoint, and returns when all processes have.

    Raises:
        AgreedExit: on all processes with the same code; Lightning lets it through.
    """

    def __init__(
        self,
        signals: StopSignals,
        between_steps: Callable[[Any], bool],
        save: Callable[[L.Trainer, Any], None],
    ) -> None:
        self.signals, self.between_steps, self.save = signals, between_steps, save

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.held = True

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self.between_steps(module):
            return
        received = agree(self.signals.requested, module.device)
        if received is not None:
            self.save(trainer, module)
            self._leave(received, trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.held = False  # what comes until now is agreed on here, the rest leaves at once
        received = agree(self.signals.requested, module.device)
        if received is not None:
            self._leave(received, trainer)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self.signals.held = False

    def _leave(self, received: signal.Signals, trainer: L.Trainer) -> None:
        self.signals.ended = True
        if trainer.is_global_zero:
            log.info("%s: a checkpoint is written; the same command goes on", received.name)
        raise AgreedExit(exit_code(received))
