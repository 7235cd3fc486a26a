"""Law 10, a small case: the family that a run freezes, against every nested one, trained alike."""

import json
import re
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT
from helpers.runs import CALIBRATION, SMALL_PARENT, stage

SETTINGS = [
    *SMALL_PARENT,
    *CALIBRATION,
    "importance.depth_sequence_length=64",
    "space.hidden=[48,44,40,36,32]",
    "space.ffn=[128,96,64]",
    "space.mamba_heads=[4,2]",
    "space.depth=[7,6]",
    "space.tolerance=0.02",
    *stage("pretrain", 60, lr=5e-3),
    *stage("short", 40, lr=2e-3),
    *stage("long", 4, length=256, lr=1e-3),
    *(f"curriculum.stages.{name}.budgets_per_batch=1" for name in ("short", "long")),
    "data.tokenizer=train",
]


def test_the_frozen_family_is_as_good_as_the_best_of_four(tmp_path: Path) -> None:
    places = [f"{name}='{tmp_path / name}'" for name in ("dir", "results", "output")]
    quoted = ",".join(json.dumps(setting) for setting in SETTINGS)
    command = [
        sys.executable, "-m", "elastic.study", "study=brute", f"study.settings=[{quoted}]",
        "study.share=1.0", "study.families=4", "study.seeds=[0]", "study.sequences=64",
        "study.sequence_length=64", "threads=1", "jobs=2", *places,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()]
    tried = [record for record in records if record["arm"].startswith("family_")]
    assert 2 <= len(tried) <= 5, "four, and the frozen one if it is not among them"
    assert len({json.dumps(record["members"]["small"]["kl"]) for record in tried}) > 1
    said = re.search(r"the decision is (good|not good): ([0-9.]+) times", ended.stdout)
    assert said is not None and said[1] == "good", ended.stdout
    table = (tmp_path / "output" / "brute.md").read_text()
    assert table.count(" | ") == len(tried) and "frozen by" in table
