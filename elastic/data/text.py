"""Which text a run reads, so that a change of it is seen, and named, without reading it."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic.config import ConfigError, DataConfig
from elastic.data.corpus import matching_files, stdlib_files, stdlib_root
from elastic.storage.seals import FileSeal


@dataclass(frozen=True)
class TextFile:
    """One file."""

    bytes: int
    changed: int
    """Time of its last change in nanoseconds."""
    checksum: str = ""
    """Of its contents; empty before they are read."""


@dataclass(frozen=True)
class Text:
    """Where the text is from, and its files; a data set of the hub has none here, and stays what it
    was whatever becomes of it there."""

    source: str
    name: str
    files: Mapping[str, TextFile]

    @classmethod
    def of(cls, config: DataConfig, outside: Path) -> "Text":
        """The text of these settings.

        Raises:
            ConfigError: there is none, or the run in `outside` has written some of it.
        """
        if config.source == "hub":
            return cls("hub", f"{config.path} {config.subset} {config.split}", {})
        if config.source == "stdlib":
            root = stdlib_root()
            sizes = {name: (root / name).stat().st_size for name in stdlib_files(root)}
            found = {name: TextFile(size, 0) for name, size in sizes.items()}
            return cls("stdlib", platform.python_version(), found)
        run = outside.resolve()
        found = {}
        for path in matching_files(config):
            if path.resolve().is_relative_to(run):
                raise ConfigError(
                    f"data.path={config.path}: matches {path}, which lies in the run's own "
                    "directory; must match files elsewhere, or choose another run_dir"
                )
            stat = path.stat()
            found[str(path)] = TextFile(stat.st_size, stat.st_mtime_ns)
        return cls("files", str(config.path), found)

    def with_checksums(self) -> "Text":
        """The same with the contents of local files read."""
        if self.source != "files":
            return self
        files = {n: replace(f, checksum=_checksum(n)) for n, f in self.files.items()}
        return replace(self, files=files)

    def to_json(self) -> dict[str, Any]:
        files = {name: [f.bytes, f.changed, f.checksum] for name, f in self.files.items()}
        return {"source": self.source, "name": self.name, "files": files}

    def change(self, before: Any) -> str | None:
        """How this is another text than the one of `before`, what `to_json` gave: one phrase, or
        None. A file with another time of change is read, since it may have been copied back.

        Raises:
            ValueError: `before` is not of that form.
        """
        then = {name: TextFile(*fields) for name, fields in before["files"].items()}
        setting = f"data.source={self.source}" if self.source == "stdlib" else "data.path"
        if before["name"] != self.name:
            return f"{setting}: is {self.name}, was {before['name']}"
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


def _checksum(name: str) -> str:
    return FileSeal.of(Path(name)).digest
