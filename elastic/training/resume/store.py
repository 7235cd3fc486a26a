"""The directory of resume checkpoints: whole ones only, checksummed, the newest few.

checkpoints/01-short-000000200/
  state.json                       where the run stands
  shared.safetensors               the router with its optimizer: the same on every process
  pieces-00000-of-00002.safetensors   what each process holds of weights and optimizer
  random-00000-of-00002.safetensors   the state of each process' random generators
  manifest.json                    sizes and checksums of all of these; written last
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.cluster.place import Place, from_all, from_first, wait_for_all
from elastic.config import ConfigError
from elastic.storage.files import sync, write_json
from elastic.storage.foreign import read_json
from elastic.storage.seals import FileSeal, SealBroken, Seals
from elastic.training.origin import ORIGIN
from elastic.training.resume.pieces import Pieces

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""2: checksums per block, and what a state is made from; 1 had SHA-256."""
_TEMPORARY = ".new-"
"""Begins the name of what is being written or taken away: a process may be killed meanwhile."""
_DAMAGED = ".damaged"


class CheckpointFailed(OSError):
    """A checkpoint could not be written; those before it are whole."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    path: Path
    state: dict[str, Any]

    @property
    def pieces(self) -> Pieces:
        return Pieces(sorted(self.path.glob("pieces-*.safetensors")))

    @property
    def shared(self) -> dict[str, Tensor]:
        return load_file(self.path / "shared.safetensors")

    def random(self, place: Place) -> dict[str, Tensor] | None:
        """State of the random generators, where as many processes wrote it."""
        path = self.path / _part("random", place)
        return load_file(path) if path.is_file() else None


class CheckpointStore:
    """Writes and finds checkpoints; every process calls its methods together.

    Args:
        keep: how many of the newest stay, beside the last one of every stage.
    """

    def __init__(self, root: Path, keep: int, place: Place) -> None:
        self.root, self.keep, self.place = root, keep, place
        self.latest: Saved | None = None
        self.origin: dict[str, str] = {}
        """What the model is trained from, for the states to come: see `elastic.training.origin`."""

    def save(
        self,
        state: dict[str, Any],
        pieces: dict[str, Tensor],
        shared: dict[str, Tensor],
        ends_stage: bool,
    ) -> Saved:
        """Write a checkpoint: temporary name, fsync, rename.

        state: JSON, with `stage_index`, `stage` and `step`. pieces: this process' own. shared:
        alike on all; rank 0 writes them.

        Raises:
            CheckpointFailed: on every process, when one of them could not write.
        """
        name = _name(state["stage_index"], state["stage"], state["step"])
        state = state | {ORIGIN: dict(sorted(self.origin.items()))}
        temporary, path = self.root / (_TEMPORARY + name), self.root / name
        files: dict[str, dict[str, Any]] = {}
        self._together(path, lambda: self._begin(temporary) if self.place.rank == 0 else None)

        def write() -> None:
            files[_part("pieces", self.place)] = _write(
                temporary / _part("pieces", self.place), pieces
            )
            files[_part("random", self.place)] = _write(
                temporary / _part("random", self.place), random_state()
            )
            if self.place.rank == 0:
                files["shared.safetensors"] = _write(temporary / "shared.safetensors", shared)
                write_json(temporary / "state.json", state)
                files["state.json"] = _describe(temporary / "state.json")

        self._together(path, write)
        everything = {n: entry for part in from_all(files) for n, entry in part.items()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "ends_stage": ends_stage,
            "files": dict(sorted(everything.items())),
        }

        def finish() -> None:
            if self.place.rank == 0:
                write_json(temporary / "manifest.json", manifest)
                sync(temporary)
                shutil.rmtree(path, ignore_errors=True)
                os.rename(temporary, path)
                sync(self.root)
                self._prune()

        self._together(path, finish)
        self.latest = Saved(path, state)
        return self.latest

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole; damaged ones are named and set aside.

        Raises:
            ConfigError: there are checkpoints, and none is whole.
        """
        found: Any = self._newest() if self.place.rank == 0 else None
        self.latest, problem = from_first(found)
        if problem:
            raise ConfigError(problem)
        return self.latest

    def end_of(self, index: int, stage: str, step: int) -> Saved | None:
        """The checkpoint with which a stage has ended; None where it is not there, or not whole."""
        path = self.root / _name(index, stage, step)
        if not from_first(self.place.rank == 0 and inspect(path) is None):
            return None
        return Saved(path, read_json(path / "state.json"))

    def _newest(self) -> tuple[Saved | None, str]:
        for leftover in self.root.glob(_TEMPORARY + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._all()):
            problem = inspect(path)
            if problem is None:
                state = read_json(path / "state.json")
                for other, what in damaged:
                    aside = other.with_name(other.name + _DAMAGED)
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(other, aside)
                    log.warning(
                        "%s is damaged (%s) and set aside as %s: going on from %s instead",
                        other, what, aside.name, path.name,
                    )  # fmt: skip
                self._prune()
                return Saved(path, state), ""
            damaged.append((path, problem))
        if damaged:
            path, problem = damaged[0]
            return None, (
                f"{path}: damaged ({problem}), and so is every other checkpoint in {self.root}; "
                "restore one of them, or choose another run_dir"
            )
        return None, ""

    def _all(self) -> list[Path]:
        """Checkpoints, oldest first: names sort as stages and steps do."""
        if not self.root.is_dir():
            return []
        found = (path for path in self.root.iterdir() if path.is_dir())
        return sorted(p for p in found if p.name[0] != "." and not p.name.endswith(_DAMAGED))

    def _begin(self, temporary: Path) -> None:
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            sync(self.root.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _prune(self) -> None:
        passing = [path for path in self._all() if not _ends_stage(path)]
        for path in passing[: -self.keep]:
            gone = path.with_name(_TEMPORARY + path.name)  # at once: no half of it has its name
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _together(self, path: Path, work: Callable[[], None]) -> None:
        """Do something on every process; where one fails, all fail, and nothing is left of it."""
        problem = None
        try:
            work()
        except (OSError, SafetensorError) as error:
            problem = f"process {self.place.rank}: {error}"
        problems = [one for one in from_all(problem) if one]
        if not problems:
            return
        if self.place.rank == 0:
            shutil.rmtree(path.with_name(_TEMPORARY + path.name), ignore_errors=True)
        wait_for_all()
        way_out = "start the same command again once that is mended"
        if self.latest is not None:
            way_out += f"; it goes on from {self.latest.path}, which is whole"
        raise CheckpointFailed(f"{path}: could not be written ({problems[0]}); {way_out}")


def _name(index: int, stage: str, step: int) -> str:
    """A checkpoint's folder: names sort as stages and steps do."""
    return f"{index:02d}-{stage}-{step:09d}"


def inspect(path: Path) -> str | None:
    """What is wrong with a checkpoint: one phrase, or None when every byte is as written."""
    try:
        manifest = read_json(path / "manifest.json")
        if manifest["format_version"] != FORMAT_VERSION:
            return f"manifest.json: format_version={manifest['format_version']} is unknown"
        wanted = {name: FileSeal.from_json(entry) for name, entry in _entries(manifest)}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    seals = Seals(path, wanted, remedy="")
    try:
        seals.check_sizes()  # before anything is read
        seals.check_all()
    except SealBroken as error:
        return str(error).removeprefix(f"{path}{os.sep}").removesuffix("; ")
    return None


def _entries(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Files of a manifest that has all its parts."""
    if type(manifest["ends_stage"]) is not bool or "state.json" not in manifest["files"]:
        raise ValueError
    return list(manifest["files"].items())


def random_state() -> dict[str, Tensor]:
    """State of torch's generators. Nothing of ours draws from them; libraries might."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: dict[str, Tensor]) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _part(kind: str, place: Place) -> str:
    return f"{kind}-{place.rank:05d}-of-{place.world_size:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return _describe(path)


def _describe(path: Path) -> dict[str, Any]:
    """Flush a file; returns its size and checksums."""
    sync(path)
    return FileSeal.of(path).to_json()


def _ends_stage(path: Path) -> bool:
    try:
        return bool(read_json(path / "manifest.json")["ends_stage"])
    except (OSError, ValueError, KeyError):
        return False
