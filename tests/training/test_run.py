"""Whole runs at small size: what is written, what is learnt, and that stopping changes nothing."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import (
    CONF,
    Stop,
    settings,
    small_settings,
    stage,
)
from lightning import LightningModule, Trainer
from safetensors.torch import load_file

import elastic.training.run
import elastic.training.train
from elastic.config import ConfigError, EvaluateConfig, RunConfig
from elastic.evaluate.family import evaluate
from elastic.members.architecture import Architecture
from elastic.members.cost import parameters
from elastic.parent.weights import load_parent
from elastic.storage.manifest import Manifest
from elastic.training.launch import launch
from elastic.training.module import ElasticModule
from elastic.training.run import Run

BUDGETS = ("full", "medium", "small")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run long enough to learn."""
    run_dir = tmp_path_factory.mktemp("runs") / "golden"
    launch(small_settings(run_dir, steps=(400, 240, 40)))
    return run_dir


@pytest.fixture(scope="module")
def family(golden: Path) -> dict:
    """Its figures."""
    config = EvaluateConfig(
        run_dir=str(golden), sequences=32, sequence_length=64, prompts=["def "], new_tokens=8
    )
    return evaluate(config)


def rows(family: dict) -> dict[str, dict]:
    return {row["budget"]: row for row in family["members"]}


def test_training_beats_the_untrained_cut_by_a_wide_margin(family: dict) -> None:
    """The distance to the parent that elastic training closes, for both small members."""
    parent = family["parent"]["loss"]
    for budget in ("medium", "small"):
        row = rows(family)[budget]
        assert row["loss"] - parent < 0.5 * (row["untrained_loss"] - parent), row


def test_full_member_stays_within_two_percent_of_its_parent(family: dict) -> None:
    assert abs(rows(family)["full"]["gap"]) < 0.02


def test_parent_has_learnt_more_than_word_frequencies(family: dict) -> None:
    assert family["parent"]["loss"] < 4.5  # log(384) is 5.95


def test_members_are_exact_and_nested(golden: Path) -> None:
    """Within tolerance of the target, counted; small inside medium inside full."""
    manifest = Manifest.read(golden / "elastic")
    parent = load_parent(golden / "elastic")
    full = parameters(parent.shape, Architecture.full(parent.shape))
    members = [manifest.member(name) for name in BUDGETS]
    for member in members:
        assert abs(member.params / (member.target["params"] * full) - 1) <= 0.02
        assert member.params == parameters(parent.shape, member.architecture)
    for outer, inner in zip(members, members[1:], strict=False):
        assert inner.architecture.is_within(outer.architecture)
    assert manifest.provenance["frozen"] is True


def test_any_member_can_be_cut_with_the_manifest_and_safetensors_alone(golden: Path) -> None:
    """elastic.json describes prefixes: numpy-style slicing by hand gives the member's tensors."""
    directory = golden / "elastic"
    small = json.loads((directory / "elastic.json").read_text())["budgets"]["small"]
    width = small["architecture"]["hidden_size"]
    stored = load_file(directory / "model.safetensors")
    model = elastic.load(directory, "small").state_dict()
    for position, layer in enumerate(small["architecture"]["layers"]):
        if layer["kind"] != "mlp":
            continue
        up = stored[f"backbone.layers.{layer['index']}.mixer.up_proj.weight"]
        found = model[f"model.layers.{position}.mixer.up_proj.weight"]
        assert torch.equal(found, up[: layer["intermediate_size"], :width])
    assert sum(weight.numel() for weight in model.values()) == small["params"]


def test_teacher_is_untouched_by_training(golden: Path) -> None:
    """The parent on disk is what the pretrain stage left; the elastic weights have moved away."""
    trained, elastic_weights = (
        load_file(golden / name / "model.safetensors") for name in ("parent", "elastic")
    )
    assert trained.keys() == elastic_weights.keys()
    sums = {name: float(weight.double().abs().sum()) for name, weight in trained.items()}
    moved = [n for n, w in elastic_weights.items() if float(w.double().abs().sum()) != sums[n]]
    assert len(moved) > len(sums) // 2


