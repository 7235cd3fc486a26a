"""A study: the parent, then every run that has no figures yet, then the comparison."""

import logging
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from elastic.config import StudyConfig
from elastic.storage.files import digest, require_writable, write_json
from elastic.storage.foreign import read_object
from elastic.storage.seals import Seals
from elastic.study.arms import Job, jobs_of, parent_settings
from elastic.study.compare import Record, tables, write_tables
from elastic.study.run import Task, carry_out

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
    parent = _parent(config)
    seals = Seals.read(parent)
    assert seals is not None
    records = Study(config, parent, seals.digest).carry_out()
    study = config.study
    print("\n".join(tables(study, records)))
    path = write_tables(output, study, records)
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

    def found(self, job: Job) -> Record | None:
        """Its figures, if they are there."""
        path = self.path(job)
        return Record(read_object(path)) if path.is_file() else None

    def jobs(self, name: str, seed: int, family: dict[str, Any] | None) -> list[Job]:
        return jobs_of(self.config.study, name, seed, self.parent, family)

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
            for job in self.jobs(name, seed, done[seed].family)
        ]
        return [*figures, *self._run(rest, 0)]

    def _run(self, jobs: list[Job], to_come: int) -> list[Record]:
        """Figures of some jobs, which do not wait for each other."""
        open_jobs = [job for job in jobs if self.found(job) is None]
        if len(open_jobs) < len(jobs):
            log.info("%d of %d runs have figures already", len(jobs) - len(open_jobs), len(jobs))
        start = time.monotonic()
        for count, (job, record) in enumerate(self._parallel(open_jobs), start=1):
            record |= {
                "arm": job.arm, "seed": job.seed, "alone": job.alone,
                "experiment": self.config.study.experiment, "parent_checksum": self.checksum,
                "settings": digest(job.raw), "versions": {n: version(n) for n in PACKAGES},
            }  # fmt: skip
            self.path(job).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path(job), record, None)
            each = (time.monotonic() - start) / count
            left = each * (len(open_jobs) - count + to_come) / 60
            log.info("%s: %s; about %.0f min left", job.name, _brief(record), left)
        found = [self.found(job) for job in jobs]
        assert all(record is not None for record in found)
        return [record for record in found if record is not None]

    def _parallel(self, jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Jobs as they finish, `config.jobs` at a time, each in a process of its own."""
        context = multiprocessing.get_context("spawn")
        waiting = list(jobs)
        running: dict[Future, Job] = {}
        with ProcessPoolExecutor(
            self.config.jobs, mp_context=context, max_tasks_per_child=1
        ) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self.config.jobs:
                        job = waiting.pop(0)
                        running[pool.submit(carry_out, self._task(job))] = job
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _task(self, job: Job) -> Task:
        run_dir = Path(self.config.dir) / self.config.study.experiment / job.name
        threads = self.config.threads
        return Task(job.config(run_dir), self.parent, self.config.study, threads)


def _brief(record: dict[str, Any]) -> str:
    tokens = sum(record["documents"])
    kls = {name: sum(each["kl"]) / tokens for name, each in record["members"].items()}
    return "KL " + ", ".join(f"{name} {kl:.4f}" for name, kl in kls.items())
