"""One run, on one process: check -> prepare -> pretrain -> rank -> sort -> train -> write."""

import logging
import time
from pathlib import Path

from elastic.cluster.place import ALONE, Place, from_first
from elastic.cluster.signals import StopSignals
from elastic.config import ConfigError, RunConfig
from elastic.importance import Ranking
from elastic.parent import HybridParent
from elastic.routing.curriculum import draw_seed
from elastic.storage.files import elastic_directory
from elastic.storage.seals import SealBroken, Seals, damage
from elastic.training.build import cached_teacher, family_of, initial, online_teacher
from elastic.training.check import check
from elastic.training.loggers import MetricsFile, build_loggers
from elastic.training.origin import require_same
from elastic.training.prepare import prepare
from elastic.training.rank import rank_parent, scores_of, sorted_parent
from elastic.training.resume import CheckpointStore, Saved
from elastic.training.train import Fitting, train_stages
from elastic.training.write import is_written, keep_stage, write_elastic, write_parent

log = logging.getLogger(__name__)


class Run:
    """One run, on this process: everything is checked before anything is written."""

    def __init__(
        self, config: RunConfig, place: Place = ALONE, signals: StopSignals | None = None
    ) -> None:
        self.setup = check(config, place)
        self.signals = signals or StopSignals()
        # A cache is of a parent that is there; one that is trained here comes first.
        self.teacher = cached_teacher(self.setup) if self._parent_is_there() else None
        keep = config.trainer.keep_checkpoints
        self.store = CheckpointStore(self.setup.run_dir / "checkpoints", keep, place)

    def begin(self) -> None:
        """Take the run directory."""
        prepare(self.setup)

    def execute(self) -> Path:
        """Do what is not done yet; returns the elastic checkpoint's directory."""
        start = time.monotonic()
        saved = self.store.newest()
        self._require_same_origin(tokens=self.setup.data.digest)
        if self._is_finished(saved):
            output = elastic_directory(self.setup.run_dir)
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

    def _parent_is_there(self) -> bool:
        """Whether the parent can be looked at now; one that was trained here may have to be written
        again first."""
        if self.setup.source is not None:
            return True
        try:
            seals = self.setup.seals
            if seals is not None:
                seals.check_sizes()
            return seals is not None
        except SealBroken:
            return False

    def _require_same_origin(self, **now: str) -> None:
        """Stop unless the newest checkpoint was trained from this; those to come will say so."""
        if self.store.latest is not None:
            require_same(self.store.latest.state, now, self.setup.run_dir)
        self.store.origin |= now

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
        """Train the parent alone, where there are such stages, and write it; one that is gone or
        damaged is written again from the checkpoint with which these stages have ended."""
        setup = self.setup
        stages = setup.stages_of("pretrain")
        if not stages or setup.source is not None:
            return
        first = setup.place.rank == 0
        there, problem = from_first((setup.original.exists(), first and damage(setup.original)))
        if problem is None:
            return
        if there:
            log.warning("%s: the parent is written again", problem)
        trained = list(
            train_stages(setup, fitting, stages, lambda: initial(setup, setup.config.seed))
        )
        last = stages[-1]
        saved = trained[-1][1] if trained else self.store.end_of(last.index, last.name, last.steps)
        if saved is None:  # the newest checkpoint holds a student by now
            raise ConfigError(
                f"{problem}, and the last checkpoint of stage {last.name}, to write the parent "
                f"from, is not there or damaged; restore either, or choose another run_dir"
            )
        write_parent(setup, saved.pieces)
        log.info("the parent is that of %s", saved.path)

    def _start(self, ranking: Ranking) -> HybridParent:
        """The weights that the members begin with."""
        if self.setup.config.curriculum.start == "random":
            log.info("the members start from random weights")
            return initial(self.setup, draw_seed(self.setup.config.seed, "random start"))
        return sorted_parent(self.setup, ranking)

    def _train_family(self, fitting: Fitting) -> Path:
        """Rank, sort, and train all budgets together."""
        setup = self.setup
        ranking = rank_parent(setup)
        parent, scores = setup.seals, Seals.read(scores_of(setup).parent)
        assert parent is not None and scores is not None
        self._require_same_origin(parent=parent.digest, ranking=scores.digest)
        teacher = self.teacher or cached_teacher(setup) or online_teacher(setup)
        family = family_of(setup, ranking)
        stages = setup.stages_of("elastic")
        for stage, saved in train_stages(
            setup,
            fitting,
            stages,
            lambda: self._start(ranking),
            family,
            teacher,
            ranking.energies if setup.config.norms.own else None,
        ):
            write_elastic(setup, stage, saved.pieces, family, ranking)
            if setup.config.keep_stages:
                keep_stage(setup, stage)
        return elastic_directory(setup.run_dir)
