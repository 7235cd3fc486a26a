"""Sources are found in a stable order, what has changed in them is named, and their files become
parts of which none is forgotten."""

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import json_lines, parquet, source, text_config, write

from elastic.config import ConfigError, SourceConfig
from elastic.data import sources
from elastic.data.sources import (
    SourceFiles,
    TextFile,
    find_sources,
    stdlib_files,
    stdlib_root,
    tasks_of,
)


def found(path: Path | str | SourceConfig, run: Path = Path("nowhere")) -> SourceFiles:
    return find_sources(text_config(path), outside=run)["a"]


def test_stdlib_listing_is_sorted_and_leaves_out_tests_and_packages(tmp_path: Path) -> None:
    wanted = ["a.py", "b/c.py", "b/contest/x.py", "b0.py"]
    unwanted = ["b/test/t.py", "tests/t.py", "lib2to3/tests/t.py", "idlelib/idle_test/t.py"]
    unwanted += ["site-packages/p/q.py", "b/__pycache__/c.py", "b/data.txt"]
    for name in wanted + unwanted:
        write(tmp_path / name, "")
    assert stdlib_files(tmp_path) == wanted


def test_stdlib_is_a_few_million_bytes_of_python() -> None:
    files = found(SourceConfig(kind="stdlib"))
    assert "argparse.py" in files.files and "json/decoder.py" in files.files
    assert not [name for name in files.files if "test" in Path(name).parts[:-1]]
    assert 5e6 < sum(each.bytes for each in files.files.values()) < 5e7
    assert files.paths()[0].is_relative_to(stdlib_root()) and files.with_checksums() == files
    (task,) = tasks_of("a", SourceConfig(kind="stdlib"), files)
    assert task.bytes == sum(each.bytes for each in files.files.values())


def test_a_python_without_its_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.sources\.a\.kind=stdlib: there are no \.py"):
        found(SourceConfig(kind="stdlib"))


def test_files_come_in_an_order_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order the file system has; brackets in a name are no pattern."""
    listed = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *a, **k: sorted(listed(*a, **k), reverse=True))
    names = ["a[1].txt", "b/1.txt", "b/2.jsonl.gz", "b/c/3.md"]
    for name in names:
        write(tmp_path / name, name)
    (tmp_path / "b" / "d.txt").mkdir()
    files = found(tmp_path / "**")
    assert [path.relative_to(tmp_path).as_posix() for path in files.paths()] == names
    assert [each.bytes for each in files.files.values()] == [len(name) for name in names]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none*", r"data\.sources\.a\.path=.*/none\*: no such file; must be a glob"),
        ("*.csv", r"data\.sources\.a\.path=.*: matches \.csv files; must match .*\.parquet"),
        ("LICENSE", r"data\.sources\.a\.path=.*: matches suffixless files; must match"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / "x.csv", "a,b")
    write(tmp_path / "LICENSE", "a")
    with pytest.raises(ConfigError, match=message) as error:
        found(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_run_does_not_read_its_own_output(tmp_path: Path) -> None:
    write(tmp_path / "run" / "notes.txt", "said by a tokenizer")
    write(tmp_path / "a.txt", "text")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for pattern in ("**/*.txt", "link/*.txt"):
        with pytest.raises(ConfigError, match="notes.txt, which lies in the run's own directory"):
            found(tmp_path / pattern, tmp_path / "run")


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "appended": (lambda d: write(d / "0.txt", "x" * 11), "0.txt has 11 bytes, it had 10"),
    "edited": (lambda d: write(d / "0.txt", "x" * 9 + "y"), "0.txt has other contents than it had"),
    "removed": (lambda d: (d / "1.txt").unlink(), "1.txt is gone"),
    "added": (lambda d: write(d / "3.txt", "new"), "3.txt has been added"),
    "renamed": (lambda d: (d / "0.txt").rename(d / "9.txt"), "0.txt is gone"),
    "touched": (lambda d: os.utime(d / "1.txt", ns=(5, 5)), ""),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_has_changed_is_named(tmp_path: Path, kind: str) -> None:
    """A file that was only touched, or copied back, is the same."""
    for number in range(3):
        write(tmp_path / f"{number}.txt", "x" * 10)
        os.utime(tmp_path / f"{number}.txt", ns=(1, 1))
    before = found(tmp_path / "*.txt").with_checksums().to_json()
    assert found(tmp_path / "*.txt").change("data.path", before) is None
    change, said = CHANGES[kind]
    change(tmp_path)
    now = found(tmp_path / "*.txt").change("data.path", before)
    assert now == (f"data.path: {tmp_path}/{said}" if said else None)


def test_another_name_is_another_text() -> None:
    files = {"x": TextFile(1, 0)}
    before = SourceFiles("hub", "set abc", files).to_json()
    assert SourceFiles("hub", "set abc", {}).change("s", before) is None, "kept elsewhere"
    assert SourceFiles("hub", "set def", files).change("s", before) == "s: is set def, was set abc"
    older = SourceFiles("stdlib", "3.11.1", files).to_json()
    assert SourceFiles("stdlib", "3.11.2", files).change("s", older) == "s: is 3.11.2, was 3.11.1"


@pytest.mark.parametrize("size", [1, 90, 500, 1 << 20])
def test_parts_are_all_of_the_text_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Every line and row is in one part, whatever size a part has."""
    monkeypatch.setattr(sources, "PART_BYTES", size)
    json_lines(tmp_path / "a.jsonl", *({"text": f"{n}"} for n in range(40)))
    write(tmp_path / "b.txt", "b" * 50)
    write(tmp_path / "c.jsonl", "")
    parquet(tmp_path / "d.parquet", {"text": [str(n) for n in range(7)]})
    config = source(tmp_path / "*")
    tasks = tasks_of("a", config, found(config))
    units = [unit for task in tasks for unit in task.units]
    assert all(task.source == "a" and task.config is config for task in tasks)
    assert all(task.bytes >= size for task in tasks[:-1])
    assert [unit.path for unit in units] == sorted(unit.path for unit in units)
    lines = [unit for unit in units if unit.path.name == "a.jsonl"]
    assert [unit.begin for unit in lines] == [0, *(unit.end for unit in lines[:-1])]
    assert lines[-1].end == (tmp_path / "a.jsonl").stat().st_size
    groups = [unit.groups for unit in units if unit.path.suffix == ".parquet"]
    assert [group for each in groups if each for group in range(*each)] == [0, 1, 2, 3]
    assert (len(tasks) == 1) == (size == 1 << 20)


def test_parts_are_smaller_where_few_of_them_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a sample would be one part, of one place, and larger than it was asked for."""
    monkeypatch.setattr(sources, "PART_BYTES", 4000)
    monkeypatch.setattr(sources, "LEAST_PART_BYTES", 100)
    json_lines(tmp_path / "a.jsonl", *({"text": f"{n:04d}"} for n in range(1000)))
    for wanted, least in [(None, 4000), (10**9, 4000), (2000, 500), (1, 100)]:
        config = source(tmp_path / "*", target_tokens=wanted)
        sizes = [task.bytes for task in tasks_of("a", config, found(config))]
        assert all(least <= size < least + 20 for size in sizes[:-1]) and len(sizes) > 4


def test_generated_text_is_one_part() -> None:
    config = SourceConfig(kind="arithmetic")
    files = find_sources(text_config(config, chat_template="chatml"), Path("nowhere"))["a"]
    assert files.with_checksums() == files and files.change("s", files.to_json()) is None
    (task,) = tasks_of("a", config, files)
    assert task.units == () and task.bytes == 0 and not files.paths()
