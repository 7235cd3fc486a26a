"""What a run is about to do, on one screen, before anything slow is imported. No torch."""

import os
from collections import Counter
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from elastic.config import KINDS, BudgetConfig, ParentShape, RunConfig, SourceConfig
from elastic.console import short, table
from elastic.members.architecture import Architecture
from elastic.members.cost import parameters
from elastic.members.goals import Target
from elastic.members.targets import targets_of
from elastic.parent.stock import read_config, read_shape
from elastic.routing.curriculum import Stage, budget_probabilities, plan
from elastic.routing.sizes import with_members_read

WIDTH = 80
"""Columns that the screen needs, where names and paths are not long."""

_INDENT = 11


def show(config: RunConfig) -> None:
    """Print the screen, on the first process alone; a line or two for each job of a sweep.

    Raises:
        ConfigError: a budget is above the parent, or given twice; on every process.
    """
    lines = opening(config)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        lines = brief(config)
    if _first():
        print("\n".join(lines), flush=True)


def _first() -> bool:
    """Whether this is the first process, as far as a launcher says."""
    rank = "RANK" if "RANK" in os.environ else "SLURM_PROCID"
    return os.environ.get(rank, "0") == "0"


def brief(config: RunConfig) -> list[str]:
    """One job of a sweep, whose other settings are those of its neighbours."""
    job = HydraConfig.get().job
    overrides = " ".join(job.override_dirname.split(",")) or "no settings of its own"
    return [f"{config.name}, job {job.num} of a sweep: {overrides}; in {config.run_dir}"]


def opening(config: RunConfig) -> list[str]:
    """The lines of the screen.

    Raises:
        ConfigError: a budget is above the parent, or given twice.
    """
    shape = find_shape(config)
    stages = plan(config.curriculum.stages, config.trainer)
    targets = None if shape is None else targets_of(with_members_read(config.budgets), shape)
    return [
        *_row("run", config.name),
        *_parent(config, shape),
        *_budgets(config, targets),
        *_text(config),
        *_row("teacher", _teacher(config)),
        *_row("devices", _devices(config)),
        *_stages(config, stages, list(targets or config.budgets)),
        *_places(config),
    ]


def find_shape(config: RunConfig) -> ParentShape | None:
    """Sizes of the parent, as far as this machine can tell without a download.

    What is wrong with a checkpoint is left to the check that follows.
    """
    if config.parent.shape is not None:
        return config.parent.shape
    assert config.parent.path is not None
    try:
        return read_shape(read_config(Path(config.parent.path)))
    except (OSError, ValueError):
        return None


def _row(title: str, *lines: str) -> list[str]:
    """A title, and lines beside it."""
    first, *others = lines
    return [f"{title:<{_INDENT}}{first}", *(" " * _INDENT + line for line in others)]


def _parent(config: RunConfig, shape: ParentShape | None) -> list[str]:
    path = config.parent.path
    origin = "trained here from a random start" if path is None else str(path)
    if shape is None:
        return _row("parent", origin, f"sizes are read from {path}")
    counts = Counter(shape.kinds)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS.values() if counts[kind])
    params = parameters(shape, Architecture.full(shape))
    return _row(
        "parent",
        origin,
        f"{params:,} parameters, {len(shape.kinds)} layers: {kinds}",
        f"hidden {shape.hidden_size}, vocabulary {shape.vocab_size:,}",
    )


def _budgets(config: RunConfig, targets: dict[str, Target] | None) -> list[str]:
    """Targets, as shares of the parent and in their units."""
    if targets is None:
        rows = [[name, _asked(budget)] for name, budget in config.budgets.items()]
        return _row("budgets", *table(("name", "target"), rows))
    rows = [
        [name if goal is target.goals[0] else "", str(goal), f"{goal.share:.1%}"]
        for name, target in targets.items()
        for goal in target.goals
    ]
    return _row("budgets", *table(("name", "target", "of the parent"), rows))


