"""`python extract.py` from a user's seat: exit codes, one line each, and nothing left behind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.paths import ROOT

from elastic.parent import HybridParent


def run(*settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "extract.py"), *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def assert_refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_extracts_and_says_so(checkpoint: Any, tmp_path: Path) -> None:
    """Quietly: four lines on stdout, and no bar or warning where there is no terminal."""
    output = tmp_path / "a" / "small"
    result = run(f"checkpoint={checkpoint.path}", "budget=small", f"output={output}")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    first = [line.split(":")[0].split(" ")[0] for line in lines]
    assert first == ["small", "native", "verified", "written"]
    assert "vLLM" in lines[1]
    assert (output / "model.safetensors").is_file()


SETTINGS = {
    "unknown key": (["buget=small"], ["buget"]),
    "missing": ([], ["budget", "must be set"]),
    "wrong type": (["budget=small", "verify=perhaps"], ["verify", "perhaps"]),
    "bad dtype": (["budget=small", "dtype=int8"], ["dtype=int8", "one of source, float32"]),
    "bad export": (["budget=small", "export=vllm"], ["export=vllm", "one of native, padded, per"]),
    "bad size": (["budget=small", "max_shard_bytes=0"], ["max_shard_bytes=0", "positive"]),
    "unknown budget": (["budget=tiny"], ["budget=tiny", "one of full, medium, small"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings_end_with_one_line(checkpoint: Any, tmp_path: Path, name: str) -> None:
    settings, words = SETTINGS[name]
    output = tmp_path / "new" / "out"
    assert_refused(run(f"checkpoint={checkpoint.path}", f"output={output}", *settings), 2, *words)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_exit_code_1(checkpoint: Any) -> None:
    """Not a wrong setting, and not a traceback either."""
    result = run(f"checkpoint={checkpoint.path}", "budget=small", "output=/proc/nowhere/out")
    assert_refused(result, 1, "/proc/nowhere")


def test_a_result_that_differs_is_exit_code_1(
    write: Callable[..., Any], checkpoint: Any, tmp_path: Path
) -> None:
    """Here because float16 cannot hold the weights."""

    def overflow(parent: HybridParent) -> None:
        parent.backbone.embeddings.weight.data.mul_(1e6)

    members = {"small": checkpoint.member("small")}
    written = write(tmp_path / "e", checkpoint.parent.shape, members, torch.float32, fill=overflow)
    output = tmp_path / "new" / "out"
    result = run(f"checkpoint={written.path}", "budget=small", f"output={output}", "dtype=float16")
    assert_refused(result, 1, "small: logits are not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
