"""A run goes on from what it was begun with, or not at all: damage between two starts is named, and
mended from what is whole or refused."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import (
    CALIBRATION,
    SMALL_SPACE,
    STDLIB,
    Stop,
    settings,
    small_settings,
    stage,
)
from safetensors.torch import load_file

import elastic.training.train
from elastic.config import CacheTeacherConfig, ConfigError, EvaluateConfig, RunConfig, parse
from elastic.evaluate.family import evaluate
from elastic.parent.sealed import NAME
from elastic.storage.seals import SealBroken, Seals, damage
from elastic.teacher.cache.write import write_cache
from elastic.training.launch import launch

TEXTS = "texts"


def brief(run_dir: Path, *overrides: str) -> RunConfig:
    return small_settings(
        run_dir,
        "trainer.checkpoint_every=3",
        "trainer.validate_every=100",
        "router.freeze_at=0.5",
        "curriculum.stages.short.draws=1",
        *overrides,
        steps=(4, 6, 3),
    )


def stopped(config: RunConfig, after: int) -> None:
    """Start a run that Ctrl-C ends after so many steps."""
    stop = Stop(after)  # one for all stages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic.training.train, "Progress", lambda: stop)
        with pytest.raises(SystemExit):
            launch(config)


def on(texts: Path) -> str:
    return f"data.path='{texts}/*.py'"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of every run here; tests must not change it."""
    directory = tmp_path_factory.mktemp("texts")
    for path in (STDLIB / "email").glob("*.py"):
        shutil.copy2(path, directory)
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A finished run; tests must not change it."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    launch(brief(run_dir, on(texts)))
    return run_dir


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A run that was stopped in its first elastic stage; tests must not change it."""
    run_dir = tmp_path_factory.mktemp("runs") / "half"
    stopped(brief(run_dir, on(texts)), 4 + 4)
    return run_dir


def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def flip(path: Path) -> None:
    """Turn one bit near the end of a file."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def files(directory: Path) -> dict[str, bytes]:
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def assert_ends_alike(run_dir: Path, whole: Path) -> None:
    for name in ("model.safetensors", "router.safetensors"):
        mine, other = (load_file(each / "elastic" / name) for each in (run_dir, whole))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine), name
    for name in ("parent", "data", "importance"):
        assert files(run_dir / name) == files(whole / name), name


