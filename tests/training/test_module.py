"""Training steps beside plain passes: gradients by hand, one teacher pass, draws ranks share."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.goals import in_params
from helpers.strategies import random_parent, tiny_shape
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

import elastic.training.module
from elastic.config import (
    ObjectiveConfig,
    OptimConfig,
    RouterConfig,
    SpaceConfig,
    StageConfig,
    TrainerConfig,
)
from elastic.data import Batch, one_document
from elastic.losses import Head, distillation_dense
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.routing.curriculum import draw_seed, plan, step_passes
from elastic.routing.family import Family
from elastic.routing.router import Router, RouterOptimizer
from elastic.teacher import OnlineTeacher
from elastic.training.callbacks import BudgetValidation
from elastic.training.module import ElasticModule, TrainingDiverged

SHAPE = tiny_shape(pattern="M-*M-", hidden_size=16, intermediate_size=32)
FULL = parameters(SHAPE, Architecture.full(SHAPE))
COUNTS = {"a": FULL, "b": round(0.85 * FULL), "c": round(0.7 * FULL), "d": round(0.5 * FULL)}
TARGETS = in_params(SHAPE, COUNTS)
SHARES = {"a": 0.4, "b": 0.3, "c": 0.1, "d": 0.2}
SEED, LENGTH, SEQUENCES, MICRO_BATCHES = 3, 6, 2, 2


def batches(rank: int = 0, split: int = 1) -> list[Batch]:
    """The micro-batches of one optimizer step; `split` of them make a draw. They have different
    numbers of targets, and weigh by them."""
    generator = torch.Generator().manual_seed(rank)
    count = MICRO_BATCHES * split
    size = (count, SEQUENCES // split, LENGTH + 1)
    tokens = torch.randint(SHAPE.vocab_size, size, generator=generator)
    plain = [one_document(each) for each in tokens]
    counted = [
        torch.arange(each.target_count)[number % 2 :: 2] for number, each in enumerate(plain)
    ]
    counted[0] = counted[0][:-1]
    share = count / sum(map(len, counted))
    return [
        replace(each, counted=places, share=len(places) * share)
        for each, places in zip(plain, counted, strict=True)
    ]


def module_of(frozen: bool, teacher: str, passes: int, split: int = 1) -> ElasticModule:
    """A stage of four budgets on a random parent, before or after the freeze."""
    space_config = SpaceConfig(
        hidden=list(range(16, 7, -1)), ffn=[32, 28, 24, 20, 16], mamba_heads=[6, 4, 2],
        heterogeneous=[], tolerance=0.02,
    )  # fmt: skip
    space = Space.build(space_config, SHAPE)
    config = RouterConfig(hard_probability=0.5, full_bias=0.5, freeze_at=0.9)
    router = Router(space, len(TARGETS) - 1, config, torch.Generator().manual_seed(0))
    settings = ObjectiveConfig(teacher=teacher, cross_entropy_weight=0.7)
    family = Family(space, (), TARGETS, router, config, space_config, settings)
    if frozen:
        family.freeze_if_due(1.0)
    batch_tokens = MICRO_BATCHES * SEQUENCES * LENGTH
    stage = StageConfig(
        tokens=3 * batch_tokens, sequence_length=LENGTH, batch_tokens=batch_tokens,
        model_lr=1e-3, budgets_per_batch=passes, budget_probabilities=SHARES,
        draws=MICRO_BATCHES,
    )  # fmt: skip
    trainer = TrainerConfig(micro_batch_tokens=SEQUENCES // split * LENGTH)
    (planned,) = plan({"only": stage}, trainer)
    other = OnlineTeacher(random_parent(SHAPE, seed=1), "32-true")
    return ElasticModule(
        random_parent(SHAPE), family, other if teacher == "replicated" else None,
        RouterOptimizer(router, OptimConfig()), planned, SHARES, settings, OptimConfig(), SEED,
    )  # fmt: skip


def weights_of(module: ElasticModule) -> dict[str, Tensor]:
    """Everything that learns, by name."""
    assert module.router is not None
    routers = {f"router.{name}": weight for name, weight in module.router.named_parameters()}
    return {**dict(module.named_parameters()), **routers}


class Text(IterableDataset[Batch]):
    """Every micro-batch once for each pass, over and over."""

    def __init__(self, rows: list[Batch], passes: int) -> None:
        self.rows, self.passes = rows, passes

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for row in self.rows:
                yield from [row] * self.passes


class Record(Callback):
    """Gradients as they reach the first optimizer step; what every pass said, and what it kept."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.outputs: list[dict[str, Any]] = []
        self.kept: list[Head | None] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any
    ) -> None:
        assert isinstance(module, ElasticModule)
        self.outputs.append(outputs)
        self.kept.append(module._kept)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any
    ) -> None:
        if not self.gradients:
            self.gradients = {
                name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
                for name, weight in weights_of(module).items()
            }


