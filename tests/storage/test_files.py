"""Files and directories are whole or not there: an exception leaves the old, and no litter."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from elastic.storage.files import atomic_directory, atomic_file, digest, recover, sweep, write_json


class Interrupted(BaseException):
    """Not an `Exception`: like KeyboardInterrupt, caught by nobody on the way."""


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory, and its text."""
    return {
        str(path.relative_to(directory)): path.read_text() if path.is_file() else "<dir>"
        for path in sorted(directory.rglob("*"))
    }


# Files


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename works within one file system"
    assert tree(tmp_path) == {"a": "<dir>", "a/file": "new"}


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise Interrupted
    assert tree(tmp_path) == {}


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Interrupted), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise Interrupted
    assert tree(tmp_path) == {"file": "old"}
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"file": "new"}


def test_forgetting_to_write_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass
    assert tree(tmp_path) == {"file": "old"}


def test_contents_reach_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the contents, rename, fsync of the directory: any other order can lose data."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        kind = "directory" if os.path.isdir(f"/dev/fd/{descriptor}") else "file"
        calls.append(f"sync {kind}")
        sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_json(tmp_path / "value.json", {"a": 1})
    assert calls == ["sync file", "rename", "sync directory"]


# Directories


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out"
    with atomic_directory(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("new")
        assert not path.exists()
    assert tree(path) == {"inner": "<dir>", "inner/file": "new"}
    assert [p.name for p in path.parent.iterdir()] == ["out"]


def test_an_exception_leaves_no_directory_and_no_folders_above_it(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), atomic_directory(tmp_path / "a" / "b" / "out") as temporary:
        (temporary / "file").write_text("half")
        raise Interrupted
    assert tree(tmp_path) == {}


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other").write_text("mine")
    with pytest.raises(Interrupted), atomic_directory(tmp_path / "a" / "b" / "out"):
        raise Interrupted
    assert tree(tmp_path) == {"a": "<dir>", "a/other": "mine"}


@pytest.mark.parametrize("kind", ["file", "empty directory", "directory"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
    if kind == "directory":
        (path / "file").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r"out exists already; nothing was written$"):
        with atomic_directory(path):
            raise AssertionError("the block must not run")
    assert tree(tmp_path) == before


def test_replacing_swaps_the_whole_directory(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_directory(path, replace=True) as temporary:
        (temporary / "old").write_text("old")
    with atomic_directory(path, replace=True) as temporary:
        assert tree(temporary) == {}
        (temporary / "new").write_text("new")
        assert tree(path) == {"old": "old"}
    assert tree(tmp_path) == {"out": "<dir>", "out/new": "new"}


def test_an_exception_while_replacing_leaves_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(Interrupted), atomic_directory(path, replace=True) as temporary:
        (temporary / "new").write_text("half")
        raise Interrupted
    assert tree(tmp_path) == {"out": "<dir>", "out/old": "old"}


def test_litter_of_a_killed_process_with_the_same_id_is_cleared(tmp_path: Path) -> None:
    (tmp_path / f".out.tmp-{os.getpid()}").mkdir()
    (tmp_path / f".out.tmp-{os.getpid()}" / "litter").write_text("half")
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_text("new")
    assert tree(tmp_path) == {"out": "<dir>", "out/file": "new"}


WRITER = """
import sys, time
from pathlib import Path
from elastic.storage.files import atomic_directory

path, replace, name = Path(sys.argv[1]), sys.argv[2] == "replace", sys.argv[3]
print("ready", flush=True)
sys.stdin.readline()
try:
    with atomic_directory(path, replace=replace) as temporary:
        print("writing", flush=True)
        for number in range(20):
            (temporary / f"{name} {number}").write_text(name)
            time.sleep(0.01)
        if name == "stuck":
            time.sleep(600)
    print("wrote", flush=True)
except FileExistsError as error:
    print(f"refused: {error}", flush=True)
"""


def writer(path: Path, replace: str, name: str) -> subprocess.Popen[str]:
    """A process that waits for a line, and then writes a directory of 20 files."""
    arguments = [sys.executable, "-c", WRITER, str(path), replace, name]
    child = subprocess.Popen(arguments, stdin=-1, stdout=-1, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def last_line(child: subprocess.Popen[str]) -> str:
    return child.communicate()[0].splitlines()[-1]


@pytest.mark.parametrize("replace", ["replace", "refuse"])
def test_processes_that_write_one_directory_at_once(tmp_path: Path, replace: str) -> None:
    """With replace all of them, one after the other; without, the first. Never a mixture."""
    path = tmp_path / "new" / "out"
    children = [writer(path, replace, str(number)) for number in range(4)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    said = sorted(last_line(child) for child in children)
    if replace == "replace":
        assert said == ["wrote"] * 4
    else:
        assert said[-1] == "wrote" and all(
            line.startswith(f"refused: {path} ") for line in said[:3]
        )
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]
    written = tree(path)
    assert len(written) == 20 and len(set(written.values())) == 1


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_writes_stays(
    tmp_path: Path,
) -> None:
    child = writer(tmp_path / "out", "refuse", "stuck")
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stdout.readline() == "writing\n"
    half = tmp_path / f".out.tmp-{child.pid}"
    with pytest.raises(FileExistsError, match="out is being written by another process; nothing"):
        with atomic_directory(tmp_path / "out"):
            raise AssertionError("the block must not run")
    with atomic_directory(tmp_path / "out.tmp-2") as temporary:
        (temporary / "file").write_text("of another name")
    assert half.is_dir()
    child.kill()
    child.wait()
    child.communicate()
    assert half.is_dir()
    with atomic_directory(tmp_path / "out") as temporary:
        assert not half.exists()
        (temporary / "file").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.tmp-2"}


def test_without_locks_nobody_is_kept_out_and_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".out.tmp-1").mkdir()
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_text("new")
    assert tree(tmp_path) == {".out.tmp-1": "<dir>", "out": "<dir>", "out/file": "new"}


def test_a_directory_that_appears_while_its_successor_is_written_stays(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="out exists already; nothing was written$"):
        with atomic_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("somebody else's")
    assert tree(tmp_path) == {"out": "<dir>", "out/file": "somebody else's"}


def test_a_directory_is_on_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents, the list of them, the name, the list that the name is in."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        calls.append(f"sync {os.path.basename(os.readlink(f'/dev/fd/{descriptor}'))}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append(f"rename {source.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_text("new")
    name = temporary.name
    assert calls == ["sync file", f"sync {name}", f"rename {name}", f"sync {tmp_path.name}"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError("No space left: 1000 requested and 24 written"),
        SafetensorError("I/O error: No space left"),
    ],
)
def test_a_failed_write_says_which_file(tmp_path: Path, error: Exception) -> None:
    """Neither a write nor numpy nor safetensors does; and all of it is an OSError."""
    for context in (atomic_file(tmp_path / "out"), atomic_directory(tmp_path / "out")):
        with pytest.raises(OSError, match="No space left") as caught, context:
            raise error
        assert str(tmp_path / "out") in str(caught.value)
    assert tree(tmp_path) == {}


def test_litter_of_killed_processes_is_swept_at_any_depth(tmp_path: Path) -> None:
    for name in (".file.tmp-1", "data/.file.tmp-22", "data/.out.tmp-333/file", "data/mine.tmp-4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    sweep(tmp_path)
    assert tree(tmp_path) == {"data": "<dir>", "data/mine.tmp-4": "half"}


# JSON


def test_json_round_trips_and_ends_with_a_newline(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "ä"}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {1, 2})
    assert tree(tmp_path) == {"value.json": "1\n"}


def test_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, [1, 2], [2, 1], None]
    assert len({digest(value) for value in different}) == len(different)
    assert digest({"a": 1}) == "f9d86028c6e0d64e", "stable over releases: it names saved work"


def test_a_directory_comes_back_when_its_successor_cannot_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the two renames fails: the old content is there under its name."""
    path = tmp_path / "out"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("old")
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no space"), atomic_directory(path, replace=True) as new:
        (new / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_stepped_aside_in_a_crash_is_recovered(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("old")
    recover(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_what_stepped_aside_goes_once_its_successor_is_there(tmp_path: Path) -> None:
    """The process was killed just before it could do that."""
    for name in ("out", ".out.old"):
        (tmp_path / name).mkdir()
    recover(tmp_path / "out")
    assert tree(tmp_path) == {"out": "<dir>"}
