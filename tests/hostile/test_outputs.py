"""Outputs that cannot be written, Ctrl-C in the middle of a cut, prompts and tokens that are none:
one line, the documented exit code, and nothing left behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.forked import Forked
from helpers.paths import ROOT
from helpers.runs import SMALL_RUN, settings
from helpers.waiting import LIMIT

from elastic.data import open_prepared
from elastic.storage.seals import Seals


def error_of(said: str) -> str:
    """The one line of an error."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said[-3000:]
    return lines[0]


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A regular file where a directory would have to be: no user can write below it, root neither,
    whom permissions do not stop."""
    file = tmp_path / "file"
    file.write_text("here first")
    return file


@pytest.mark.parametrize("below", ["out", "deep/er/out"])
def test_a_member_cannot_be_written_below_a_file(
    below: str, forked: Forked, finished: Path, blocked: Path
) -> None:
    """A path that cannot work, known before the checkpoint is read."""
    words = [f"checkpoint='{finished / 'elastic'}'", "budget=small", f"output='{blocked / below}'"]
    code, said = forked.run(["elastic", "extract", *words], {})
    line = error_of(said)
    assert code == 2 and "output=" in line and f"{blocked} is no directory" in line, said
    assert blocked.read_text() == "here first"
    assert [path.name for path in blocked.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("below", ["", "run", "deep/er/run"])
def test_a_run_cannot_be_written_below_a_file(below: str, forked: Forked, blocked: Path) -> None:
    """Known before the text is read and tokenised."""
    words = [*SMALL_RUN, f"run_dir='{blocked / below}'"]
    code, said = forked.run(["elastic", "train", *words], {})
    line = error_of(said)
    assert code == 2 and "run_dir" in line and str(blocked) in line, said
    assert blocked.read_text() == "here first"
    assert [path.name for path in blocked.parent.iterdir()] == ["file"]


INTERRUPTED = """
import os, signal, sys
from elastic.storage.progress import Progress

count = Progress.__call__

def stopped(self, size):
    count(self, size)
    if self.what == {label!r}:
        print(*os.listdir({place!r}), sep="\\n", flush=True)
        os.kill(os.getpid(), signal.SIGINT)

Progress.__call__ = stopped
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["elastic", "extract", *{words!r}]
from elastic.cli.main import main
main()
"""


@pytest.mark.parametrize("label", ["writing", "verifying"])
def test_ctrl_c_in_a_cut_leaves_nothing(label: str, finished: Path, tmp_path: Path) -> None:
    """While shards are written and while they are read back: 130, one line, no directory."""
    place = tmp_path / "new"
    place.mkdir()
    words = [f"checkpoint='{finished / 'elastic'}'", "budget=small", f"output='{place / 'out'}'"]
    program = INTERRUPTED.format(label=label, place=str(place), words=words)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 130, done.stderr[-3000:]
    assert done.stderr.strip() == "interrupted"
    assert any(line.startswith(".out.tmp-") for line in done.stdout.splitlines()), done.stdout
    assert not list(place.iterdir())


@pytest.mark.parametrize("prompts", ['["a",""]', '[""]'])
def test_an_empty_prompt_is_named_before_anything_is_measured(
    prompts: str, forked: Forked, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "family.json"
    words = [f"run_dir='{finished}'", f"prompts={prompts}", f"output='{output}'"]
    code, said = forked.run(["elastic", "evaluate", *words], {})
    line = error_of(said)
    assert code == 2 and "prompts=" in line and "at least a character" in line, said
    assert not output.exists()


@pytest.mark.parametrize(
    ("command", "split", "calibration"),
    [("evaluate", "report", True), ("train", "train", True), ("train", "train", False)],
    ids=["evaluate", "calibration", "training"],
)
def test_tokens_outside_the_vocabulary_are_named(
    command: str, split: str, calibration: bool, forked: Forked, finished: Path, tmp_path: Path
) -> None:
    """Sealed as they are, as another program may have made them: directory, token and vocabulary. A
    run looks at its calibration text at once, at all else when it comes to it."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    data = open_prepared(settings(run_dir, *SMALL_RUN).data, run_dir)
    (store,) = data.stores.values()
    (name,) = data.stores
    wrong = set(data.documents(name, split).tolist())
    if not calibration:
        rows, keys = data.calibration(64, 16)
        wrong -= {document for key in keys for document in rows.documents(key).tolist()}
    numbers = np.array(sorted(wrong))
    (part,) = store.directories
    tokens = np.load(part / "tokens.npy").copy()
    for start, size in zip(*(each.tolist() for each in store.places(numbers)), strict=True):
        tokens[start : start + size] = 20_000
    np.save(part / "tokens.npy", tokens)
    Seals.of(part).write()
    words = [f"run_dir='{run_dir}'"]
    if command == "train":  # from its beginning, with the tokens that it finds
        for made in ("checkpoints", "elastic", "parent", "sorted", "importance"):
            shutil.rmtree(run_dir / made, ignore_errors=True)
        words = [*SMALL_RUN, *words]
    else:
        words += ["sequences=2", "sequence_length=32", f"output='{tmp_path / 'family.json'}'"]
    code, said = forked.run(["elastic", command, *words], {})
    line = error_of(said)
    assert code == 2, said
    assert f"{part.parent}: has token 20000, the parent's vocabulary is " in line
    assert not (tmp_path / "family.json").exists()
