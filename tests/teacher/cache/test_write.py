"""Writing a cache: by the command, in pieces, by several workers, killed on the way."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.paths import ROOT
from helpers.runs import settings
from helpers.teacher_caches import Case
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import elastic.teacher.cache.write
from elastic.cli.command import CONF
from elastic.config import CacheConfig, CacheTeacherConfig, ConfigError, RunConfig, parse
from elastic.teacher.cache.index import INDEX, CacheIndex
from elastic.teacher.cache.write import write_cache


def files(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file()
    }


def refusal(case: Case) -> str:
    with pytest.raises(ConfigError) as caught:
        write_cache(case.config)
    line = str(caught.value)
    assert "\n" not in line
    return line


# Resuming, and several at once


def test_only_what_is_missing_or_damaged_is_written_again(
    case: Case, make: Callable[..., Case]
) -> None:
    mine = make()
    write_cache(mine.config)
    whole, shards = files(mine.cache), sorted(mine.cache.rglob("*.safetensors"))
    assert whole == files(case.cache)
    shards[0].unlink()
    shards[2].write_bytes(whole[str(shards[2].relative_to(mine.cache))][:-1])
    left = shards[0].with_name(f".{shards[0].name}.tmp-1")  # what a killed worker leaves
    left.write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in shards[1:]}
    write_cache(mine.config)
    assert files(mine.cache) == whole
    changed = [path for path in shards[1:] if path.stat().st_mtime_ns != times[path]]
    assert changed == [shards[2]]


def test_workers_share_the_files_of_one_store(case: Case, make: Callable[..., Case]) -> None:
    """One after the other each writes its own; the cache is the one that a single worker writes."""
    parts = []
    for worker in (2, 0, 1):
        mine = make("cache.workers=3", f"cache.worker={worker}")
        before = set(files(mine.cache)) if mine.cache.exists() else set()
        write_cache(mine.config)
        parts.append(set(files(mine.cache)) - before - {INDEX})
    assert len(set.union(*parts)) == sum(map(len, parts)) and min(map(len, parts)) > 1
    assert files(mine.cache) == files(case.cache)


def test_workers_may_start_at_the_same_moment(case: Case, make: Callable[..., Case]) -> None:
    cases = [make("cache.workers=3", f"cache.worker={worker}") for worker in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_cache, [each.config for each in cases]))
    assert files(cases[0].cache) == files(case.cache)


def test_another_worker_may_begin_while_the_directory_is_looked_at(
    case: Case, make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes index and files between any two looks of ours."""
    first, second = (make("cache.workers=2", f"cache.worker={worker}") for worker in range(2))
    is_file, begun = Path.is_file, []

    def look(path: Path) -> bool:
        found = is_file(path)
        if path.name == INDEX and not begun:
            begun.append(path)
            write_cache(first.config)
        return found

    monkeypatch.setattr(Path, "is_file", look)
    write_cache(second.config)
    assert begun and files(second.cache) == files(case.cache)


def test_a_longer_run_adds_to_the_store(make: Callable[..., Case]) -> None:
    """What is there stays, but for a last file that was not full."""
    short, long = make(), make("curriculum.stages.long.tokens=3000")
    write_cache(short.config)
    before = files(short.cache)
    write_cache(long.config)
    after = files(long.cache)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {INDEX, "long/train/000000.safetensors"}
    short.reader()
    long.reader()
    write_cache(short.config)  # the shorter run takes nothing away
    assert files(long.cache) == after


STUCK = """
import runpy, sys, time
from elastic.teacher.cache import shards

save, calls = shards.save_file, iter(range(1000))

def half(arrays, path, *arguments):
    save(arrays, path, *arguments)
    if next(calls) == 3:
        with open(path, "r+b") as file:
            file.truncate(100)
        print("stuck", flush=True)
        time.sleep(1200)

shards.save_file = half
sys.argv[0] = "elastic cache-teacher"
runpy.run_module("elastic.teacher", run_name="__main__")
"""


