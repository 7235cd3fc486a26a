"""metrics.csv is whole at any moment and outlives processes; Weights & Biases works offline."""

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.paths import TESTS
from helpers.runs import settings
from lightning.pytorch.loggers import WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from elastic.training import loggers
from elastic.training.loggers import MetricsFile, build_loggers

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def written(path: Path, steps: range) -> MetricsFile:
    """A file with one row per step, of one metric in the first stage."""
    logger = MetricsFile(path)
    for step in steps:
        logger.log_metrics({"loss": step / 10, "stage": 0}, step)
    return logger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.csv"


# metrics.csv


def test_a_row_is_on_disk_as_soon_as_it_is_logged(path: Path) -> None:
    logger = MetricsFile(path)
    for step in range(3):
        logger.log_metrics({"loss": 0.5 * step, "lr": 1e-3}, step)
        assert read(path)[-1] == {"step": str(step), "loss": str(0.5 * step), "lr": "0.001"}
    assert len(read(path)) == 3


def test_numbers_come_back_exactly(path: Path) -> None:
    values = [1 / 3, 1e-300, 12_310_001_152.0, float("nan"), float("inf")]
    logger = MetricsFile(path)
    for step, value in enumerate(values):
        logger.log_metrics({"x": value}, step)
    assert [repr(float(row["x"])) for row in read(path)] == [repr(value) for value in values]


def test_new_metrics_become_columns_and_old_rows_stay_empty_there(path: Path) -> None:
    """Validation comes later and more rarely than training."""
    logger = written(path, range(2))
    logger.log_metrics({"validation/small": 2.0, "validation/full": 1.0}, 2)
    logger.log_metrics({"loss": 0.3, "stage": 0}, 3)
    header, *lines = path.read_text().splitlines()
    assert header == "step,loss,stage,validation/full,validation/small"
    assert lines == ["0,0.0,0.0,,", "1,0.1,0.0,,", "2,,,1.0,2.0", "3,0.3,0.0,,"]


def test_rows_outlive_the_logger(path: Path) -> None:
    written(path, range(3))
    again = written(path, range(3, 5))
    again.log_metrics({"other": 1.0}, 5)
    assert [row["step"] for row in read(path)] == list("012345")
    assert [row["loss"] for row in read(path)[:5]] == ["0.0", "0.1", "0.2", "0.3", "0.4"]


