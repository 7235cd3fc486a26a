"""The bar of a stage."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from elastic.console import Bar
from elastic.data import Batch
from elastic.training.callbacks.common import loss_of, new_tokens
from elastic.training.module import ElasticModule


class Progress(Callback):
    """One bar per stage: budget, loss, tokens/s and time left; a line now and then without a
    terminal."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.loss = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        if not trainer.is_global_zero:
            return
        stage = module.stage
        self.bar = Bar(
            desc=stage.name,
            total=stage.tokens,
            initial=module.step * stage.config.batch_tokens,
            unit="tok",
            unit_scale=True,
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if self.bar is None:
            return
        assert isinstance(module, ElasticModule)
        due = time.time() - self.bar.last_print_t >= self.bar.mininterval
        if due:  # only then is the loss fetched from the device
            self.loss = float(loss_of(module, outputs))
            phase = "" if module.family is None else "soft " if module.family.soft else "sliced "
            self.bar.set_postfix_str(f"{phase}{outputs['budget']} loss {self.loss:.3f}", False)
        self.bar.update(new_tokens(trainer, module, batch))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, module)  # what is wrong gets a line of its own
