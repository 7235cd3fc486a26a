"""Every command: its name, what its help says, its settings, and what it runs.

What runs is imported when it runs, once the settings are known to be good: torch takes seconds.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from elastic.config import (
    BENCHES,
    BenchConfig,
    CacheTeacherConfig,
    EvaluateConfig,
    ExtractConfig,
    PlanConfig,
    PrepareConfig,
    RunConfig,
    StudyConfig,
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command as it is typed, explained and run."""

    name: str
    """What is typed after `elastic`."""
    config: str
    """Its file in conf/, without .yaml."""
    schema: type
    run: Callable[[Any], None]
    summary: str
    """One line."""
    text: str = ""
    """What else there is to know before it is used."""
    groups: tuple[str, ...] = ()
    """Groups of conf/ that its help lists."""
    settings: tuple[str, ...] = ()
    """Settings that its help explains, in the words of the schema; NAME is any entry's name."""
    examples: tuple[tuple[str, str], ...] = ()
    """What is typed after the name, and what that does."""
    also: str
    """Another way to start it, from a checkout."""


def train(config: RunConfig) -> None:
    from elastic.cluster.start import check_started
    from elastic.training.opening import show

    check_started(config.trainer)
    show(config)
    from elastic.training.launch import launch  # torch: once there is something to read

    launch(config)


