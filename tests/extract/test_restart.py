"""Extractions that are killed, and extractions that meet: what is left is whole or not there."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elastic.extract.export import extract

STUCK = """
import sys, time
from pathlib import Path
from elastic.config import ExtractConfig
from elastic.extract.export import extract
from elastic.storage.reading import StoredTensor

calls = iter(range(1000))
read = StoredTensor.blocks

def blocks(self, *arguments):
    if next(calls) == 9:  # in the middle of the shards
        print("stuck", flush=True)
        time.sleep(600)
    return read(self, *arguments)

StoredTensor.blocks = blocks
checkpoint, output = sys.argv[1:]
extract(ExtractConfig(checkpoint=checkpoint, budget="small", output=output, max_shard_bytes=3000))
"""


@contextmanager
def stuck(checkpoint: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has written half of a member and does not go on."""
    arguments = [sys.executable, "-c", STUCK, str(checkpoint), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert child.stdout is not None
        assert any(line == "stuck\n" for line in child.stdout), "it ended"
        yield child
    finally:
        child.kill()
        child.wait()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_one_writes_the_others_are_refused_and_what_it_leaves_when_killed_goes(
    checkpoint: Any, tmp_path: Path
) -> None:
    """One test for a process that takes seconds to start."""
    output = tmp_path / "new" / "out"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".other.tmp-1").mkdir()  # of another output
    with stuck(checkpoint.path, output) as child:
        half = output.parent / f".out.tmp-{child.pid}"
        before = {path: path.stat().st_size for path in sorted(tmp_path.rglob("*"))}
        assert half / "config.json" in before and not output.exists()
        with pytest.raises(FileExistsError) as caught:
            extract(checkpoint.config(output))
        line = f"{output} is being written by another process; nothing was written"
        assert str(caught.value) == line
        after = {path: path.stat().st_size for path in sorted(tmp_path.rglob("*"))}
        assert after == before and child.poll() is None, "nobody touched what it writes"
        extract(checkpoint.config(tmp_path / "new" / "out2"))
        assert half.is_dir(), "nor did an extraction of another output"
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert half.is_dir() and not output.exists()
    extract(checkpoint.config(output))
    assert names(output.parent) == {"out", "out2", ".other.tmp-1"}
