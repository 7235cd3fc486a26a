"""Config -> parent, data, family, and a Lightning `fit` per stage. The data's way through a run."""

import copy
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from elastic import checkpoint as elastic_checkpoint
from elastic.architecture import Architecture, Space
from elastic.callbacks import BudgetValidation, Checkpoints, Metrics, Progress
from elastic.config import ConfigError, ParentShape, RunConfig
from elastic.cost import parameters
from elastic.curriculum import Stage, budget_probabilities, check_budgets, plan
from elastic.data import PackedTokens, TextDataModule, check_vocabulary, prepare_data
from elastic.family import Family, describe
from elastic.files import atomic_file
from elastic.importance import Ranking, rank, sort_parent
from elastic.loggers import MetricsFile, build_loggers
from elastic.losses import check_objective
from elastic.module import PARENT, ElasticModule
from elastic.parent import HybridParent
from elastic.parent.ssd import resolve_kernels
from elastic.parent.weights import load_parent, locate, read_config, read_shape
from elastic.router import Router
from elastic.search import check_reachable, targets_of

log = logging.getLogger(__name__)

for _noisy in ("lightning.pytorch", "lightning.fabric"):  # devices found, tips, "max_steps reached"
    logging.getLogger(_noisy).setLevel(logging.WARNING)
# Lightning 2.6 asks torch 2.13 for something that is called differently now.
warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")

MAY_CHANGE = ("run_dir", "resume", "trainer", "logger")
"""Settings that a resumed run may set anew; the others would make it another run."""


def global_rank() -> int:
    """Rank of this process over all nodes; 0 writes."""
    return int(getattr(rank_zero_only, "rank", None) or 0)


