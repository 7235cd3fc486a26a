"""How a fit goes on from a resume checkpoint."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from elastic.cluster.place import Place
from elastic.training.module import ElasticModule
from elastic.training.resume import Saved, load_state, restore_random


class Restore(Callback):
    """Sets optimizer and random generators to a checkpoint, once the strategy has made its own of
    them; weights and routers were loaded before."""

    def __init__(self, saved: Saved, place: Place) -> None:
        self.saved, self.place = saved, place

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ElasticModule)
        steps = self.saved.state["optimizer_steps"]
        load_state(module.parent, trainer.optimizers[0], self.saved.pieces, steps, self.place.rank)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Only now: PyTorch's loaders draw a seed whenever they start, whether they need it or not.
        random = self.saved.random(self.place)
        if random is not None:
            restore_random(random)
