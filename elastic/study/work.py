"""A study: the parent, then every run that has no figures yet, then the comparison."""

import logging
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from elastic.config import StudyConfig
from elastic.storage.files import require_writable, write_json
from elastic.storage.foreign import read_object
from elastic.storage.seals import Seals
from elastic.study.arms import Job, family_job, jobs_of, parent_settings
from elastic.study.compare import Record, cost, rows, tables, write_figures, write_tables
from elastic.study.families import MOST, Entries, Judgement, best_families, judgement, lines
from elastic.study.plot import write_plot
from elastic.study.run import Task, answer

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "lightning")


def work(config: StudyConfig) -> None:
    """Do what is not done, print the tables and write them.

    Raises:
        ConfigError: settings that `elastic train` would refuse.
    """
    results, output = Path(config.results), Path(config.output)
    require_writable("results", results / "any.json")
    require_writable("output", output / "any.md")
    study = config.study
    for name in study.run:  # a mistake in the last arm must not wait for the others
        jobs_of(study, name, study.seeds[0], Path("parent"), None)[0].config(Path("run"))
    parent = _parent(config)
    seals = Seals.read(parent)
    assert seals is not None
    doing = Study(config, parent, seals.digest)
    plot = None
    if study.families:
        shown = lines(doing.judge())
    else:
        records = doing.carry_out()
        found, spent = rows(study, records), cost(records)
        shown = tables(found, spent)
        write_figures(output, study, records[0].documents, found, spent)
        plot = output / f"{study.name}.svg"
        write_plot(plot, found, spent)
    print("\n".join(shown))
    path = write_tables(output, study, shown, plot)
    print(f"written to {path}")


def _parent(config: StudyConfig) -> Path:
    """Directory of the parent, which is trained where it is not there."""
    from elastic.training.launch import launch

    settings = parent_settings(config.study, Path(config.dir) / config.study.experiment / "parent")
    launch(settings)
    return Path(settings.run_dir) / "parent"


@dataclass
class Study:
    """The runs of a study, and what is known of them."""

    config: StudyConfig
    parent: Path
    checksum: str
    """Of the parent's weights."""

    def path(self, job: Job) -> Path:
        """Of its figures."""
        return Path(self.config.results) / f"{job.key(self.checksum, self.config.study)}.json"

    def record(self, job: Job) -> Record:
        """Its figures, which are there. Arms that come to the same run share them, each under its
        own name."""
        return Record(read_object(self.path(job)) | _whose(job))

    def jobs(self, name: str, seed: int, first: Record | None) -> list[Job]:
        """Runs of an arm, after the first arm's with that seed."""
        family, order = (None, []) if first is None else (first.family, first.drop_order)
        return jobs_of(self.config.study, name, seed, self.parent, family, order)

    def carry_out(self) -> list[Record]:
        """Every run's figures, in the order of arms and seeds.

        The first arm of a seed comes before the others of it, which train what it has frozen.
        """
        study = self.config.study
        first, *others = study.run
        firsts = [self.jobs(first, seed, None)[0] for seed in study.seeds]
        figures = self._run(firsts, len(study.seeds) * len(others))
        done = dict(zip(study.seeds, figures, strict=True))
        rest = [
            job
            for seed in study.seeds
            for name in others
            for job in self.jobs(name, seed, done[seed])
        ]
        return [*figures, *self._run(rest, 0)]

    def judge(self) -> Judgement:
        """Brute force: families after the same distillation, the first arm's own decisions among
        them."""
        study = self.config.study
        runs = [self.jobs(study.run[0], seed, None)[0] for seed in study.seeds]
        deciding = self._run(runs, len(study.seeds) * study.families)
        for budget, entries in deciding[0].value["untrained"].items():
            if len(entries) == MOST:
                log.warning(
                    "%s: %d members or more meet the budget, and only so many were compared "
                    "without training", budget, MOST,
                )  # fmt: skip
        nested = runs[0].config(Path("run")).space.nested
        families: list[Entries] = []
        for record in deciding:
            wanted = best_families(record, study.families, nested)
            families += [family for family in wanted if family not in families]
        jobs = [
            family_job(study, f"family_{number}", seed, self.parent, family)
            for seed in study.seeds
            for number, family in enumerate(families)
        ]
        records = self._run(jobs, 0)
        each = len(families)
        figures = {seed: records[i * each : (i + 1) * each] for i, seed in enumerate(study.seeds)}
        frozen = {record.seed: record.family for record in deciding}
        return judgement(families, figures, frozen)

    def _run(self, jobs: list[Job], to_come: int) -> list[Record]:
        """Figures of some jobs, which do not wait for each other."""
        by_path = {self.path(job): job for job in jobs}
        open_jobs = [job for path, job in by_path.items() if not path.is_file()]
        if len(open_jobs) < len(by_path):
            done, runs = len(by_path) - len(open_jobs), len(by_path)
            log.info("%d of %d runs have figures already", done, runs)
        start = time.monotonic()
        for count, (job, record) in enumerate(self._parallel(open_jobs), start=1):
            record |= _whose(job) | {
                "experiment": self.config.study.experiment, "parent_checksum": self.checksum,
                "versions": {n: version(n) for n in PACKAGES},
            }  # fmt: skip
            self.path(job).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path(job), record, None)
            each = (time.monotonic() - start) / count
            left = each * (len(open_jobs) - count + to_come) / 60
            log.info("%s: %s; about %.0f min left", job.name, _brief(record), left)
        return [self.record(job) for job in jobs]

    def _parallel(self, jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Jobs as they finish, `config.jobs` at a time, each in a process of its own.

        Raises:
            ConfigError, or whatever a run has raised: the others are stopped, and keep what they
                have.
        """
        context = multiprocessing.get_context("spawn")
        waiting = list(jobs)
        running: dict[Any, tuple[Job, BaseProcess]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.config.jobs:
                    job = waiting.pop(0)
                    ours, theirs = context.Pipe(duplex=False)
                    process: BaseProcess = context.Process(
                        target=answer, args=(theirs, self._task(job))
                    )
                    process.start()
                    theirs.close()
                    running[ours] = job, process
                for end in wait(list(running)):
                    job, process = running[end]
                    yield job, self._received(end, job, process)
                    del running[end]
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()

    def _received(self, end: Any, job: Job, process: BaseProcess) -> dict[str, Any]:
        """What a run has sent; raises what it has raised."""
        try:
            answered = end.recv()
        except EOFError:
            process.join()
            raise OSError(
                f"{job.name}: its process ended with exit code {process.exitcode}; its log is "
                f"{self._run_dir(job).with_suffix('.log')}"
            ) from None
        process.join()
        if isinstance(answered, BaseException):
            raise answered
        record: dict[str, Any] = answered
        return record

    def _task(self, job: Job) -> Task:
        threads = self.config.threads
        return Task(job.config(self._run_dir(job)), self.parent, self.config.study, threads)

    def _run_dir(self, job: Job) -> Path:
        return Path(self.config.dir) / self.config.study.experiment / job.name


def _whose(job: Job) -> dict[str, Any]:
    return {"arm": job.arm, "seed": job.seed, "alone": job.alone}


def _brief(record: dict[str, Any]) -> str:
    tokens = sum(record["documents"])
    kls = {name: sum(each["kl"]) / tokens for name, each in record["members"].items()}
    return "KL " + ", ".join(f"{name} {kl:.4f}" for name, kl in kls.items())
