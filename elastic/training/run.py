"""Config -> parent, data, family, and a Lightning `fit` per stage. The data's way through a run."""

import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from elastic.cluster.place import ALONE, Place, find_device, first_alone, wait_for_all
from elastic.cluster.signals import AgreedExit, StopOnSignal, StopSignals
from elastic.cluster.strategies import build_strategy, check_zero
from elastic.config import ParentShape, RunConfig
from elastic.data import PackedTokens, TextDataModule, check_vocabulary, prepare_data
from elastic.importance import Ranking, is_sorted, rank, read_ranking, sort_checkpoint
from elastic.losses import check_objective
from elastic.members.architecture import Space
from elastic.parent import HybridParent
from elastic.parent.ssd import resolve_kernels
from elastic.parent.stock import read_config
from elastic.parent.weights import load_parent, locate, open_weights
from elastic.routing.curriculum import Stage, budget_probabilities, plan
from elastic.routing.family import Family, describe
from elastic.routing.router import Router, RouterOptimizer
from elastic.routing.sizes import check_sizes
from elastic.storage.files import atomic_directory, recover, sweep
from elastic.teacher import Teacher, build_teacher, check_teacher, contents_of
from elastic.training import checkpoint as elastic_checkpoint
from elastic.training.callbacks import BudgetValidation, Checkpoints, Metrics, Progress, Restore
from elastic.training.loggers import MetricsFile, build_loggers
from elastic.training.module import PARENT, ElasticModule
from elastic.training.resume import CheckpointStore, Saved
from elastic.training.run_dir import check_run_dir, write_config

log = logging.getLogger(__name__)

for _noisy in ("lightning.pytorch", "lightning.fabric"):  # devices found, tips, "max_steps reached"
    logging.getLogger(_noisy).setLevel(logging.WARNING)
# Lightning 2.6 asks torch 2.13 for something that is called differently now.
warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")
# Which processes there are is known before Lightning wonders about it.
warnings.filterwarnings("ignore", message=".*`srun` command is available.*")


