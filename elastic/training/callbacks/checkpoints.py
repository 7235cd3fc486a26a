"""When a run writes resume checkpoints."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from elastic.data import Batch
from elastic.training.callbacks.metrics import Metrics
from elastic.training.module import ElasticModule
from elastic.training.resume import CheckpointStore, local_pieces


class Checkpoints(Callback):
    """Resume checkpoints: every few steps, at each stage's end, and when a signal asks to stop."""

    def __init__(self, store: CheckpointStore, every: int, metrics: Metrics) -> None:
        self.store, self.every, self.metrics = store, every, metrics

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ElasticModule)
        if module.resumable and module.step % self.every == 0:
            self.save(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        if module.family is not None:  # a stage may end where the router freezes
            module.family.freeze_if_due(module.progress, module.compare)
        self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: ElasticModule) -> None:
        """Write where the run stands, once per step; every process takes part."""
        state = module.state()
        latest = self.store.latest
        at = (state["stage"], state["step"])
        if latest is not None and at == (latest.state["stage"], latest.state["step"]):
            return
        pieces, steps = local_pieces(
            module.parent, trainer.optimizers[0], trainer.global_rank, trainer.world_size
        )
        shared = {} if module.router_optimizer is None else module.router_optimizer.state()
        state |= {"optimizer_steps": steps, "row": self.metrics.sums(trainer, module)}
        self.store.save(state, pieces, shared, module.step == module.stage.steps)