def train(module: ElasticModule, rows: list[Batch], steps: int = 1, *callbacks: Callback) -> Record:
    """Some optimizer steps by Lightning."""
    record = Record()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=module.stage.accumulation,
        callbacks=[record, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(Text(rows, module.stage.passes), batch_size=None))
    return record


def shares_of(module: ElasticModule, number: int) -> dict[str, float]:
    """Share of every budget in the gradient of a draw, largest budget first."""
    passes = step_passes(module.stage, SHARES, SEED, 0)[number]
    return {each.budget: each.weight / len(passes) for each in passes}


def by_hand(module: ElasticModule, rows: list[Batch]) -> dict[str, Tensor]:
    """Gradient of the weighted sum of separate passes, on whole logits."""
    objective, family = module.objective, module.family
    assert family is not None
    total = torch.zeros(())
    for micro_batch, row in enumerate(rows):
        tokens, text = row.inputs, row.targets[row.counted]
        teacher = None
        if isinstance(module.teacher, OnlineTeacher):
            teacher = module.teacher.model.logits(tokens).flatten(0, 1)[row.counted]
        number = micro_batch * MICRO_BATCHES // len(rows)
        for turn, (budget, share) in enumerate(shares_of(module, number).items()):
            where = (0, 0, number, turn, 0)
            draw = family.draw(budget, 0.0, draw_seed(SEED, "router", *where))
            logits = module.parent.logits(tokens, draw.member).flatten(0, 1)[row.counted]
            loss = objective.cross_entropy_weight * F.cross_entropy(logits, text)
            if teacher is not None:
                distance = distillation_dense(logits, teacher.detach(), "forward_kl", 1.0)
                loss = loss + objective.distillation_weight * distance
            else:
                teacher = logits
            total = total + share / len(rows) * (row.share * loss + draw.terms.get("total", 0.0))
    weights = {n: w for n, w in weights_of(module).items() if w.requires_grad}
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), found, strict=True)
    }


MODES = [
    (1, "replicated"),
    (2, "replicated"),
    (4, "replicated"),
    (4, "in_place"),
]


@pytest.mark.parametrize("split", [1, 2], ids=["", "micro-batches"])
@pytest.mark.parametrize("frozen", [False, True], ids=["soft", "sliced"])
@pytest.mark.parametrize(("passes", "teacher"), MODES)
def test_a_step_has_the_gradient_of_separate_passes(
    passes: int, teacher: str, frozen: bool, split: int
) -> None:
    """The micro-batches of a draw have its budget and its noise."""
    module, rows = module_of(frozen, teacher, passes, split), batches(split=split)
    expected = by_hand(module, rows)
    found = train(module, rows).gradients
    assert expected.keys() <= found.keys()
    assert any(name.startswith("router") for name in expected) != frozen
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_frozen_parent_sees_every_micro_batch_once(passes: int) -> None:
    module, calls = module_of(True, "replicated", passes), []
    assert isinstance(module.teacher, OnlineTeacher)
    module.teacher.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    record = train(module, batches(), steps=3)
    assert calls == [False] * (3 * MICRO_BATCHES)
    assert len(record.outputs) == len(calls) * module.stage.passes


@pytest.mark.parametrize(("passes", "teacher"), MODES)
def test_what_the_teacher_said_is_kept_without_its_graph_until_the_last_pass(
    passes: int, teacher: str
) -> None:
    module = module_of(False, teacher, passes)
    for pass_, head in enumerate(train(module, batches(), steps=2).kept):
        last = pass_ % module.stage.passes == module.stage.passes - 1
        assert (head is None) == last
        assert head is None or not any(part.requires_grad for part in head)