class Run:
    """One run, on this process: everything is checked before anything is written."""

    def __init__(
        self, config: RunConfig, place: Place = ALONE, signals: StopSignals | None = None
    ) -> None:
        self.config, self.place = config, place
        self.signals = signals or StopSignals()
        self.run_dir = Path(config.run_dir)
        check_run_dir(config, first=place.rank == 0)
        stages = config.curriculum.stages
        self.stages = plan(stages, config.trainer, list(config.budgets))
        if config.parent.path is not None and config.parent.shape is not None:
            self._check_sizes(config.parent.shape)  # before a download of hours
        self.source, self.parent_config, self.shape = self._find_parent()
        self.space, self.targets = self._check_sizes(self.shape)
        check_objective(config.objective, self.shape.vocab_size)
        self.device = find_device(config.trainer)
        check_zero(config.trainer, self.device)
        check_teacher(config.objective.teacher, config.trainer.world_size)
        self.kernels = resolve_kernels(config.parent.kernels, self.device)
        source = None if self.source is None else str(self.source)
        self.data = prepare_data(config.data, self.run_dir / "data", source)
        check_vocabulary(self.data.tokenizer, self.shape.vocab_size)
        self._check_lengths()
        self.base_config = elastic_checkpoint.stock_base(self.data.tokenizer, self.parent_config)
        self.teacher = self._stored_teacher() if self._original().is_dir() else None
        keep = config.trainer.keep_checkpoints
        self.store = CheckpointStore(self.run_dir / "checkpoints", keep, place)

    def begin(self) -> None:
        """Take the run directory: settings and tokens are written, left-overs removed."""
        if self.place.rank != 0:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        sweep(self.run_dir)
        for name in ("parent", "sorted", "elastic"):
            recover(self.run_dir / name)
        write_config(self.config)
        self.data.save(self.run_dir / "data")

    def execute(self) -> Path:
        """Run every stage that is not done yet; returns the elastic checkpoint's directory."""
        start = time.monotonic()
        loggers = build_loggers(self.config, self.run_dir)
        saved = self.store.newest()
        index, done = -1, -1
        if saved is not None:
            index, step = saved.state["stage_index"], saved.state["step"]
            log.info("resuming stage %s at step %d", saved.state["stage"], step)
            done = self.stages[index].steps_before + step
        for logger in loggers:
            if isinstance(logger, MetricsFile) and self.place.rank == 0:
                logger.forget_after(index, done)
        self._pretrain(loggers)
        output = self._train_family(loggers)
        for logger in loggers:
            logger.finalize("success")
        log.info("done in %.0f s; elastic checkpoint in %s", time.monotonic() - start, output)
        return output

    # Checks

    def _find_parent(self) -> tuple[Path | None, dict[str, Any] | None, ParentShape]:
        """Where the parent is, its config.json and its sizes."""
        if self.config.parent.path is None:
            assert self.config.parent.shape is not None
            return None, None, self.config.parent.shape
        source = locate(self.config.parent.path)
        shape, _ = open_weights(source)
        self.config.parent.check_shape(shape)
        return source, read_config(source), shape

    def _check_sizes(self, shape: ParentShape) -> tuple[Space, dict[str, int]]:
        """The space, and targets largest first; every budget must be reachable."""
        config = self.config
        parts = config.space, config.budgets, config.importance, config.curriculum.stages
        sizes = check_sizes(shape, *parts, in_place=config.objective.teacher == "in_place")
        return sizes.space, sizes.targets

    def _check_lengths(self) -> None:
        """Every sequence length must fit into the text, the calibration's too."""
        for stage in self.stages:
            self._datamodule(stage, 0)
        self._calibration()

    # Parts

    def _original(self) -> Path:
        """Where the unsorted parent is, or will be once it is pretrained."""
        return self.source or self.run_dir / "parent"

    def _document_start(self) -> int | None:
        separate = self.config.data.separate_documents
        return self.data.tokenizer.eos_token_id if separate else None

    def _datamodule(self, stage: Stage, start_micro_step: int) -> TextDataModule:
        return TextDataModule(
            self.data.train,
            self.data.validation,
            sequence_length=stage.config.sequence_length,
            batch_sequences=stage.batch_sequences,
            validation_sequences=self.config.data.validation_sequences,
            validation_batch=stage.batch_sequences,
            seed=self.config.seed,
            stage_name=stage.name,
            repeats=stage.passes,
            start_micro_step=start_micro_step,
            rank=self.place.rank,
            world_size=self.place.world_size,
        )

    def _calibration(self) -> Tensor:
        """Calibration text (samples, t) int64, spread evenly over the training text."""
        settings = self.config.importance
        names = {"setting": "importance.sequence_length", "text": "training text"}
        windows = PackedTokens(self.data.train, settings.sequence_length, **names)
        count = min(max(settings.samples, settings.depth_samples), len(windows))
        return torch.stack([windows[i * len(windows) // count][:-1] for i in range(count)])

    def _blank_parent(self) -> HybridParent:
        return HybridParent(self.shape, self.kernels, self.config.parent.activation_checkpointing)

    def _random_parent(self) -> HybridParent:
        return self._blank_parent().initialise(torch.Generator().manual_seed(self.config.seed))

    def _load_parent(self, directory: Path) -> HybridParent:
        return load_parent(directory, self.kernels, self.config.parent.activation_checkpointing)

    def _stored_teacher(self) -> Teacher | None:
        """The teacher, where its words are on disk."""
        config = self.config
        if config.objective.teacher != "stored":
            return None
        vocabulary = self.shape.vocab_size
        wanted = contents_of(config, self.stages, self.data, self._original(), vocabulary)
        return self._build_teacher(None, wanted=wanted)

    def _build_teacher(self, parent: HybridParent | None, **stored: Any) -> Teacher:
        return build_teacher(
            self.config.objective,
            parent,
            self.config.trainer.precision,
            self._document_start(),
            self.place.world_size,
            self.place.rank,
            **stored,
        )

    # Stages

    def _pretrain(self, loggers: list) -> None:
        """Train the parent alone, where there are such stages, and write it."""
        stages = [stage for stage in self.stages if stage.config.mode == "pretrain"]
        directory = self.run_dir / "parent"
        if not stages or directory.is_dir():
            return
        self._run_stages(stages, self._random_parent, None, None, loggers)
        saved = self.store.latest
        assert saved is not None
        if self.place.rank == 0:
            elastic_checkpoint.write_parent(
                directory, self.shape, saved.pieces, self.data.tokenizer, self.base_config
            )
            log.info("parent written to %s", directory)
        wait_for_all()

    def _train_family(self, loggers: list) -> Path:
        """Rank, sort, and train all budgets together."""
        config = self.config
        ranking = self._rank()
        teacher = self.teacher or self._stored_teacher()
        if teacher is None and config.objective.teacher != "in_place":
            teacher = self._build_teacher(self._load_parent(self._original()))
        generator = torch.Generator().manual_seed(config.seed + 1)
        router = Router(self.space, len(self.targets), config.router, generator)
        family = Family(
            self.space,
            ranking.drop_order,
            self.targets,
            router.to(self.device),
            config.router,
            config.space,
            config.objective,
        )
        stages = [stage for stage in self.stages if stage.config.mode == "elastic"]
        self._run_stages(
            stages, lambda: self._sorted_parent(ranking), family, (teacher, ranking), loggers
        )
        return self.run_dir / "elastic"

    def _rank(self) -> Ranking:
        """Rank on the first process; the others read what it has written."""
        scores = self.run_dir / "importance" / "scores.safetensors"
        with first_alone(self.place):
            if self.place.rank != 0:
                smallest_head_dim = self.space.choices["mamba_head_dim"][-1]
                return read_ranking(scores, self.shape, smallest_head_dim)
            ranking = rank(
                self._original(),
                lambda: self._load_parent(self._original()).to(self.device).eval(),
                self._calibration().to(self.device),
                self.config.importance,
                self.space,
                self.config.seed,
                self.data.fingerprint,
                scores,
            )
        log.info("layers by importance, least first: %s", list(ranking.drop_order))
        return ranking

    def _sorted_parent(self, ranking: Ranking) -> HybridParent:
        """Where elastic training starts; sorted on disk by the first process, once."""
        directory = self.run_dir / "sorted"
        with first_alone(self.place):
            if self.place.rank == 0 and not is_sorted(directory, ranking):
                log.info("sorting the weights into %s", directory)
                with atomic_directory(directory, replace=True) as temporary:
                    sort_checkpoint(self._original(), temporary, ranking)
        return self._load_parent(directory)

    def _run_stages(
        self,
        stages: list[Stage],
        start: Callable[[], HybridParent],
        family: Family | None,
        elastic: tuple[Teacher | None, Ranking] | None,
        loggers: list,
    ) -> None:
        """One fit per stage that is not done; each goes on from the newest checkpoint."""
        names = [stage.name for stage in stages]
        router_optimizer = None
        if family is not None:
            router_optimizer = RouterOptimizer(family.router, self.config.optim)
        for stage in stages:
            saved = self.store.latest
            if saved is not None and saved.state["stage_index"] > stage.index:
                continue
            if saved is not None and saved.state["stage"] not in names:
                saved = None  # the parent's pretraining, which ends with weights alone
            if saved is not None:
                parent = self._blank_parent()
                saved.pieces.load_weights(parent)
            else:
                parent = start()
            probabilities = budget_probabilities(stage.config, list(self.targets))
            module = ElasticModule(
                parent,
                family,
                elastic[0] if elastic else None,
                router_optimizer,
                stage,
                {PARENT: 1.0} if family is None else probabilities,
                self.config.objective,
                self.config.optim,
                self.config.seed,
                self.config.trainer.max_bad_steps,
                self._document_start(),
            )
            if saved is not None:
                module.load_state(saved.state, saved.shared)
            if module.step < stage.steps:
                self._fit(module, loggers, saved)
            if family is not None and elastic is not None:
                self._write_elastic(stage, family, elastic[1])

    def _fit(self, module: ElasticModule, loggers: list, saved: Saved | None) -> None:
        """One stage, from where the module stands."""
        # Nothing of ours draws from it; libraries might. A checkpoint has its state.
        torch.manual_seed(self.config.seed)
        stage, settings = module.stage, self.config.trainer
        data = self._datamodule(stage, module.micro_step)
        metrics = Metrics(settings.log_every, None if saved is None else saved.state["row"])
        checkpoints = Checkpoints(self.store, settings.checkpoint_every, metrics)
        callbacks: list[L.Callback] = [
            self.signals,
            *([] if saved is None else [Restore(saved, self.place)]),
            metrics,
            Progress(),
            BudgetValidation(data.val_dataloader(), settings.validate_every),
            checkpoints,
            StopOnSignal(self.signals, lambda module: module.resumable, checkpoints.save),
        ]
        strategy = build_strategy(
            settings, self.config.optim, self.place, self.device, module.family is not None
        )
        trainer = L.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy,
            # DeepSpeed's strategy brings its own.
            precision=None if settings.zero_stage else settings.precision,  # type: ignore[arg-type]
            max_steps=stage.steps - module.step,
            max_epochs=-1,
            accumulate_grad_batches=stage.accumulation,
            limit_val_batches=0,
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=self.run_dir,
        )
        log.info(
            "stage %s (%s): %d steps of %d tokens at length %d",
            stage.name,
            stage.config.mode,
            stage.steps,
            stage.config.batch_tokens,
            stage.config.sequence_length,
        )
        try:
            trainer.fit(module, train_dataloaders=data.train_dataloader())
        except AgreedExit:
            raise
        except SystemExit:  # what Lightning makes of Ctrl-C
            log.info("interrupted; the same command goes on from %s", self.store.root)
            raise

    # Output

    def _write_elastic(self, stage: Stage, family: Family, ranking: Ranking) -> None:
        """Write the elastic checkpoint from the resume checkpoint at a stage's end."""
        saved = self.store.latest
        assert saved is not None and saved.state["step"] == stage.steps
        choices = family.choices(stage.progress(stage.steps))
        seen = {s.name: s.tokens for s in self.stages if s.index <= stage.index}
        directory = self.run_dir / "elastic"
        if self.place.rank == 0 and not elastic_checkpoint.is_of(directory, seen):
            elastic_checkpoint.write_elastic(
                directory,
                self.config,
                self.shape,
                saved.pieces,
                self.data.tokenizer,
                self.base_config,
                self.source,
                family,
                choices,
                ranking,
                seen,
            )
            log.info("elastic checkpoint after stage %s:\n%s", stage.name, describe(choices))
        wait_for_all()
