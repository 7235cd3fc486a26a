"""bench data: how fast text becomes tokens, and tokens batches, and whether memory grows."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from elastic.bench.measure import Work, interleave, peak_memories, synchronise
from elastic.bench.result import Figures, Result, table
from elastic.bench.subjects import TrainingStep, random_parent
from elastic.config import DataBenchConfig, DataConfig, SourceConfig
from elastic.data import Batch, PreparedData, StageText, prepare_data, stage_text, train_tokenizer
from elastic.data.sources import stdlib_files, stdlib_root

TENTH, WHOLE = "a tenth", "whole"


def measure(config: DataBenchConfig, device: torch.device) -> Result:
    """Tokenising, loading beside a training step, and peak memory."""
    with tempfile.TemporaryDirectory(dir=config.dir) as folder:
        texts = {
            TENTH: _write_text(Path(folder) / "tenth", config.megabytes / 10),
            WHOLE: _write_text(Path(folder) / "whole", config.megabytes),
        }
        tokenizer = str(Path(folder) / "tokenizer")
        sample = (stdlib_root() / name for name in stdlib_files(stdlib_root()))
        train_tokenizer(
            (path.read_text(errors="replace") for path in sample), config.vocabulary
        ).save_pretrained(tokenizer)
        memory: dict[str, float] = {}
        if config.memory:  # first, while this process holds nothing
            variants = {name: (config, path, tokenizer) for name, path in texts.items()}
            memory = peak_memories("data", variants, _preparing, torch.device("cpu"))
        prepared = {}
        for name, path in texts.items():
            start = time.perf_counter()
            data = _prepare(config, path, path / "run", tokenizer)
            prepared[name] = time.perf_counter() - start
        size = sum(path.stat().st_size for path in texts[WHOLE].glob("*.txt"))
        tokens = sum(store.tokens for store in data.stores.values())
        loaders = {f"{n} workers": _loader(config, data, n) for n in config.loader_workers}
        parent = random_parent(config.parent, config.seed, device)
        step = TrainingStep(parent, next(loaders[next(iter(loaders))]).tokens, 2048, "32-true")
        works: dict[str, Work] = {n: partial(_load, b, config.steps) for n, b in loaders.items()}
        works["step"] = partial(_train, step, config.steps)
        times = interleave(works, config.repeats, config.warmup, "data", device)
        del loaders, works  # processes of theirs read the folder
    loading = [name for name in times.seconds if name != "step"]
    each = config.sequences * config.sequence_length * config.steps
    figures: Figures = {
        "megabytes_per_second": size / 1e6 / prepared[WHOLE],
        "bytes_per_token": size / tokens,
        "packed_tokens_per_second": {name: each / times.median(name) for name in loading},
        "loader_over_step": {name: times.ratio(name, "step") for name in loading},
        "seconds": times.medians(),
    }
    rows: list[tuple[str, float, float | None, float | None]] = [
        (f"prepare, {name}", prepared[name], None, memory.get(name)) for name in texts
    ]
    rows += [
        (name, times.median(name), times.ratio(name, "step"), None) for name in (*loading, "step")
    ]
    if config.memory:
        figures["peak_memory_mib"] = memory
        figures["memory_ratio"] = memory[WHOLE] / memory[TENTH]
    header = (f"data, {size / 1e6:.0f} MB of text", "seconds", "over step", "peak MiB")
    return Result(figures, f"{table(header, rows)}\n{_said(figures)}")


def _said(figures: Figures) -> str:
    return (
        f"{figures['megabytes_per_second']:.2f} MB/s in one process, packing included; "
        f"{figures['bytes_per_token']:.2f} bytes per token"
    )


def _write_text(folder: Path, megabytes: float) -> Path:
    """Text files of this Python's own library, over and over, about that much of it; each copy of a
    file is another document."""
    folder.mkdir()
    root, left, copy = stdlib_root(), int(megabytes * 1e6), 0
    texts = [(root / name).read_bytes() for name in stdlib_files(root)]
    while left > 0:
        for number, text in enumerate(texts):
            if left <= 0:
                break
            (folder / f"{copy:04d}-{number:04d}.txt").write_bytes(b"# %d\n" % copy + text)
            left -= len(text)
        copy += 1
    return folder


def _prepare(config: DataBenchConfig, folder: Path, run_dir: Path, tokenizer: str) -> PreparedData:
    settings = DataConfig(
        sources={"text": SourceConfig(kind="files", path=f"{folder}/*.txt")},
        tokenizer=tokenizer,
        on_error="skip",
        max_skip_fraction=0.1,
        workers=1,
    )
    data = prepare_data(settings, run_dir, None)
    data.store_packs([_stage(config)])
    return data


def _preparing(config: DataBenchConfig, folder: Path, tokenizer: str) -> Work:
    return partial(_prepare, config, folder, folder / "measured", tokenizer)


def _stage(config: DataBenchConfig) -> StageText:
    return StageText("bench", config.sequence_length, config.sequences * config.steps, None)


def _loader(config: DataBenchConfig, data: PreparedData, workers: int) -> Iterator[Batch]:
    """Endless batches; processes, if any, start here."""
    text = stage_text(
        data,
        [_stage(config)],
        "bench",
        seed=config.seed,
        batch_sequences=config.sequences,
        step_sequences=config.sequences,
    )
    text.workers = workers
    return iter(text.train_dataloader())


def _load(batches: Iterator[Batch], count: int) -> None:
    for _ in islice(batches, count):
        pass


def _train(step: TrainingStep, count: int) -> None:
    for _ in range(count):
        step()
    synchronise(step.device)