def test_a_killed_command_goes_on_where_it_was(case: Case, make: Callable[..., Case]) -> None:
    """SIGKILL in the midst of the fourth file; the end is that of a command that was not killed."""
    mine = make()
    command = [sys.executable, "-c", STUCK, *mine.overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line == "stuck\n":
            break
    process.kill()
    process.communicate()
    assert said[-1:] == ["stuck\n"], "".join(said)
    assert process.returncode == -signal.SIGKILL
    assert len(list(mine.cache.rglob("*.safetensors"))) == 3
    with pytest.raises(ConfigError, match="files are missing"):
        mine.reader()
    write_cache(mine.config)
    assert files(mine.cache) == files(case.cache)


# Refusals


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make()
    usage = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(elastic.teacher.cache.write, "shutil", usage)
    line = refusal(mine)
    assert "bytes are to be written and 1,000 are free" in line and "objective.top_k" in line
    assert not mine.cache.exists()


def test_the_bytes_that_are_named_are_those_that_are_written(
    make: Callable[..., Case], caplog: pytest.LogCaptureFixture
) -> None:
    """But for a header of each file."""
    mine = make()
    with caplog.at_level("INFO"):
        write_cache(mine.config)
    (line,) = [line for line in caplog.messages if "bytes; worker" in line]
    named = int(line.split(" bytes;")[0].split()[-1].replace(",", ""))
    sizes = [path.stat().st_size for path in mine.cache.rglob("*.safetensors")]
    assert named < sum(sizes) < named + 1000 * len(sizes)
    assert "the cache is complete" in caplog.messages


def test_a_store_begun_in_another_way_is_refused(make: Callable[..., Case]) -> None:
    write_cache(make("cache.workers=99", "cache.worker=98").config)  # the index, no file
    for change in ("cache.shard_sequences=21", "cache.log_probs=float16"):
        assert f"{change}: objective.teacher_cache=" in refusal(make(change))
    assert "seed is 1 here and 0 in the cache" in refusal(make("seed=1"))


def test_a_directory_of_something_else_is_refused(make: Callable[..., Case]) -> None:
    mine = make()
    mine.cache.mkdir()
    (mine.cache / "thesis.tex").touch()
    assert "not empty, and not a cache" in refusal(mine)
    assert files(mine.cache) == {"thesis.tex": b""}


def test_a_run_without_a_trained_parent_has_no_teacher(case: Case, tmp_path: Path) -> None:
    config = dataclasses.replace(case.config, run_dir=str(tmp_path))
    line = refusal(dataclasses.replace(case, config=config))
    assert "there is no trained parent" in line and "run elastic train with" in line


def test_an_index_survives_its_file(case: Case) -> None:
    index = CacheIndex.read(case.cache)
    assert index.contents == case.wanted()
    assert index.key("short") != index.key("long")


# Settings


def composed(*overrides: str) -> CacheTeacherConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(compose("cache_teacher", list(overrides)), CacheTeacherConfig)


def test_the_settings_are_those_of_the_run(tmp_path: Path) -> None:
    """Experiments and groups are chosen as for train.py."""
    cache = ["objective.teacher_cache=DIR", "objective.top_k=5", "data.validation_every=9"]
    mine = composed(f"run_dir='{tmp_path}'", "experiment=tiny_heterogeneous", *cache)
    run = settings(tmp_path, "objective.teacher=offline", *cache, experiment="tiny_heterogeneous")
    for field in dataclasses.fields(RunConfig):
        assert getattr(mine, field.name) == getattr(run, field.name)
    written = OmegaConf.load(CONF / "cache_teacher.yaml")["cache"]
    assert set(written) == {field.name for field in dataclasses.fields(CacheConfig)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, (3, 8)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_workers_find_their_number_themselves(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cache = composed("objective.teacher_cache=DIR", "objective.top_k=5").cache
    assert (cache.worker, cache.workers) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cache.worker=2", "cache.worker=2: must be at least 0 and below cache.workers=1"),
        ("cache.shard_sequences=0", "cache.shard_sequences=0: must be positive"),
        ("cache.log_probs=bfloat16", "cache.log_probs=bfloat16: must be one of float16, float32"),
        ("objective.teacher=replicated", "objective.teacher=replicated: must be offline"),
        ("objective.top_k=null", "objective.top_k=None"),
        ("objective.teacher_cache=null", "objective.teacher_cache=None"),
    ],
)
def test_impossible_settings_stop_at_the_gate(change: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed("objective.teacher_cache=DIR", "objective.top_k=5", change)
    assert words in str(caught.value)