def test_rows_outlive_the_process(path: Path) -> None:
    """Lightning's own CSV logger would delete them."""
    code = (
        "import sys; from pathlib import Path; from elastic.training.loggers import MetricsFile\n"
        "MetricsFile(Path(sys.argv[1])).log_metrics({'loss': 0.25, 'stage': 0}, 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=quiet())
    written(path, range(1, 2))
    assert [(row["step"], row["loss"]) for row in read(path)] == [("0", "0.25"), ("1", "0.1")]


def test_looking_at_a_file_does_not_change_it(path: Path) -> None:
    written(path, range(3))
    before = path.read_bytes()
    assert MetricsFile(path).columns == ["step", "loss", "stage"]
    assert path.read_bytes() == before


def test_resuming_forgets_what_will_be_written_again(path: Path) -> None:
    written(path, range(5)).log_metrics({"late": 1.0, "stage": 0}, 5)
    resumed = MetricsFile(path)
    resumed.forget_after(0, 2)
    assert [row["step"] for row in read(path)] == ["0", "1", "2"]
    for step in (3, 4):
        resumed.log_metrics({"loss": step / 10, "stage": 0}, step)
    resumed.log_metrics({"late": 1.0, "stage": 0}, 5)
    never_stopped = path.parent / "never_stopped.csv"
    written(never_stopped, range(5)).log_metrics({"late": 1.0, "stage": 0}, 5)
    assert path.read_text() == never_stopped.read_text()


@pytest.mark.parametrize(("step", "left"), [(-1, 0), (0, 1), (4, 5), (99, 5)])
def test_the_step_resumed_from_is_kept(path: Path, step: int, left: int) -> None:
    logger = written(path, range(5))
    logger.forget_after(0, step)
    assert len(read(path)) == len(logger.rows) == left
    logger.log_metrics({"loss": 1.0}, 100)
    assert len(read(path)) == left + 1


def test_what_a_stage_wrote_at_its_beginning_is_not_the_end_of_the_one_before(path: Path) -> None:
    """Both have the same step; a run that goes on from the end of a stage measures it again."""
    logger = written(path, range(3))
    end = path.read_text()
    logger.log_metrics({"loss": 1.0, "stage": 1}, 2)
    logger.log_metrics({"loss": 0.5, "stage": 1}, 3)
    whole = path.read_text()
    MetricsFile(path).forget_after(1, 3)
    assert path.read_text() == whole
    MetricsFile(path).forget_after(0, 2)
    assert path.read_text() == end


@pytest.mark.parametrize("cut", ["15,0.5,0.", "15,0.", "15", "1", "1,0.25,0.0", ""])
def test_a_last_line_cut_off_by_a_kill_is_forgotten_on_resume(path: Path, cut: str) -> None:
    """Even where what is left of it reads like the row of an earlier step."""
    written(path, range(5))
    whole = path.read_bytes()
    path.write_bytes(whole + cut.encode())
    resumed = MetricsFile(path)
    resumed.forget_after(0, 4)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("action", ["a new column", "forgetting"])
def test_a_crash_while_rewriting_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    logger = written(path, range(3))
    before = path.read_bytes()

    def half(self: csv.DictWriter, rows: Rows) -> None:
        self.writerow({"step": 0})
        raise OSError("disk full")

    monkeypatch.setattr(csv.DictWriter, "writerows", half)
    with pytest.raises(OSError, match="disk full"):
        if action == "forgetting":
            logger.forget_after(0, 1)
        else:
            logger.log_metrics({"other": 1.0}, 3)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("action", ["a row", "a new column"])
def test_a_full_disk_is_one_line_that_names_the_file(
    action: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real: /dev/full takes nothing."""
    logger = written(path, range(2))
    if action == "a row":
        logger.path = path.with_name("full")
        logger.path.symlink_to("/dev/full")
        monkeypatch.setattr(Path, "is_file", Path.exists)
    else:
        monkeypatch.setattr(loggers, "atomic_file", lambda target: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left on device") as full:
        logger.log_metrics({"other" if action == "a new column" else "loss": 1.0, "stage": 0}, 3)
    assert str(logger.path) in str(full.value) and "\n" not in str(full.value)


def test_the_configuration_is_not_written_here(path: Path) -> None:
    MetricsFile(path).log_hyperparams({"seed": 0})
    assert not path.exists()


# Weights & Biases


def test_only_metrics_csv_unless_asked(tmp_path: Path) -> None:
    (logger,) = build_loggers(settings(tmp_path), tmp_path)
    assert isinstance(logger, MetricsFile) and logger.path == tmp_path / "metrics.csv"


def quiet() -> dict[str, str]:
    """An environment in which nothing goes over the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return kept | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import wandb
from helpers.paths import TESTS
from helpers.runs import settings
from elastic.training.loggers import build_loggers

run_dir = Path(sys.argv[1])
loggers = build_loggers(settings(run_dir, *sys.argv[3:]), run_dir)
for step in (1, 2):
    for logger in loggers:
        logger.log_metrics({"short/loss": step / 2}, step)
for logger in loggers:
    logger.finalize("success")
wandb.finish()
"""


def records(path: Path) -> Iterator[Record]:
    """What an offline run holds: protobuf records in a LevelDB log after a header of 7 bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if position % 32_768 > 32_768 - 7:  # no record starts in the last bytes of a block
            position += 32_768 - position % 32_768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline_keeps_settings_and_metrics_in_the_run_directory(tmp_path: Path) -> None:
    """For real, in a process of its own."""
    run_dir = tmp_path / "runs" / "tried"
    run_dir.mkdir(parents=True)
    asked = ["logger=wandb", "logger.project=families", "logger.group=tests", "name=tried"]
    command = [sys.executable, "-c", RUN, str(run_dir), str(TESTS), *asked]
    subprocess.run(command, check=True, env=quiet(), cwd=tmp_path, capture_output=True)
    assert [row["short/loss"] for row in read(run_dir / "metrics.csv")] == ["0.5", "1.0"]
    (store,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    config: dict[str, object] = {}
    history, runs = [], []
    for record in records(store):
        if record.HasField("run"):
            runs.append(record.run)
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            history.append({i.key or "/".join(i.nested_key): i for i in record.history.item})
    (run,) = runs
    assert (run.display_name, run.project, run.run_group) == ("tried", "families", "tests")
    assert run.run_id == str(run_dir).strip("/").replace("/", "-")[-120:]
    expected = asdict(settings(run_dir, *asked))
    assert {name: config[name] for name in expected} == json.loads(json.dumps(expected))
    losses = [json.loads(row["short/loss"].value_json) for row in history]
    steps = [json.loads(row["trainer/global_step"].value_json) for row in history]
    assert (losses, steps) == ([0.5, 1], [1, 2])


def test_a_run_started_again_has_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that W&B resumes it; another directory is another run. Nothing is started here."""
    made: list[dict] = []
    monkeypatch.setattr(WandbLogger, "__init__", lambda self, **fields: made.append(fields))
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda self, params: None)
    for name in ("one", "one", "two"):
        run_dir = tmp_path / name
        build_loggers(settings(run_dir, "logger=wandb"), run_dir)
    ids = [fields["id"] for fields in made]
    assert ids[0] == ids[1] != ids[2]
    for fields in made:
        assert fields["resume"] == "allow" and len(fields["id"]) <= 120
        assert not set(fields["id"]) & set("/\\#?%:"), "characters that W&B refuses"