def _asked(budget: BudgetConfig) -> str:
    """A target before the parent's size is known."""
    shown = [
        f"{value:.1%} of the parent's {unit}" if value <= 1 else f"{round(value):,} {unit}"
        for unit, value in budget.asked.items()
    ]
    return ", ".join(shown) or "a given member"


def _source(source: SourceConfig) -> str:
    shown = {
        "stdlib": "the source code of this Python's own library",
        "files": f"files {source.path}",
        "hub": f"data set {source.path} from the hub",
        "arithmetic": f"arithmetic of difficulty {', '.join(map(str, source.difficulties))}",
    }[source.kind]
    return shown if source.weight is None else f"{shown} (weight {source.weight:g})"


def _text(config: RunConfig) -> list[str]:
    data = config.data
    source = " + ".join(_source(source) for source in data.sources.values())
    tokenizer = {
        "train": f"trained on the text, {data.tokenizer_vocab:,} tokens",
        "parent": "the parent's",
    }.get(data.tokenizer, data.tokenizer)
    return _row("text", source, f"tokenizer: {tokenizer}")


def _teacher(config: RunConfig) -> str:
    objective = config.objective
    how = {
        "replicated": "the frozen parent, on every device",
        "zero3": "the frozen parent, partitioned over the processes (zero3)",
        "cpu_offload": "the frozen parent, streamed from host memory (cpu_offload)",
        "offline": f"cached log-probabilities in {objective.teacher_cache}",
        "in_place": "the full budget's pass over the same batch (in_place)",
    }
    return how[objective.teacher]


def _devices(config: RunConfig) -> str:
    trainer = config.trainer
    kind = {"cpu": "CPU", "gpu": "GPU", "auto": "a GPU each if there is one"}[trainer.accelerator]
    processes = "1 process" if trainer.world_size == 1 else f"{trainer.world_size} processes"
    nodes = f" on {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""
    strategy = "" if trainer.strategy == "single" else f", {trainer.strategy}"
    return f"{processes}{nodes}, {kind}{strategy}, {trainer.precision}"


def _stages(config: RunConfig, stages: list[Stage], budgets: list[str]) -> list[str]:
    rows = []
    for stage in stages:
        settings = stage.config
        rows.append(
            [
                stage.name,
                settings.mode,
                short(stage.tokens),
                f"{stage.steps:,}",
                f"{settings.sequence_length:,}",
                f"{settings.batch_tokens:,}",
                _shares(stage, budgets),
            ]
        )
    header = ("name", "mode", "tokens", "steps", "length", "batch tokens", "budgets")
    lines = table(header, rows)
    if len(stages) > 1:
        tokens, steps = sum(s.tokens for s in stages), sum(s.steps for s in stages)
        lines.append(f"{short(tokens)} tokens in {steps:,} steps in all")
    return _row("stages", *lines)


def _shares(stage: Stage, budgets: list[str]) -> str:
    """How much each budget counts in a stage, largest first, in percent; before it the number of
    different ones in a draw, where that is not one."""
    if stage.config.mode == "pretrain":
        return "-"
    shares = budget_probabilities(stage.config, budgets)
    text = "/".join(f"{100 * shares[name]:.3g}" for name in budgets) + "%"
    if len(set(shares.values())) == 1:
        text = "alike"
    return text if stage.passes == 1 else f"{stage.passes}: {text}"


def _places(config: RunConfig) -> list[str]:
    run_dir = Path(config.run_dir)
    checkpoints = run_dir / "checkpoints"
    begun = checkpoints.is_dir() and any(checkpoints.iterdir())
    if begun and config.resume:
        how = "checkpoints are there: it goes on from the newest, or is finished"
    else:
        every = config.trainer.checkpoint_every
        how = f"a checkpoint every {every} steps; the same command resumes"
    where = "metrics.csv and Weights & Biases" if config.logger.wandb else "metrics.csv"
    return _row("written to", f"{run_dir}/ (elastic/, checkpoints/, {where})", how)
