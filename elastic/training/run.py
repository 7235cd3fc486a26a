"""One run, on one process: check -> prepare -> pretrain -> rank -> sort -> train -> write."""

import logging
import time
from pathlib import Path

from elastic.cluster.place import ALONE, Place, from_first
from elastic.cluster.signals import StopSignals
from elastic.config import ConfigError, RunConfig
from elastic.training.build import cached_teacher, family_of, initial, online_teacher
from elastic.training.check import check
from elastic.training.loggers import MetricsFile, build_loggers
from elastic.training.prepare import prepare
from elastic.training.rank import rank_parent, sorted_parent
from elastic.training.resume import CheckpointStore, Saved
from elastic.training.train import Fitting, train_stages
from elastic.training.write import is_written, write_elastic, write_parent

log = logging.getLogger(__name__)


class Run:
    """One run, on this process: everything is checked before anything is written."""

    def __init__(
        self, config: RunConfig, place: Place = ALONE, signals: StopSignals | None = None
    ) -> None:
        self.setup = check(config, place)
        self.signals = signals or StopSignals()
        # A cache is of a parent that is there; one that is trained here comes first.
        self.teacher = cached_teacher(self.setup) if self.setup.original.is_dir() else None
        keep = config.trainer.keep_checkpoints
        self.store = CheckpointStore(self.setup.run_dir / "checkpoints", keep, place)

    def begin(self) -> None:
        """Take the run directory."""
        prepare(self.setup)

    def execute(self) -> Path:
        """Do what is not done yet; returns the elastic checkpoint's directory."""
        start = time.monotonic()
        saved = self.store.newest()
        if self._is_finished(saved):
            output = self.setup.run_dir / "elastic"
            log.info("this run is finished: its elastic checkpoint is in %s", output)
            return output
        if saved is not None:
            stage = self.setup.stages[saved.state["stage_index"]]
            log.info(
                "resuming stage %s at step %d of %d", stage.name, saved.state["step"], stage.steps
            )
        fitting = Fitting(self.store, self.signals, self._loggers(saved))
        self._pretrain(fitting)
        output = self._train_family(fitting)
        for logger in fitting.loggers:
            logger.finalize("success")
        log.info("done in %.0f s; elastic checkpoint in %s", time.monotonic() - start, output)
        return output

    def _is_finished(self, saved: Saved | None) -> bool:
        """Whether the last stage has ended, and its elastic checkpoint is there."""
        last = self.setup.stages[-1]
        if saved is None or (saved.state["stage"], saved.state["step"]) != (last.name, last.steps):
            return False
        return from_first(self.setup.place.rank == 0 and is_written(self.setup, last))

    def _loggers(self, saved: Saved | None) -> list:
        """Loggers that go on after a checkpoint: what they have from later steps comes again."""
        loggers = build_loggers(self.setup.config, self.setup.run_dir)
        index, done = -1, -1
        if saved is not None:
            index = saved.state["stage_index"]
            done = self.setup.stages[index].steps_before + saved.state["step"]
        for logger in loggers:
            if isinstance(logger, MetricsFile) and self.setup.place.rank == 0:
                logger.forget_after(index, done)
        return loggers

    def _pretrain(self, fitting: Fitting) -> None:
        """Train the parent alone, where there are such stages, and write it."""
        setup = self.setup
        stages = setup.stages_of("pretrain")
        if not stages or setup.original.is_dir():
            return
        trained = list(train_stages(setup, fitting, stages, lambda: initial(setup)))
        if not trained:  # what the checkpoint holds is a student by now
            raise ConfigError(
                f"run_dir={setup.run_dir}: parent/ is missing, though the run is past its pretrain "
                "stages; restore it, or choose another run_dir"
            )
        write_parent(setup, trained[-1][1].pieces)

    def _train_family(self, fitting: Fitting) -> Path:
        """Rank, sort, and train all budgets together."""
        setup = self.setup
        ranking = rank_parent(setup)
        teacher = self.teacher or cached_teacher(setup) or online_teacher(setup)
        family = family_of(setup, ranking)
        stages = setup.stages_of("elastic")
        for stage, saved in train_stages(
            setup,
            fitting,
            stages,
            lambda: sorted_parent(setup, ranking),
            family,
            teacher,
            ranking.energies if setup.config.norms.own else None,
        ):
            write_elastic(setup, stage, saved.pieces, family, ranking)
        return setup.run_dir / "elastic"
