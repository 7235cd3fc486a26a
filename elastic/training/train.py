"""Step 4 of a run: a Lightning `fit` per stage, each from where the newest checkpoint stands."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from elastic.cluster.signals import StopOnSignal, StopSignals
from elastic.cluster.strategies import build_strategy
from elastic.parent import HybridParent
from elastic.routing.curriculum import Stage, budget_probabilities
from elastic.routing.family import Family
from elastic.routing.router import RouterOptimizer
from elastic.teacher import Teacher
from elastic.training.build import blank
from elastic.training.callbacks import BudgetValidation, Checkpoints, Metrics, Progress, Restore
from elastic.training.module import PARENT, ElasticModule
from elastic.training.resume import CheckpointStore, Saved
from elastic.training.setup import Setup
from elastic.training.text import stage_text

log = logging.getLogger(__name__)

for _noisy in ("lightning.pytorch", "lightning.fabric"):  # devices found, tips, "max_steps reached"
    logging.getLogger(_noisy).setLevel(logging.WARNING)
# Lightning 2.6 asks torch 2.13 for something that is called differently now.
warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")
# Which processes there are is known before Lightning wonders about it.
warnings.filterwarnings("ignore", message=".*`srun` command is available.*")


@dataclass(frozen=True)
class Fitting:
    """What every fit of a run needs beside its module."""

    store: CheckpointStore
    signals: StopSignals
    loggers: list


def train_stages(
    setup: Setup,
    fitting: Fitting,
    stages: list[Stage],
    start: Callable[[], HybridParent],
    family: Family | None = None,
    teacher: Teacher | None = None,
    energies: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Stage, Saved]]:
    """Train the stages that are not done, one after another; yields each with its last checkpoint.

    Weights, optimizer, router and counters carry over from one stage to the next. A stage that
    ended just before a run was stopped is yielded without a step.

    Args:
        start: the weights to begin with, where no stage of these has begun.
        family: the budgets; None trains the parent alone.
        teacher: None where there is none, or the full budget is it.
        energies: of every norm, as in `Ranking`; None where members share the parent's norms.
    """
    names = [stage.name for stage in stages]
    optimizer = None if family is None else RouterOptimizer(family.router, setup.config.optim)
    for stage in stages:
        saved = fitting.store.latest
        if saved is not None and saved.state["stage_index"] > stage.index:
            continue
        if saved is not None and saved.state["stage"] not in names:
            saved = None  # the parent's pretraining, which ends with weights alone
        if saved is not None:
            parent = blank(setup)
        else:
            parent = start()
        if family is not None and energies is not None:
            parent.add_own_norms(len(family.smaller), energies)
        if saved is not None:
            saved.pieces.load_weights(parent)
        probabilities = budget_probabilities(stage.config, list(setup.targets))
        module = ElasticModule(
            parent,
            family,
            teacher,
            optimizer,
            stage,
            {PARENT: 1.0} if family is None else probabilities,
            setup.config.objective,
            setup.config.optim,
            setup.config.seed,
            setup.config.trainer.max_bad_steps,
        )
        if saved is not None:
            module.load_state(saved.state, saved.shared)
        if module.step < stage.steps:
            _fit(setup, fitting, module, saved)
        last = fitting.store.latest
        assert last is not None and last.state["step"] == stage.steps
        yield stage, last


def _fit(setup: Setup, fitting: Fitting, module: ElasticModule, saved: Saved | None) -> None:
    """One stage, from where the module stands."""
    # Nothing of ours draws from it; libraries might. A checkpoint has its state.
    torch.manual_seed(setup.config.seed)
    stage, settings = module.stage, setup.config.trainer
    data = stage_text(setup, stage, module.micro_step)
    metrics = Metrics(settings.log_every, None if saved is None else saved.state["row"])
    checkpoints = Checkpoints(fitting.store, settings.checkpoint_every, metrics)
    callbacks: list[L.Callback] = [
        fitting.signals,
        *([] if saved is None else [Restore(saved, setup.place)]),
        metrics,
        Progress(),
        BudgetValidation(data.val_dataloader(), settings.validate_every),
        checkpoints,
        StopOnSignal(fitting.signals, lambda module: module.resumable, checkpoints.save),
    ]
    strategy = build_strategy(
        settings, setup.config.optim, setup.place, setup.device, module.family is not None
    )
    trainer = L.Trainer(
        accelerator="gpu" if setup.device.type == "cuda" else "cpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        # DeepSpeed's strategy brings its own.
        precision=None if settings.zero_stage else settings.precision,  # type: ignore[arg-type]
        max_steps=stage.steps - module.step,
        max_epochs=-1,
        accumulate_grad_batches=stage.accumulation,
        limit_val_batches=0,
        logger=fitting.loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=setup.run_dir,
    )
    log.info(
        "stage %s (%s): %d steps of %d tokens at length %d",
        stage.name,
        stage.config.mode,
        stage.steps,
        stage.config.batch_tokens,
        stage.config.sequence_length,
    )
    trainer.fit(module, train_dataloaders=data.train_dataloader())