class Run:
    """One run: everything is checked before anything is written."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.last = self.run_dir / "checkpoints" / "last.ckpt"
        self._check_run_dir()
        stages = config.curriculum.stages
        self.stages = plan(stages, config.trainer, list(config.budgets))
        self.source, self.parent_config, self.shape = self._find_parent()
        self.space = Space.build(config.space, self.shape)
        self.targets = targets_of(config.budgets, self.shape)
        self.in_place = config.objective.teacher == "in_place"
        full = parameters(self.shape, Architecture.full(self.shape))
        check_budgets(stages, self.targets, full, self.in_place)
        nested, tolerance = config.space.nested, config.space.tolerance
        check_reachable(self.space, self.targets, config.importance, tolerance, nested)
        check_objective(config.objective, self.shape.vocab_size)
        self.kernels = resolve_kernels(config.parent.kernels, self._device())
        source = None if self.source is None else str(self.source)
        self.data = prepare_data(config.data, self.run_dir / "data", source)
        check_vocabulary(self.data.tokenizer, self.shape.vocab_size)
        self._check_lengths()
        self.base_config = elastic_checkpoint.stock_base(self.data.tokenizer, self.parent_config)

    def execute(self) -> Path:
        """Run every stage that is not done yet; returns the elastic checkpoint's directory."""
        start = time.monotonic()
        torch.manual_seed(self.config.seed)  # nothing draws from it; libraries might
        if global_rank() == 0:
            self._write_config()
            self.data.save(self.run_dir / "data")
        loggers = build_loggers(self.config, self.run_dir)
        resumed = self._resume_state()
        if resumed is not None:
            log.info("resuming stage %s at step %d", resumed["stage"], resumed["step"])
            done = self._stage(resumed["stage"]).steps_before + resumed["step"]
            for logger in loggers:
                if isinstance(logger, MetricsFile) and global_rank() == 0:
                    logger.forget_after(done)
        parent = self._trained_parent(loggers, resumed)
        if resumed is not None and self._stage(resumed["stage"]).config.mode == "pretrain":
            resumed = None
        output = self._train_family(parent, loggers, resumed)
        for logger in loggers:
            logger.finalize("success")
        log.info("done in %.0f s; elastic checkpoint in %s", time.monotonic() - start, output)
        return output

    # Checks

    def _check_run_dir(self) -> None:
        """Resume only what is this run; refuse to write into anything else."""
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise ConfigError(f"run_dir={self.run_dir}: exists and is not a directory")
        if not self.run_dir.exists() or not any(self.run_dir.iterdir()):
            return
        if global_rank() != 0:
            return  # the first rank has looked already, and has begun to write
        if not self.config.resume:
            raise ConfigError(
                f"resume=false: run_dir={self.run_dir} is not empty; "
                "choose another run_dir, or leave resume=true to go on"
            )
        stored = self.run_dir / "config.yaml"
        if not stored.is_file():
            raise ConfigError(f"run_dir={self.run_dir}: not empty, and not a run; choose another")
        before, now = _flat(yaml.safe_load(stored.read_text())), _flat(asdict(self.config))
        for key in sorted(before.keys() | now.keys()):
            if key.split(".")[0] not in MAY_CHANGE and before.get(key) != now.get(key):
                raise ConfigError(
                    f"{key}={now.get(key)}: run_dir={self.run_dir} was started with "
                    f"{before.get(key)}; must be that, or choose another run_dir"
                )

    def _find_parent(self) -> tuple[Path | None, dict[str, Any] | None, ParentShape]:
        """Where the parent is, its config.json and its sizes."""
        if self.config.parent.path is None:
            assert self.config.parent.shape is not None
            return None, None, self.config.parent.shape
        source = locate(self.config.parent.path)
        parent_config = read_config(source)
        return source, parent_config, read_shape(parent_config)

    def _device(self) -> torch.device:
        wanted = self.config.trainer.accelerator
        if wanted == "gpu" and not torch.cuda.is_available():
            raise ConfigError(
                "trainer.accelerator=gpu: no GPU is visible; must be cpu or auto here"
            )
        on_gpu = wanted != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")

    def _check_lengths(self) -> None:
        """Every sequence length must fit into the text, the calibration's too."""
        for stage in self.stages:
            self._datamodule(stage, 0)
        self._calibration()

    # Parts

    def _stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

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
            rank=global_rank(),
            world_size=self.config.trainer.world_size,
        )

    def _calibration(self) -> Tensor:
        """Calibration text (samples, t) int64, spread evenly over the training text."""
        settings = self.config.importance
        windows = PackedTokens(
            self.data.train,
            settings.sequence_length,
            setting="importance.sequence_length",
            text="training text",
        )
        count = min(max(settings.samples, settings.depth_samples), len(windows))
        return torch.stack([windows[i * len(windows) // count][:-1] for i in range(count)])

    def _new_parent(self) -> HybridParent:
        generator = torch.Generator().manual_seed(self.config.seed)
        checkpointing = self.config.parent.activation_checkpointing
        return HybridParent(self.shape, self.kernels, checkpointing).initialise(generator)

    def _load_parent(self, directory: Path) -> HybridParent:
        return load_parent(directory, self.kernels, self.config.parent.activation_checkpointing)

    def _resume_state(self) -> dict[str, Any] | None:
        """Where the last checkpoint stands."""
        if not self.last.is_file():
            return None
        checkpoint = torch.load(self.last, map_location="cpu", weights_only=True, mmap=True)
        state: dict[str, Any] = checkpoint["elastic"]
        return state

    # Stages

    def _trained_parent(self, loggers: list, resumed: dict[str, Any] | None) -> HybridParent:
        """The parent as given, or after its pretrain stages."""
        trained = self.run_dir / "parent"
        pretrain = [stage for stage in self.stages if stage.config.mode == "pretrain"]
        if trained.is_dir():
            return self._load_parent(trained)
        parent = self._new_parent() if self.source is None else self._load_parent(self.source)
        if not pretrain:
            return parent
        self._run_stages(pretrain, parent, None, None, loggers, resumed)
        if global_rank() == 0:
            elastic_checkpoint.write_parent(trained, parent, self.data.tokenizer, self.base_config)
            log.info("parent written to %s", trained)
        return parent

    def _train_family(
        self, parent: HybridParent, loggers: list, resumed: dict[str, Any] | None
    ) -> Path:
        """Rank, sort, and train all budgets together."""
        config = self.config
        teacher = None
        if not self.in_place:
            teacher = copy.deepcopy(parent)  # the original: never sorted, never trained
            teacher.activation_checkpointing = False
        device = self._device()
        ranking = rank(
            parent.to(device).eval(),
            self._calibration().to(device),
            config.importance,
            self.space,
            config.seed,
            self.data.fingerprint,
            self.run_dir / "importance" / "scores.safetensors",
        )
        sort_parent(parent.cpu().train(), ranking.orders)
        log.info("weights sorted; layers by importance, least first: %s", list(ranking.drop_order))
        generator = torch.Generator().manual_seed(config.seed + 1)
        router = Router(self.space, len(self.targets), config.router, generator)
        family = Family(
            self.space,
            ranking.drop_order,
            self.targets,
            router,
            config.router,
            config.space,
            config.objective,
        )
        stages = [stage for stage in self.stages if stage.config.mode == "elastic"]
        self._run_stages(stages, parent, family, (teacher, ranking), loggers, resumed)
        return self.run_dir / "elastic"

    def _run_stages(
        self,
        stages: list[Stage],
        parent: HybridParent,
        family: Family | None,
        elastic: tuple[HybridParent | None, Ranking] | None,
        loggers: list,
        resumed: dict[str, Any] | None,
    ) -> None:
        """One fit per stage; weights, optimizer, router and counters carry over."""
        carried = None
        for stage in stages:
            mine = resumed if resumed is not None and resumed["stage"] == stage.name else None
            if resumed is not None and mine is None:
                continue  # done before the stage of the checkpoint
            probabilities = budget_probabilities(stage.config, list(self.targets))
            if family is None:
                probabilities = {PARENT: 1.0}
            module = ElasticModule(
                parent,
                family,
                elastic[0] if elastic else None,
                stage,
                probabilities,
                self.config.objective,
                self.config.optim,
                self.config.seed,
                carried,
                self.data.tokenizer.eos_token_id if self.config.data.separate_documents else None,
            )
            self._fit(module, loggers, mine)
            resumed = None
            carried = torch.load(self.last, map_location="cpu", weights_only=True, mmap=True)
            carried = carried["optimizer_states"][0]
            if family is not None and elastic is not None:
                end = stage.progress(stage.steps)
                family.freeze_if_due(end)
                self._write_elastic(stage, parent, family, elastic[1], end)

    def _fit(self, module: ElasticModule, loggers: list, resumed: dict[str, Any] | None) -> None:
        """One stage, from its start or from the last checkpoint."""
        stage, settings = module.stage, self.config.trainer
        data = self._datamodule(stage, resumed["micro_step"] if resumed else 0)
        strategy = {"single": "auto", "ddp": "ddp_find_unused_parameters_true"}
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy[settings.strategy],
            precision=settings.precision,  # type: ignore[arg-type]
            max_steps=stage.steps,
            max_epochs=-1,
            accumulate_grad_batches=stage.accumulation,
            limit_val_batches=0,
            logger=loggers,
            callbacks=[
                Metrics(settings.log_every),
                Progress(),
                BudgetValidation(data.val_dataloader(), settings.validate_every),
                Checkpoints(self.last, settings.checkpoint_every),
            ],
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
        path = str(self.last) if resumed else None
        try:
            trainer.fit(module, train_dataloaders=data.train_dataloader(), ckpt_path=path)
        except SystemExit:  # what Lightning makes of Ctrl-C
            log.info("interrupted; the same command goes on from %s", self.last)
            raise

    # Output

    def _write_elastic(
        self,
        stage: Stage,
        parent: HybridParent,
        family: Family,
        ranking: Ranking,
        progress: float,
    ) -> None:
        if global_rank() != 0:
            return
        choices = family.choices(progress)
        seen = {s.name: s.tokens for s in self.stages if s.index <= stage.index}
        elastic_checkpoint.write_elastic(
            self.run_dir / "elastic",
            self.config,
            parent,
            self.data.tokenizer,
            self.base_config,
            family,
            choices,
            ranking,
            seen,
        )
        log.info("elastic checkpoint after stage %s:\n%s", stage.name, describe(choices))

    def _write_config(self) -> None:
        with atomic_file(self.run_dir / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(asdict(self.config), sort_keys=False))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat = {}
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            flat.update(_flat(entry, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = entry
    return flat
