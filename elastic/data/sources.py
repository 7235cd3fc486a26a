"""Where documents come from: this Python's own library, local files, the hub, or a generator.

Text is never executed: data sets that need their own code are refused.
"""

import glob
import os
import platform
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic.config import ConfigError, DataConfig, SourceConfig
from elastic.data.units import KINDS, Unit, kind_of, units
from elastic.storage.seals import FileSeal

PART_BYTES = 64 << 20
"""Of the files that one part is made of: what a process reads at a time, and the least that is
shuffled as one."""

SAMPLE_PARTS, LEAST_PART_BYTES = 16, 1 << 20
"""Parts of the tokens that are asked of a source with more, and the least size of one."""

BYTES_PER_TOKEN = 4
"""Of text, about."""

SKIPPED_DIRECTORIES = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
}  # fmt: skip
"""Not the library's own code, or tests full of deliberately broken text."""


@dataclass(frozen=True)
class TextFile:
    """One file."""

    bytes: int
    changed: int
    """Time of its last change in nanoseconds."""
    checksum: str = ""
    """Of its contents; empty before they are read."""


@dataclass(frozen=True)
class SourceFiles:
    """A source as it is found: where it is from, and its files, in an order that does not depend on
    the file system. Generated text has none."""

    kind: str
    name: str
    """Another name is another text."""
    files: Mapping[str, TextFile]

    def paths(self) -> list[Path]:
        root = stdlib_root() if self.kind == "stdlib" else Path()
        return [root / name for name in self.files]

    def with_checksums(self) -> "SourceFiles":
        """The same with the contents of local files read."""
        if self.kind != "files":
            return self
        files = {n: replace(f, checksum=_checksum(n)) for n, f in self.files.items()}
        return replace(self, files=files)

    def to_json(self) -> dict[str, Any]:
        files = {name: [f.bytes, f.changed, f.checksum] for name, f in self.files.items()}
        return {"kind": self.kind, "name": self.name, "files": files}

    def change(self, setting: str, before: Any) -> str | None:
        """How this is another text than the one of `before`, what `to_json` gave: one phrase, or
        None. A file with another time of change is read, since it may have been copied back.

        Args:
            setting: what names it, for that phrase.

        Raises:
            ValueError: `before` is not of that form.
        """
        then = {name: TextFile(*fields) for name, fields in before["files"].items()}
        if before["name"] != self.name:
            return f"{setting}: is {self.name}, was {before['name']}"
        if self.kind == "hub":
            return None  # a commit is what it is; where its files are kept does not matter
        for name in sorted(then.keys() | self.files.keys()):
            if name not in then:
                return f"{setting}: {name} has been added"
            if name not in self.files:
                return f"{setting}: {name} is gone"
            was, now = then[name], self.files[name]
            if was.bytes != now.bytes:
                return f"{setting}: {name} has {now.bytes:,} bytes, it had {was.bytes:,}"
            if was.changed != now.changed and was.checksum != _checksum(name):
                return f"{setting}: {name} has other contents than it had"
        return None


@dataclass(frozen=True)
class PartTask:
    """What one part is made from."""

    source: str
    config: SourceConfig
    units: tuple[Unit, ...]
    """Parts of files; none for what is generated."""

    @property
    def bytes(self) -> int:
        """To be read."""
        return sum(unit.end - unit.begin for unit in self.units)


def find_sources(config: DataConfig, outside: Path) -> dict[str, SourceFiles]:
    """Every source, looked at but not read.

    Args:
        outside: the run's directory, none of whose files may be its own text.

    Raises:
        ConfigError: a source is missing, or the run has written some of it.
    """
    return {
        name: _find(f"data.sources.{name}", source, outside)
        for name, source in config.sources.items()
    }


def _find(setting: str, source: SourceConfig, outside: Path) -> SourceFiles:
    if source.kind == "arithmetic":
        return SourceFiles("arithmetic", "generated", {})
    if source.kind == "hub":
        from elastic.data.hub import hub_files

        return hub_files(setting, source)
    if source.kind == "stdlib":
        root = stdlib_root()
        names = stdlib_files(root)
        if not names:
            raise ConfigError(
                f"{setting}.kind=stdlib: there are no .py files in {root}; "
                "must be files or hub for this Python"
            )
        sizes = {name: TextFile((root / name).stat().st_size, 0) for name in names}
        return SourceFiles("stdlib", platform.python_version(), sizes)
    found = {}
    run = outside.resolve()
    for path in matching_files(setting, source):
        if path.resolve().is_relative_to(run):
            raise ConfigError(
                f"{setting}.path={source.path}: matches {path}, which lies in the run's own "
                "directory; must match files elsewhere, or choose another run_dir"
            )
        stat = path.stat()
        found[str(path)] = TextFile(stat.st_size, stat.st_mtime_ns)
    return SourceFiles("files", str(source.path), found)


def matching_files(setting: str, source: SourceConfig) -> list[Path]:
    """Files that match the path of a source, absolute and sorted."""
    assert source.path is not None  # the settings have been checked
    found = glob.glob(os.path.expanduser(source.path), recursive=True)
    paths = sorted(Path(path).absolute() for path in found if os.path.isfile(path))
    if not paths:
        raise ConfigError(
            f"{setting}.path={source.path}: no such file; must be a glob of .txt, .jsonl or "
            ".parquet files, for example 'texts/**/*.txt'"
        )
    unknown = sorted({path.suffix for path in paths if not _known(path)})
    if unknown:
        raise ConfigError(
            f"{setting}.path={source.path}: matches "
            f"{', '.join(s or 'suffixless' for s in unknown)} files; must match "
            f"{', '.join(KINDS)} files alone"
        )
    return paths


def _known(path: Path) -> bool:
    try:
        kind_of(path)
    except ConfigError:
        return False
    return True


def tasks_of(name: str, config: SourceConfig, found: SourceFiles) -> list[PartTask]:
    """The parts of a source, in order: consecutive pieces of its files, about as large as
    `PART_BYTES`; smaller, where of them only `target_tokens` are taken."""
    if config.kind == "arithmetic":
        return [PartTask(name, config, ())]
    least = PART_BYTES
    if config.target_tokens is not None:
        sampled = config.target_tokens * BYTES_PER_TOKEN // SAMPLE_PARTS
        least = min(PART_BYTES, max(LEAST_PART_BYTES, sampled))
    tasks: list[PartTask] = []
    waiting: list[Unit] = []
    size = 0
    for path in found.paths():
        for unit in units(path, least):
            waiting.append(unit)
            size += unit.end - unit.begin
            if size >= least:
                tasks.append(PartTask(name, config, tuple(waiting)))
                waiting, size = [], 0
    if waiting:
        tasks.append(PartTask(name, config, tuple(waiting)))
    return tasks


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(root: Path) -> list[str]:
    """Relative paths of the Python files under `root`, sorted; tests and packages are left out, and
    so are the few files that declare another encoding than UTF-8."""
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in SKIPPED_DIRECTORIES]
        relative = Path(directory).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def _checksum(name: str) -> str:
    return FileSeal.of(Path(name)).digest