def test_the_full_budget_learns_from_the_text_where_it_teaches() -> None:
    """Its own terms name no distillation; those of all others do."""
    for each in train(module_of(False, "in_place", 4), batches()).outputs:
        assert "cross_entropy" in each["terms"]
        assert ("distillation" in each["terms"]) == (each["budget"] != "a")


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_ranks_agree_on_budgets_weights_and_sizes(passes: int) -> None:
    """Law 8, over three steps of different text; and the largest budget comes first."""
    one, two = (
        train(module_of(False, "replicated", passes), batches(rank), steps=3).outputs
        for rank in (0, 1)
    )
    assert len(one) == len(two)
    for mine, other in zip(one, two, strict=True):
        assert (mine["budget"], mine["weight"]) == (other["budget"], other["weight"])
        assert mine["figures"].keys() == other["figures"].keys()
    for mine, other in zip(
        one[: len(one) // 3], two, strict=False
    ):  # the first step: the same router still
        assert mine["figures"].get("expected_params") == other["figures"].get("expected_params")
    for start in range(0, len(one), passes):
        budgets = [each["budget"] for each in one[start : start + passes]]
        assert budgets == sorted(budgets) and len(set(budgets)) == passes


# Steps that are not finite


def test_too_many_bad_steps_in_a_row_stop_the_run_and_have_changed_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Good steps between bad ones start the count anew."""
    module = module_of(False, "replicated", 1)
    module.max_bad_steps = 3
    terms, bad = elastic.training.module.token_terms, {2, 3, 5, 6, 7}
    seen: list[dict[str, Tensor]] = []

    def spoil(*arguments: Any) -> dict[str, Tensor]:
        if module.between_steps:
            seen.append(
                {name: weight.detach().clone() for name, weight in weights_of(module).items()}
            )
        found = terms(*arguments)
        return found | {"total": found["total"] * math.nan} if module.step in bad else found

    monkeypatch.setattr(elastic.training.module, "token_terms", spoil)
    with pytest.raises(TrainingDiverged, match=r"step 8 was number 3 in a row .*max_bad_steps"):
        train(module, batches(), steps=20)
    assert (module.bad_steps, module.skipped_steps) == (3, 5)
    seen.append(weights_of(module))
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert bool(moved) == (step not in bad), (step, moved[:1])


def test_a_stage_in_which_nothing_could_be_trained_is_not_a_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it has fewer steps than `max_bad_steps`; one good step is enough."""
    terms, bad = elastic.training.module.token_terms, {0, 1}
    module = module_of(False, "replicated", 1)
    assert module.stage.steps == 3 < module.max_bad_steps

    def spoil(*arguments: Any) -> dict[str, Tensor]:
        found = terms(*arguments)
        return found | {"total": found["total"] * math.nan} if module.step in bad else found

    monkeypatch.setattr(elastic.training.module, "token_terms", spoil)
    train(module, batches(), steps=3)
    bad.add(2)
    module = module_of(False, "replicated", 1)
    with pytest.raises(TrainingDiverged, match="not finite in any of its 3 steps, and nothing was"):
        train(module, batches(), steps=3)


@pytest.mark.parametrize("lost", ["weight", "teacher"])
def test_a_validation_that_is_not_finite_stops_the_run(lost: str) -> None:
    """And names the tensor, if it is one's fault that trains; what was measured before is kept."""
    module = module_of(False, "replicated", 1)
    rows = []

    class Spoil(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rows.append(module.step)
            assert isinstance(module.teacher, OnlineTeacher)
            parent = module.parent if lost == "weight" else module.teacher.model
            if module.step == 2:
                parent.backbone.layers[1].mixer.down_proj.weight.data[1, 2] = math.nan

    text: Any = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    where = {
        "weight": r"loss of a, .*tensor backbone\.layers\.1\.mixer\.down_proj\.weight holds NaN",
        "teacher": r"loss of parent, KL of a, .*no weight of this process is",
    }
    line = rf"^curriculum\.stages\.only: step 2: validation {where[lost]}"
    with pytest.raises(TrainingDiverged, match=line) as caught:
        train(module, batches(), 3, Spoil(), BudgetValidation(text, every=1))
    assert max(rows) == 2 and "\n" not in str(caught.value)


# What the host waits for


class Reads(TorchDispatchMode):
    """Counts tensors whose value the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("frozen", [False, True], ids=["soft", "sliced"])
@pytest.mark.parametrize(("passes", "teacher"), MODES)
def test_no_step_reads_what_it_computes(passes: int, teacher: str, frozen: bool) -> None:
    """But whether its gradient is finite; and the router once a soft pass, at what the host
    drew."""
    counts = []
    for steps in (1, 2):
        with Reads() as reads:
            record = train(module_of(frozen, teacher, passes), batches(), steps)
        counts.append(reads.count)
    soft = sum(out["budget"] != "a" for out in record.outputs[len(record.outputs) // 2 :])
    assert counts[1] - counts[0] == (1 if frozen else 1 + (soft > 0) + soft)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("frozen", [False, True], ids=["soft", "sliced"])
@pytest.mark.parametrize("budget", TARGETS)
def test_nothing_is_drawn_on_a_device_by_waiting_for_it(budget: str, frozen: bool) -> None:
    """The first draw makes the tables that stay; from the second on there is no blocking copy."""
    module = module_of(frozen, "in_place", 4).cuda()
    assert module.family is not None
    module.family.draw(budget, 0.0, seed=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(1, 9):  # soft and hard
            module.family.draw(budget, 0.0, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