def extract(config: ExtractConfig) -> None:
    """Exit code 1 when the result differs or cannot be written; nothing is left behind then."""
    from safetensors import SafetensorError

    from elastic.extract.compare import VerificationError
    from elastic.extract.export import extract

    try:
        extract(config)
    except FileExistsError:
        raise  # a wrong setting, exit code 2
    except (VerificationError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def plan(config: PlanConfig) -> None:
    """Print what a run would do and whether it fits; exit code 2 for one that cannot be."""
    from elastic.cluster.start import given_settings
    from elastic.plan.text import describe
    from elastic.plan.work import make_plan
    from elastic.storage.files import require_writable, write_json

    if config.json is not None:
        require_writable("json", Path(config.json))
    made = make_plan(config, given_settings())
    if config.json is not None:
        write_json(Path(config.json), made)
    print(describe(made))


def evaluate(config: EvaluateConfig) -> None:
    from elastic.evaluate.family import evaluate

    evaluate(config)


def study(config: StudyConfig) -> None:
    from elastic.study.work import work

    work(config)


def prepare(config: PrepareConfig) -> None:
    """Prepare the text of a run."""
    from elastic.training.prepare_text import prepare_text

    prepare_text(config)


def cache_teacher(config: CacheTeacherConfig) -> None:
    """Write this worker's part of the cache; exit code 1 when the disk does not take it."""
    from elastic.teacher.cache.write import write_cache

    try:
        write_cache(config)
    except FileExistsError:
        raise  # a wrong setting, exit code 2
    except OSError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        sys.exit(1)


def bench(name: str) -> Command:
    """One of the benches."""

    def run(config: BenchConfig) -> None:
        from elastic.bench.result import report

        report(name, config, import_module(f"elastic.bench.{name}").measure)

    doc = BENCHES[name].__doc__ or ""
    return Command(
        name=f"bench {name}",
        config=f"bench/{name}",
        schema=BENCHES[name],
        run=run,
        summary=" ".join(doc.split()),
        text="Prints a table; figures are medians over rounds, with what the machine was.",
        settings=("device", "repeats", "warmup", "json"),
        examples=(
            ("", "with the settings in conf/"),
            ("repeats=2 device=cpu", "fewer rounds, without a GPU"),
            ("json=figures.json", "the figures into a file too"),
        ),
        also=f"python -m elastic.bench {name}",
    )


COMMANDS = {
    command.name: command
    for command in (
        Command(
            name="train",
            config="train",
            schema=RunConfig,
            run=train,
            summary="Train a family of model sizes in one run.",
            text="Ranks and sorts a parent, trains all budgets together, and writes an elastic "
            "checkpoint, which holds every member, to RUN_DIR/elastic. Without settings it trains "
            "the tiny family, on a CPU. The same command again resumes.",
            groups=("experiment", "parent", "data", "trainer", "debug"),
            settings=(
                "run_dir",
                "resume",
                "parent.path",
                "budgets.NAME.params",
                "data.path",
                "trainer.devices",
                "trainer.strategy",
                "trainer.micro_batch_tokens",
                "objective.teacher",
            ),
            examples=(
                ("debug=one_step", "see that everything runs"),
                ("budgets.small.params=0.4 run_dir=runs/smaller", "another size"),
                ("--multirun seed=0,1,2", "three runs, a directory each"),
            ),
            also="python train.py",
        ),
        Command(
            name="extract",
            config="extract",
            schema=ExtractConfig,
            run=extract,
            summary="Cut one member out of an elastic checkpoint: no training, no GPU.",
            text="Writes a plain Hugging Face checkpoint, re-opens it with stock transformers and "
            "compares its logits with the masked parent's. Exit code 1, and no output, when they "
            "differ.",
            settings=("checkpoint", "budget", "output", "dtype", "export", "verify"),
            examples=(
                ("checkpoint=runs/tiny/elastic budget=small output=out/small", "the small member"),
                (
                    "checkpoint=runs/tiny/elastic budget=medium output=out/medium dtype=bfloat16",
                    "in another type",
                ),
                (
                    "checkpoint=runs/tiny/elastic budget=small output=out/unseen verify=false",
                    "without the comparison",
                ),
            ),
            also="python extract.py",
        ),
        Command(
            name="plan",
            config="plan",
            schema=PlanConfig,
            run=plan,
            summary="Say what a run would do and whether it fits, in seconds.",
            text="Needs no weights and no GPU: members, work, memory per GPU. Takes every setting "
            "of train, and these of its own:",
            groups=("experiment",),
            settings=(
                "plan.gpus",
                "plan.gpu_gib",
                "plan.gpu_tflops",
                "plan.utilisation",
                "plan.contexts",
                "plan.price_per_gpu_hour",
                "json",
            ),
            examples=(
                ("experiment=nano_v2_12b", "the published 12B family"),
                ("experiment=nano_v2_12b 'plan.gpus=[8,32]' json=plan.json", "on fewer GPUs"),
                ("budgets.small.params=0.4", "whether a size can be reached"),
            ),
            also="python -m elastic.plan",
        ),
        Command(
            name="evaluate",
            config="evaluate",
            schema=EvaluateConfig,
            run=evaluate,
            summary="Measure every member of a run on the text that nothing was chosen by.",
            text="Members that have been extracted are measured as extracted, others are cut in "
            "memory.",
            settings=(
                "run_dir",
                "members",
                "sequences",
                "sequence_length",
                "prompts",
                "tasks",
                "problems",
                "difficulties",
                "output",
            ),
            examples=(
                ("run_dir=runs/tiny", "members cut in memory"),
                ("run_dir=runs/tiny members=runs/tiny/members", "or as extracted"),
                ("run_dir=runs/tiny_reasoning tasks=[arithmetic]", "problems to answer"),
            ),
            also="python -m elastic.evaluate",
        ),
        Command(
            name="study",
            config="study",
            schema=StudyConfig,
            run=study,
            summary="Compare ways to train a family, at equal tokens, from the same parent.",
            text="Trains the parent once, then every arm with every seed, and prints paired "
            "differences on text by which nothing was chosen. Figures of finished runs are kept, "
            "and the same command goes on from there.",
            groups=("study",),
            settings=(
                "study.run",
                "study.seeds",
                "study.experiment",
                "study.settings",
                "dir",
                "results",
                "output",
                "jobs",
                "threads",
            ),
            examples=(
                ("study=quick", "on the tiny parent, one seed"),
                ("'study.run=[elastic,sorted]' 'study.seeds=[0,1]'", "two arms"),
                ("jobs=2 threads=1", "two runs at a time"),
            ),
            also="python -m elastic.study",
        ),
        Command(
            name="prepare",
            config="prepare",
            schema=PrepareConfig,
            run=prepare,
            summary="Tokenise and pack a run's text before the run, and show it.",
            text="Reads every source once, by all cores, and keeps what is done: the same command "
            "goes on where it was stopped. Training with the same settings starts at once.",
            groups=("data", "experiment", "curriculum"),
            settings=(
                "data.sources",
                "data.path",
                "data.prepared",
                "data.packing",
                "data.on_error",
                "data.workers",
                "preview",
            ),
            examples=(
                ("preview=2", "the tiny run's text, and two sequences of each stage"),
                ("data=files 'data.path=texts/*.jsonl' data.tokenizer=train", "your own files"),
                ("data=arithmetic curriculum=tiny_reasoning preview=1", "problems with reasoning"),
            ),
            also="python -m elastic.data",
        ),
        *map(bench, BENCHES),
        Command(
            name="cache-teacher",
            config="cache_teacher",
            schema=CacheTeacherConfig,
            run=cache_teacher,
            summary="Write the teacher's top-k log-probabilities of a run's text to disk.",
            text="Training then reads them instead of running the teacher. Give every setting of "
            "the run, so that the text comes in its order; workers, under srun or torchrun, share "
            "the files.",
            settings=(
                "objective.teacher_cache",
                "objective.top_k",
                "cache.batch_tokens",
                "cache.shard_sequences",
                "cache.log_probs",
            ),
            examples=(
                ("objective.teacher_cache=cache objective.top_k=64", "for the tiny run"),
                (
                    "experiment=nano_v2_12b parent.path=DIR objective.teacher_cache=DIR "
                    "objective.top_k=64",
                    "for the 12B",
                ),
                (
                    "objective.teacher_cache=cache objective.top_k=64 cache.worker=1 "
                    "cache.workers=2",
                    "the second of two workers",
                ),
            ),
            also="python -m elastic.teacher",
        ),
    )
}
"""By name; a bench's name has two words."""

NAMES = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS))
"""What comes after `elastic`."""