def test_all_that_is_read_again_is_sealed(whole: Path) -> None:
    for name in ("parent", "data", "importance", "sorted", "elastic"):
        assert damage(whole / name) is None, name


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent gone": (lambda run: shutil.rmtree(run / "parent"), "the parent is that of .*pretrain"),
    "parent bit": (
        lambda run: flip(run / "parent" / "model.safetensors"),
        r"parent/model.safetensors: block 0 .*differs from what was sealed: the parent is written",
    ),
    "parent half gone": (
        lambda run: (run / "parent" / "model.safetensors").unlink(),
        "parent/model.safetensors: is missing: the parent is written again",
    ),
    "tokens bit": (
        lambda run: flip(*run.glob("data/parts/*/tokens.npy")),
        "tokens.npy: block 0 .*: the tokens are made from the text again",
    ),
    "rows bit": (
        lambda run: flip(sorted(run.glob("data/packs/*/starts.npy"))[0]),
        "data/packs/.*: is packed again .*starts.npy: block 0",
    ),
    "tokens gone": (lambda run: shutil.rmtree(run / "data"), "stage short"),
    "scores bit": (
        lambda run: flip(run / "importance" / "scores.safetensors"),
        "importance/scores.safetensors: block 0 .*: ranking again",
    ),
    "scores gone": (lambda run: shutil.rmtree(run / "importance"), "importance scores written"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_differs_is_named_and_made_again(
    half: Path,
    whole: Path,
    texts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """The run ends bit for bit like one to which nothing has happened."""
    run_dir = copy(half, tmp_path)
    change, said = DAMAGES[kind]
    change(run_dir)
    with caplog.at_level("INFO", "elastic"):
        launch(brief(run_dir, on(texts)))
    lines = [record.getMessage() for record in caplog.records]
    assert any(re.search(said, line) for line in lines), lines
    assert_ends_alike(run_dir, whole)


@pytest.mark.parametrize("kind", ["gone", "bit"])
def test_a_student_is_never_taken_for_the_parent(
    half: Path, texts: Path, tmp_path: Path, kind: str
) -> None:
    """Where the checkpoint of the parent is gone or damaged too."""
    run_dir = copy(half, tmp_path)
    shutil.rmtree(run_dir / "parent")
    (last,) = (run_dir / "checkpoints").glob("00-pretrain-000000004")
    if kind == "gone":
        shutil.rmtree(last)
    else:
        flip(next(last.glob("pieces-*")))
    said = "run/parent: is missing, and the last checkpoint of stage pretrain, .*choose another run"
    with pytest.raises(ConfigError, match=said):
        launch(brief(run_dir, on(texts)))
    assert not (run_dir / "parent").exists()


def test_another_parent_or_ranking_is_refused_whatever_is_beside_it(
    half: Path, whole: Path, texts: Path, tmp_path: Path
) -> None:
    """Seals that fit what they lie beside say nothing of what the student was trained from."""
    other = tmp_path / "other"
    stopped(brief(other, on(texts), "seed=1"), 4 + 4)
    run_dir = copy(half, tmp_path)
    shutil.rmtree(run_dir / "parent")
    shutil.copytree(other / "parent", run_dir / "parent")
    with pytest.raises(ConfigError, match="the parent is not the one that this run has trained"):
        launch(brief(run_dir, on(texts)))


def test_the_text_of_a_half_trained_run_is_what_it_was(
    half: Path, whole: Path, texts: Path, tmp_path: Path
) -> None:
    """Refused with what changed, and with the text restored it ends as if nothing had happened."""
    shutil.copytree(texts, tmp_path / "texts")
    run_dir = tmp_path / "run"
    config = brief(run_dir, on(tmp_path / "texts"))
    stopped(config, 4 + 4)
    before = files(run_dir)
    (tmp_path / "texts" / "zz.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"zz.py has been added, and the run in .*; restore that"):
        launch(config)
    assert files(run_dir) == before
    (tmp_path / "texts" / "zz.py").unlink()
    launch(config)
    for name in ("model.safetensors", "router.safetensors"):
        assert files(run_dir / "elastic")[name] == files(whole / "elastic")[name]


FINISHED: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard": (lambda e: flip(e / "model.safetensors"), "elastic/model.safetensors: block 0"),
    "cut shard": (
        lambda e: (e / "model.safetensors").write_bytes(
            (e / "model.safetensors").read_bytes()[:-9]
        ),
        "elastic/model.safetensors: has .* bytes, .* were sealed",
    ),
    "tokenizer": (lambda e: (e / "tokenizer.json").unlink(), "elastic/tokenizer.json: is missing"),
    "router": (lambda e: flip(e / "router.safetensors"), "elastic/router.safetensors: block 0"),
    "config": (lambda e: flip(e / "config.json"), "elastic/config.json: block 0"),
    "manifest": (lambda e: flip(e / "elastic.json"), "elastic/elastic.json: block 0"),
    "no manifest": (lambda e: (e / "elastic.json").unlink(), "elastic.json: not found"),
    "seals": (lambda e: (e / "seals.json").unlink(), "elastic/seals.json: is missing"),
}


@pytest.mark.parametrize("kind", FINISHED)
def test_a_finished_run_writes_a_damaged_elastic_checkpoint_again(
    whole: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Never "finished" over what cannot be read; the bytes are the same again."""
    run_dir = copy(whole, tmp_path)
    change, said = FINISHED[kind]
    change(run_dir / "elastic")
    config = brief(run_dir, on(texts))
    with caplog.at_level("INFO", "elastic"):
        launch(config)
    assert re.search(f"{said}.*: the elastic checkpoint is written again", caplog.text)
    assert "this run is finished" not in caplog.text
    changing = ("elastic.json", "seals.json")  # the revision of the code, should that change
    for name, content in files(whole / "elastic").items():
        assert name in changing or files(run_dir / "elastic")[name] == content, name
    caplog.clear()
    with caplog.at_level("INFO", "elastic"):
        launch(config)
    assert "this run is finished" in caplog.text


@pytest.fixture
def parent(whole: Path, tmp_path: Path) -> Path:
    """A parent from elsewhere, without seals of its own."""
    directory = Path(shutil.copytree(whole / "parent", tmp_path / "parent"))
    (directory / "seals.json").unlink()
    return directory


def given(run_dir: Path, parent: Path, texts: Path) -> RunConfig:
    """A run of that parent."""
    more = [f"parent.path={parent}", "parent.shape=null", "~curriculum.stages.pretrain"]
    more += ["router.freeze_at=0.5", "data.tokenizer=parent", on(texts), *SMALL_SPACE, *TEXT]
    return settings(run_dir, *more, *CALIBRATION, *stage("short", 4), *stage("long", 2, length=256))


TEXT = [
    "data=files",
    "data.validation_every=5",
    "data.validation_sequences=8",
]
"""Of `small_settings`."""


def test_a_parent_from_elsewhere_is_sealed_at_its_first_reading(
    parent: Path, texts: Path, tmp_path: Path
) -> None:
    """Every file that is read of it, in the run directory; nothing is written beside it."""
    before = files(parent)
    config = given(tmp_path / "run", parent, texts)
    stopped(config, 2)
    seals = Seals.read(parent, tmp_path / "run" / NAME)
    assert seals is not None and {"config.json", "model.safetensors"} <= seals.files.keys()
    assert "tokenizer.json" in seals.files
    assert files(parent) == before
    launch(config)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", r"block 0 .*, seen in tensor|block 0 .*, seen in the header"),
        ("config.json", "block 0 "),
        ("cut", "model.safetensors: has 9,000 bytes"),
        ("gone", "tokenizer_config.json: is missing"),
    ],
)
def test_a_parent_that_has_changed_since_is_refused(
    parent: Path, texts: Path, tmp_path: Path, name: str, said: str
) -> None:
    """Never another teacher for a half-trained student."""
    config = given(tmp_path / "run", parent, texts)
    stopped(config, 2)
    if name == "cut":
        os.truncate(parent / "model.safetensors", 9000)
    elif name == "gone":
        (parent / "tokenizer_config.json").unlink()
    else:
        flip(parent / name)
    way = "; restore the parent as it was when this run began, or choose another run_dir"
    with pytest.raises(SealBroken, match=f"({said}).*{way}"):
        launch(config)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_a_parent_that_differs_from_its_own_seals_is_no_beginning(
    whole: Path, texts: Path, tmp_path: Path, name: str
) -> None:
    parent = Path(shutil.copytree(whole / "parent", tmp_path / "parent"))
    if name == "model.safetensors":
        flip(parent / name)
    else:
        (parent / name).write_text((parent / name).read_text() + " ")
    with pytest.raises(SealBroken, match=f"parent/{name}: (block 0|has .* bytes)"):
        launch(given(tmp_path / "run", parent, texts))
    assert not (tmp_path / "run" / NAME).exists()


@pytest.mark.parametrize("name", ["elastic", "parent", "data", "checkpoints"])
def test_nothing_else_is_written_into_the_folders_of_a_run(
    whole: Path, texts: Path, name: str
) -> None:
    """They are replaced whole, and sealed."""
    before = files(whole)
    evaluation = EvaluateConfig(run_dir=str(whole), output=str(whole / name / "family.json"))
    with pytest.raises(ValueError, match=f"^output=.*: lies in .*/{name}, "):
        evaluate(evaluation)
    more = ["objective.teacher=offline", "objective.top_k=4"]
    more += [f"objective.teacher_cache={whole / name / 'cache'}", on(texts)]
    run = dataclasses.asdict(brief(whole, *more))
    with pytest.raises(ValueError, match=f"^objective.teacher_cache=.*: lies in .*/{name}, "):
        write_cache(parse(run | {"cache": {}}, CacheTeacherConfig))
    assert files(whole) == before


def test_a_run_inside_its_parent_is_refused(parent: Path, texts: Path) -> None:
    with pytest.raises(ValueError, match="^run_dir=.*/parent/run: lies in .*/parent, which it is"):
        launch(given(parent / "run", parent, texts))
    assert not (parent / "run").exists()
