"""Checkpoints on disk: whole or not there, and whatever is damaged is found, named and passed over.

What a full disk does is done here by a limit on the size of a file: the same error at the same
place, and no rights are needed for it.
"""

import json
import logging
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.cluster_processes import processes

from elastic.cluster.place import ALONE, Place
from elastic.cluster.rendezvous import joined
from elastic.config import ConfigError
from elastic.storage.seals import FileSeal
from elastic.training.resume import CheckpointFailed, CheckpointStore, Saved, restore_random
from elastic.training.resume.store import inspect

FILES = (
    "manifest.json",
    "pieces-00000-of-00001.safetensors",
    "random-00000-of-00001.safetensors",
    "shared.safetensors",
    "state.json",
)


class Killed(BaseException):
    """Not an `Exception`: nobody on the way can do anything about it."""


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2, place=ALONE)


def save(store: CheckpointStore, step: int, index: int = 0, ends: bool = False) -> Saved:
    """A checkpoint whose contents tell its step."""
    state = {"stage_index": index, "stage": f"s{index}", "step": step}
    pieces = {"weight:w:0": torch.full((1000,), float(step))}
    return store.save(state, pieces, {"r": torch.tensor([step])}, ends)


def names(store: CheckpointStore) -> list[str]:
    """Everything beside each other in the store's directory."""
    return sorted(path.name for path in store.root.iterdir()) if store.root.is_dir() else []


def again(store: CheckpointStore) -> CheckpointStore:
    """The store as the next process finds it."""
    return CheckpointStore(store.root, store.keep, ALONE)


def step_of(saved: Saved | None) -> int:
    assert saved is not None and inspect(saved.path) is None
    step = int(saved.state["step"])
    assert saved.pieces.read("weight", "w", 0, 1000).eq(step).all()
    return step


def test_what_was_saved_comes_back(store: CheckpointStore) -> None:
    torch.manual_seed(5)
    written = save(store, 3)
    expected = torch.rand(4)
    found = again(store).newest()
    assert found == written and step_of(found) == 3
    assert found.shared["r"].tolist() == [3]
    assert sorted(path.name for path in found.path.iterdir()) == sorted(FILES)
    state = found.random(ALONE)
    assert state is not None and found.random(Place(0, 0, 2, 2)) is None
    restore_random(state)
    assert torch.rand(4).equal(expected)


def test_nothing_is_found_where_nothing_was_saved(store: CheckpointStore) -> None:
    assert store.newest() is None and store.latest is None
    store.root.mkdir()
    assert store.newest() is None


def test_the_newest_is_the_last_of_the_last_stage(store: CheckpointStore) -> None:
    for index, step in ((0, 900), (1, 5), (1, 20), (2, 1)):
        save(store, step, index, ends=True)
    found = again(store).newest()
    assert found is not None and (found.state["stage_index"], found.state["step"]) == (2, 1)


def test_the_last_few_stay_and_one_per_stage(store: CheckpointStore) -> None:
    for step in (2, 4, 6):
        save(store, step)
    assert names(store) == ["00-s0-000000004", "00-s0-000000006"]
    save(store, 7, ends=True)
    save(store, 1, index=1)
    save(store, 2, index=1)
    save(store, 3, index=1)
    save(store, 4, index=1, ends=True)
    kept = ["00-s0-000000007", "01-s1-000000002", "01-s1-000000003", "01-s1-000000004"]
    assert names(store) == kept


# Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, bit: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    bit = 4 * len(data) if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def drawn_bits(path: Path, count: int) -> list[int]:
    return random.Random(0).sample(range(8 * path.stat().st_size), count)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, remove])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    file: str,
    damage: Callable[[Path], None],
    store: CheckpointStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, newest = save(store, 1), save(store, 2)
    damage(newest.path / file)
    with caplog.at_level(logging.WARNING):
        assert step_of(again(store).newest()) == 1
    (line,) = caplog.messages
    assert str(newest.path) in line and file in line and before.path.name in line
    assert names(store) == [before.path.name, newest.path.name + ".damaged"]


def test_an_unknown_format_is_not_guessed_at(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 7}))
    assert step_of(again(store).newest()) == 1
    assert "format_version=7 is unknown" in caplog.text


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "null", "{}", '{"format_version": 2, "files": {}, "ends_stage": false}'],
)
def test_a_manifest_that_says_too_little_vouches_for_nothing(
    manifest: str, store: CheckpointStore
) -> None:
    path = save(store, 1).path
    (path / "manifest.json").write_text(manifest)
    assert inspect(path) == "manifest.json cannot be read"


