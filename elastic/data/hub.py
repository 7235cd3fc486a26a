"""Data sets of the hub as local files: which files a split has is asked of the hub, then they are
downloaded; rows are read as those of any other file, so that no column's type gets in the way."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets

from elastic.config import ConfigError, SourceConfig
from elastic.data.sources import SourceFiles, TextFile
from elastic.data.tokenizer import reason

log = logging.getLogger(__name__)


def hub_files(setting: str, source: SourceConfig) -> SourceFiles:
    """The files of a data set's split, downloaded, by the commit that they are of.

    Raises:
        ConfigError: the hub cannot be reached, or there is no such data set, configuration or
            split, or it needs its own code.
    """
    where = f"{setting}.path={source.path} (subset={source.subset}, split={source.split})"
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder: Any = datasets.load_dataset_builder(
            str(source.path),
            source.subset,
            revision=source.revision,
            **({} if source.files is None else {"data_files": {source.split: source.files}}),
        )
        splits = builder.config.data_files or {}
        if source.split not in splits:
            raise ConfigError(
                f"{where}: there is no such split; must be one of {', '.join(map(str, splits))}"
            )
        names = list(map(str, splits[source.split]))
        manager = datasets.DownloadManager(dataset_name=str(source.path))
        paths = [Path(path) for path in manager.download(names)]
        linked = [_with_suffix(path, name) for name, path in zip(names, paths, strict=True)]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where}: cannot load this data set: {reason(error)}; must be a data set that can be "
            "reached from here, or use data=files with local files"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    commit = str(builder.hash or source.revision)
    found = {str(path): TextFile(path.stat().st_size, 0) for path in linked}
    log.info("%s: %d files, commit %s", source.path, len(found), commit)
    known = f"{source.path} {source.subset} {source.split} {commit}"
    return SourceFiles("hub", known, found)


def _with_suffix(path: Path, name: str) -> Path:
    """A downloaded file under a name that says how it is read; the cache names files by hashes."""
    suffixes = "".join(Path(name).suffixes[-2:])
    if path.name.endswith(suffixes):
        return path
    link = path.with_name(f"{path.name}{suffixes}")
    with suppress(FileExistsError):  # another process may be as far as we are
        link.symlink_to(path.name)
    return link