def test_a_finished_run_says_so_and_changes_nothing(
    golden: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs neither teacher nor ranking for that, which take minutes at 12B."""

    def times() -> dict[Path, int]:
        kept = [path for path in golden.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in kept if path.name != "config.yaml"}

    before = times()
    monkeypatch.delattr(elastic.training.run, "rank_parent")
    with caplog.at_level("INFO", "elastic"):
        output = launch(small_settings(golden, steps=(400, 240, 40)))
    assert output == golden / "elastic"
    said = f"this run is finished: its elastic checkpoint is in {output}"
    assert [r.getMessage() for r in caplog.records if "run" in r.name] == [said]
    assert times() == before


def test_a_finished_run_writes_an_elastic_checkpoint_that_is_gone(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the last resume checkpoint, the same bytes."""
    copy = tmp_path / "copy"
    shutil.copytree(golden, copy)
    shutil.rmtree(copy / "elastic")
    stored = yaml.safe_load((copy / "config.yaml").read_text()) | {"run_dir": str(copy)}
    (copy / "config.yaml").write_text(yaml.safe_dump(stored))
    with caplog.at_level("INFO", "elastic"):
        launch(small_settings(copy, steps=(400, 240, 40)))
    assert "resuming stage long at step 40 of 40" in caplog.text
    assert "this run is finished" not in caplog.text
    for path in ("model.safetensors", "router.safetensors"):
        assert (copy / "elastic" / path).read_bytes() == (golden / "elastic" / path).read_bytes()


def test_metrics_name_every_term_and_every_budget(golden: Path) -> None:
    with (golden / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    columns = set(table[0])
    expected = {"train/distillation", "train/budget", "train/tokens_per_second"}
    expected |= {f"val/{name}/{term}" for name in BUDGETS for term in ("loss", "kl", "gap")}
    expected |= {"router/temperature", "router/scale", "train/model_lr", "train/router_lr"}
    assert expected <= columns, expected - columns
    steps = [int(row["step"]) for row in table]
    assert steps == sorted(steps) and steps[-1] == 680
    temperatures = [float(r["router/temperature"]) for r in table if r["router/temperature"]]
    assert temperatures == sorted(temperatures, reverse=True)


def test_evaluation_names_the_smallest_and_lets_it_speak(family: dict, golden: Path) -> None:
    assert family["generated"]["budget"] == "small"
    assert family["generated"]["text"][0].startswith("def ")
    assert json.loads((golden / "family.json").read_text()) == family


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    files = ("model.safetensors", "members.safetensors", "router.safetensors")
    return {k: v for name in files for k, v in load_file(run_dir / "elastic" / name).items()}


def brief(run_dir: Path, *overrides: str) -> RunConfig:
    return small_settings(
        run_dir,
        "trainer.checkpoint_every=3",
        "trainer.validate_every=4",
        "trainer.micro_batch_tokens=256",
        "curriculum.stages.short.draws=2",
        "router.freeze_at=0.5",
        *overrides,
        steps=(5, 8, 4),
    )


def stop_at(stops: list[int], run_dir: Path, monkeypatch: pytest.MonkeyPatch, *over: str) -> None:
    """Start the run again and again, each time for so many passes over all stages."""
    for stop in stops:
        stopper = Stop(stop)
        with monkeypatch.context() as patch:
            patch.setattr(elastic.training.train, "Progress", lambda one=stopper: one)
            with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
                launch(brief(run_dir, *over))


def assert_same(resumed: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert resumed.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    launch(brief(run_dir))
    return weights_of(run_dir)


@pytest.mark.parametrize(
    "stops",
    [[4], [10 + 5], [10 + 11, 3], [10 + 16 + 5], [10, 1]],
    ids=["pretrain", "soft", "sliced-then-again", "long", "stage-change"],
)
def test_resuming_equals_never_stopping(
    stops: list[int],
    uninterrupted: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, wherever the run was stopped, in every phase; micro-steps are two per step."""
    run_dir = tmp_path / "run"
    stop_at(stops, run_dir, monkeypatch)
    launch(brief(run_dir))
    assert_same(weights_of(run_dir), uninterrupted)
    with (run_dir / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)


IN_PLACE = ["objective.teacher=in_place", "objective.cross_entropy_weight=0.5"]
SEVERAL = [
    "curriculum.stages.short.budgets_per_batch=3",
    "curriculum.stages.long.budgets_per_batch=2",
    "curriculum.stages.long.budget_probabilities={full:0.5,medium:0.3,small:0.2}",
]


@dataclass
class Shared:
    """A run whose batches are shared between budgets, and how each of its stages ended."""

    overrides: list[str]
    run_dir: Path
    ends: list[tuple[ElasticModule, int]]
    """Module and tokens on the progress bar."""


@pytest.fixture(scope="module", params=[[], IN_PLACE], ids=["replicated", "in_place"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Six passes make a step: two micro-batches, three budgets; then four."""
    run_dir = tmp_path_factory.mktemp("runs") / "shared"
    run = Shared([*SEVERAL, *request.param], run_dir, [])

    class Ends(elastic.training.train.Progress):
        def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
            assert isinstance(module, ElasticModule) and self.bar is not None
            run.ends.append((module, self.bar.n))
            super().on_train_end(trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic.training.train, "Progress", Ends)
        launch(brief(run_dir, *run.overrides))
    return run


def test_text_counts_once_however_many_budgets_share_it(shared: Shared) -> None:
    assert [module.stage.passes for module, _ in shared.ends] == [1, 3, 2]
    for module, counted in shared.ends:
        assert counted == module.stage.tokens
        assert module.micro_step == 2 * module.stage.passes * module.stage.steps


def test_no_frozen_parent_is_kept_where_the_full_budget_teaches(shared: Shared) -> None:
    frozen = [module.teacher is not None for module, _ in shared.ends]
    replicated = IN_PLACE[0] not in shared.overrides
    assert frozen == [False, replicated, replicated]


def test_resuming_equals_never_stopping_with_several_budgets_per_batch(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within a step and a micro-batch, soft and then sliced."""
    stop_at([10 + 22, 28], tmp_path / "run", monkeypatch, *shared.overrides)
    launch(brief(tmp_path / "run", *shared.overrides))
    assert_same(weights_of(tmp_path / "run"), weights_of(shared.run_dir))


def test_the_full_member_is_the_teacher_of_validation_where_it_teaches(shared: Shared) -> None:
    """There is no parent to compare with then, and nothing to compare the full member with."""
    with (shared.run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/full/loss"]]
    assert len(rows) >= 4
    in_place = IN_PLACE[0] in shared.overrides
    assert ("val/full/kl" in rows[0], "val/full/gap" in rows[0]) == (not in_place, not in_place)
    for row in rows:
        assert bool(row["val/parent/loss"]) != in_place
        teacher = float(row["val/full/loss" if in_place else "val/parent/loss"])
        for name in ("medium", "small"):
            gap = float(row[f"val/{name}/loss"]) / teacher - 1
            assert float(row[f"val/{name}/gap"]) == pytest.approx(gap, abs=1e-6)
            assert float(row[f"val/{name}/kl"]) > 0


def test_a_teacher_in_place_needs_the_whole_parent_among_the_budgets(tmp_path: Path) -> None:
    """Targets are compared with the parent's size once that is known."""
    overrides = [*SEVERAL, *IN_PLACE, "budgets.full.params=0.95"]
    with pytest.raises(ConfigError, match="objective.teacher=in_place: must be replicated unless"):
        Run(small_settings(tmp_path / "run", *overrides, steps=(2, 2, 2)))
    assert not (tmp_path / "run").exists()


def test_a_changed_setting_is_refused_when_resuming(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    Run(small_settings(run_dir, steps=(2, 2, 2))).begin()
    with pytest.raises(ConfigError, match=r"seed=1: run_dir=.* was started with 0"):
        Run(small_settings(run_dir, "seed=1", steps=(2, 2, 2)))
    Run(small_settings(run_dir, "trainer.log_every=3", steps=(2, 2, 2)))


def test_resume_false_refuses_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "anything").write_text("precious")
    for override in ("resume=false", "resume=true"):
        with pytest.raises(ConfigError, match="run_dir="):
            Run(small_settings(tmp_path, override, steps=(2, 2, 2)))
    assert [path.name for path in tmp_path.iterdir()] == ["anything"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.hidden=[64,32]", "space.hidden=.*64 is larger than the parent's 48"),
        ("space.mamba_heads=[4,3]", "3 must be a multiple of n_groups=2"),
        ("budgets.small.params=0.05", "budgets.small: no combination .* closest reachable"),
        ("parent.shape.vocab_size=300", "300"),
        ("importance.sequence_length=10000000", "importance.sequence_length=10000000"),
        ("objective.top_k=100000", "objective.top_k=100000: must be at most the parent's vocab"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Run(small_settings(tmp_path / "run", override, steps=(2, 2, 2)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_sequence_longer_than_the_corpus_is_refused(tmp_path: Path) -> None:
    longer = stage("long", 1, length=2**22, batch=2**22)
    with pytest.raises(ConfigError, match="sequence_length=4194304"):
        Run(small_settings(tmp_path / "run", *longer, steps=(2, 2, 2)))
    assert not (tmp_path / "run").exists()


def test_a_tied_head_is_trained_as_one_and_stored_as_two(tmp_path: Path) -> None:
    launch(small_settings(tmp_path / "run", "parent.shape.tied_head=true", steps=(1, 1, 1)))
    for name in ("parent", "elastic"):
        stored = load_file(tmp_path / "run" / name / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], stored["backbone.embeddings.weight"])


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
BUILT = [name for name in EXPERIMENTS if not name.startswith("nano")]
"""Those that train their own parent; the published ones are in test_published.py."""


@pytest.mark.parametrize("experiment", BUILT)
def test_every_experiment_parses_and_takes_a_step(experiment: str, tmp_path: Path) -> None:
    """At reduced size, on one CPU process: one or two steps of every stage."""
    if experiment == "tiny_reasoning":
        text = ["data.sources.short.problems=200", "data.sources.long.problems=100"]
    else:
        path = "data.path='" + str(Path(json.__file__).parent / "*.py") + "'"
        text = ["data=files", "data.tokenizer=train", path, "data.validation_every=2"]
    config = settings(
        tmp_path / "run", "trainer=cpu", "debug=one_step", *text, experiment=experiment
    )
    output = launch(config)
    assert set(Manifest.read(output).budgets) == set(config.budgets)


def test_every_experiment_is_named_after_its_file() -> None:
    for experiment in EXPERIMENTS:
        assert settings(Path("unused"), experiment=experiment).name == experiment