def test_any_flipped_bit_is_noticed(store: CheckpointStore) -> None:
    """In every file, and all over what the manifest says that is not about files."""
    path = save(store, 12, ends=True).path
    bits = {name: drawn_bits(path / name, 25) for name in FILES}
    manifest = (path / "manifest.json").read_bytes()
    start, stop = manifest.index(b"ends_stage"), manifest.index(b"files")
    bits["manifest.json"] += range(8 * start, 8 * stop)
    for name, positions in bits.items():
        for bit in positions:
            flip(path / name, bit)
            assert inspect(path) is not None, (name, bit)
            flip(path / name, bit)
    assert inspect(path) is None


def test_a_file_that_cannot_be_read_is_damage(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, say."""
    path = save(store, 1).path

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileSeal, "of", fail)
    said = "pieces-00000-of-00001.safetensors: cannot be read (Input/output error)"
    assert inspect(path) == said


def test_the_newest_whole_one_is_used_however_many_are_damaged(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.keep = 4
    saved = [save(store, step) for step in (1, 2, 3, 4)]
    truncate(saved[3].path / "shared.safetensors")
    remove(saved[2].path / "state.json")
    flip(saved[0].path / "state.json")  # older than the one that is used: nobody looks
    assert step_of(again(store).newest()) == 2
    assert [str(one.path) in line for one, line in zip(saved[:1:-1], caplog.messages, strict=True)]
    whole = [path.name for path in (saved[0].path, saved[1].path)]
    aside = [f"{one.path.name}.damaged" for one in saved[2:]]
    assert names(store) == [*whole, *aside]


def test_the_run_goes_on_over_what_was_set_aside(store: CheckpointStore) -> None:
    """And where the same one is damaged again, it takes the place of the first."""
    save(store, 1)
    for _ in range(2):
        truncate(save(store, 2).path / "state.json")
        store = again(store)
        assert step_of(store.newest()) == 1
    assert step_of(save(store, 2)) == 2
    assert names(store) == ["00-s0-000000001", "00-s0-000000002", "00-s0-000000002.damaged"]


def test_all_damaged_is_one_clear_refusal_and_nothing_is_touched(store: CheckpointStore) -> None:
    for step in (1, 2):
        truncate(save(store, step).path / "state.json")
    before = names(store)
    refusal = r"s0-000000002: damaged \(state.json: has .* and so is every other .*; restore one"
    with pytest.raises(ConfigError, match=refusal) as caught:
        again(store).newest()
    assert "\n" not in str(caught.value)
    assert names(store) == before


# Writing that fails, and writing that is killed


OPERATIONS = [(os, name) for name in ("fsync", "mkdir", "rename", "replace", "unlink")]
OPERATIONS.append((shutil, "rmtree"))


class Stop:
    """Raises instead of the n-th operation on the file system."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
        self.left, self.error = number, error
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, original: Callable) -> Callable:
        def stopped(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise self.error
            return original(*args, **kwargs)

        return stopped


def stopped_everywhere(store: CheckpointStore, error: BaseException) -> Iterator[Exception | None]:
    """Save the third checkpoint again and again, stopped at the first operation, the second..."""
    save(store, 1)
    save(store, 2)
    whole = store.root.with_name("two")
    shutil.copytree(store.root, whole)
    for number in range(1, 200):
        shutil.rmtree(store.root)
        shutil.copytree(whole, store.root)
        assert step_of(store.newest()) == 2
        with pytest.MonkeyPatch.context() as patch:
            stop = Stop(patch, number, error)
            try:
                save(store, 3)
            except (CheckpointFailed, Killed) as caught:
                yield caught
            else:
                yield None
        if stop.left > 0:
            return
    raise AssertionError("it never ends")


def test_a_killed_write_leaves_the_old_or_the_new(store: CheckpointStore) -> None:
    """Before every single operation; the next process finds one of the two, and no litter."""
    found = []
    for _ in stopped_everywhere(store, Killed()):
        found.append(step_of(again(store).newest()))
        kept = [1, 2] if found[-1] == 2 else [2, 3]
        assert names(store) == [f"00-s0-{step:09d}" for step in kept]
    assert found == sorted(found) and set(found) == {2, 3}
    assert len(found) > 10


def test_a_failed_write_leaves_the_checkpoints_before_it(store: CheckpointStore) -> None:
    """At every single operation; nothing temporary stays, and the error says all there is to."""
    failed = 0
    for caught in stopped_everywhere(store, OSError(28, "No space left on device")):
        assert step_of(again(store).newest()) in (2, 3)
        if caught is None:
            continue
        failed += 1
        assert not any(name.startswith(".") for name in names(store))
        message = str(caught)
        for part in (
            f"{store.root / '00-s0-000000003'}: could not be written",
            "No space left on device",
            str(store.root / "00-s0-000000002"),
        ):
            assert part in message
        assert "\n" not in message
    assert failed > 10


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """What is written past `size` bytes of a file is refused, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 3000, 4500], ids=["state", "state2", "pieces", "random"])
def test_a_disk_that_is_full_half_way(store: CheckpointStore, size: int) -> None:
    """The system refuses the rest of a file; once there is room the run goes on."""
    before = save(store, 1)
    with no_file_over(size), pytest.raises(CheckpointFailed, match="File too large"):
        save(store, 2)
    assert names(store) == [before.path.name]
    assert step_of(again(store).newest()) == 1
    assert step_of(save(store, 2)) == 2


def test_the_first_checkpoint_fails(store: CheckpointStore) -> None:
    with no_file_over(100), pytest.raises(CheckpointFailed, match="start the same command again"):
        save(store, 1)
    assert names(store) == [] and again(store).newest() is None


def two_save(rank: int, count: int, tell: Callable[[str], None], root: Path) -> None:
    """Both save twice; the second time rank 1 cannot write. The third time it can again."""
    place = Place(rank, rank, count, count)
    with joined(place, torch.device("cpu"), "test"):
        store = CheckpointStore(root, 2, place)
        for step in (1, 2):
            state = {"stage_index": 0, "stage": "s", "step": step}
            pieces = {f"weight:w:{5000 * rank}": torch.full((5000,), float(10 * rank + step))}
            try:
                with no_file_over(1000 if (rank, step) == (1, 2) else resource.RLIM_INFINITY):
                    store.save(state, pieces, {"r": torch.tensor([step])}, False)
                tell("saved")
            except CheckpointFailed as error:
                tell(str(error))
        tell(f"left {sorted(path.name for path in root.iterdir())}")
        found = CheckpointStore(root, 2, place).newest()
        assert found is not None
        tell(f"newest {found.state['step']}")
        tell(f"read {found.pieces.read('weight', 'w', 4999, 2).tolist()}")
        store.save(state, pieces, {"r": torch.tensor([2])}, False)
        tell(f"random of its own: {found.random(place) is not None}")


def test_where_one_of_two_processes_cannot_write_nobody_has_saved(tmp_path: Path) -> None:
    """Both fail alike, with the reason of the one that could not, and go on alike."""
    root = tmp_path / "checkpoints"
    with processes(tmp_path, two_save, 2, root) as two:
        assert two.codes() == [0, 0], (two.errors(0), two.errors(1))
        for rank in (0, 1):
            saved, failed, *rest = two.told(rank)
            assert saved == "saved"
            assert failed.startswith(f"{root / '00-s-000000002'}: could not be written (process 1:")
            assert "File too large" in failed and str(root / "00-s-000000001") in failed
            assert rest == [
                "left ['00-s-000000001']",
                "newest 1",
                "read [1.0, 11.0]",
                "random of its own: True",
            ]
    found = CheckpointStore(root, 2, ALONE).newest()
    assert found is not None and found.state["step"] == 2
    assert found.random(ALONE) is None, "another number of processes wrote it"


def test_the_checkpoint_at_a_stages_end_is_found_only_whole(store: CheckpointStore) -> None:
    """And says what its model is made from."""
    store.origin |= {"tokens": "t", "parent": "p"}
    saved = save(store, 1, ends=True)
    save(store, 2)
    stage = saved.state["stage"]
    found = again(store).end_of(saved.state["stage_index"], stage, 1)
    assert found is not None and found.path == saved.path
    assert found.state["made_from"] == {"parent": "p", "tokens": "t"}
    assert again(store).end_of(saved.state["stage_index"], stage, 3) is None
    flip(saved.path / "state.json")
    assert again(store).end_of(saved.state["stage_index"], stage, 1) is None
