"""Several documents in one sequence: nothing crosses a border, whatever way the parent runs.

Compared: a sequence of documents with each of them run on its own, in logits and in gradients; and
what training and validation make of a window of text with what its documents cost by themselves.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.documents import batch_of_documents, separately
from helpers.strategies import (
    architectures,
    assert_gradients_near,
    assert_near,
    difference,
    gradients,
    probe,
    random_parent,
    random_tokens,
    shapes,
    tiny_member,
    tiny_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.config import ObjectiveConfig, OptimConfig, ParentShape, StageConfig, TrainerConfig
from elastic.data import one_document
from elastic.parent import HybridParent, Member
from elastic.routing.curriculum import plan
from elastic.routing.masks import hard_keep
from elastic.teacher import OnlineTeacher
from elastic.training.callbacks import BudgetValidation
from elastic.training.module import PARENT, ElasticModule

RUNS = ("whole", "sliced", "masked")


def tiny_run(run: str) -> Member:
    """Three ways to run `tiny_shape()`."""
    if run == "masked":
        return hard_keep(tiny_shape(), tiny_member())
    return tiny_member() if run == "sliced" else None


def ids(*lengths: int) -> Tensor:
    """(1, t) document ids of a row with documents of these lengths."""
    return torch.repeat_interleave(torch.tensor(lengths))[None].int()


def leak(parent: HybridParent, member: Member, documents: Tensor) -> float:
    """How far a sequence of documents is from the documents on their own."""
    tokens = random_tokens(parent.shape, *documents.shape)
    together = parent.logits(tokens, member, documents)
    return difference(together, separately(parent, tokens, member, documents))


@st.composite
def borders(draw: st.DrawFn, rows: int = 2, time: int = 12) -> Tensor:
    """(b, t) ids: borders anywhere, another place in every row, ids that jump and need not be 0."""
    steps = st.lists(st.sampled_from([0, 0, 0, 1, 3]), min_size=time, max_size=time)
    return torch.tensor([draw(steps) for _ in range(rows)]).cumsum(-1).int()


@given(shapes(), borders(), st.sampled_from(RUNS), st.data())
def test_documents_in_one_sequence_equal_each_on_its_own(
    shape: ParentShape, documents: Tensor, run: str, data: st.DataObject
) -> None:
    """Logits and gradients, over any shape, member and borders."""
    parent, tokens = random_parent(shape), random_tokens(shape, *documents.shape)
    architecture = data.draw(architectures(shape))
    member = {"whole": None, "sliced": architecture, "masked": hard_keep(shape, architecture)}[run]
    together = parent.logits(tokens, member, documents)
    alone = separately(parent, tokens, member, documents)
    assert_near(together, alone)
    expected = gradients(parent, probe(alone))
    assert_gradients_near(gradients(parent, probe(together)), expected)


@pytest.mark.parametrize("run", RUNS)
def test_documents_longer_than_a_chunk_equal_each_on_its_own(run: str) -> None:
    parent, documents = random_parent(tiny_shape()), ids(70, 1, 2, 130, 7)
    assert leak(parent, tiny_run(run), documents) < 1e-4


@pytest.mark.parametrize("run", RUNS)
def test_another_first_document_does_not_reach_the_second(run: str) -> None:
    """But for rounding: decays inside a chunk are differences of one running sum."""
    parent, member, documents = random_parent(tiny_shape()), tiny_run(run), ids(9, 8)
    tokens = random_tokens(parent.shape, 1, 17)
    changed = tokens.clone()
    changed[:, :9] = (changed[:, :9] + 1) % parent.shape.vocab_size
    before, after = (parent.logits(row, member, documents) for row in (tokens, changed))
    assert difference(after[:, 9:], before[:, 9:]) < 1e-5
    assert difference(after[:, :9], before[:, :9]) > 0.1
    before, after = parent.logits(tokens, member), parent.logits(changed, member)
    assert difference(after[:, 9:], before[:, 9:]) > 0.01, "and without documents it does"


@pytest.mark.parametrize("run", RUNS)
def test_one_document_is_the_plain_sequence(run: str) -> None:
    parent, tokens = random_parent(tiny_shape()), random_tokens(tiny_shape())
    plain = parent.logits(tokens, tiny_run(run))
    one = torch.full_like(tokens, 5, dtype=torch.int32)
    assert difference(parent.logits(tokens, tiny_run(run), one), plain) < 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_recomputed_blocks_know_their_documents(run: str) -> None:
    plain, tokens, documents = random_parent(tiny_shape()), random_tokens(tiny_shape()), ids(4, 5)
    documents = documents.expand(2, -1)
    thrifty = HybridParent(tiny_shape(), activation_checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    expected = gradients(plain, probe(plain.logits(tokens, tiny_run(run), documents)))
    actual = gradients(thrifty, probe(thrifty.logits(tokens, tiny_run(run), documents)))
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("run", RUNS)
def test_bfloat16_stays_bfloat16_and_near_float32(run: str) -> None:
    parent, documents = random_parent(tiny_shape()), ids(12, 8)
    tokens, member = random_tokens(parent.shape, 1, 20), tiny_run(run)
    exact = parent.logits(tokens, member, documents)
    half = parent.bfloat16()
    assert half(tokens, member, documents).dtype == torch.bfloat16
    assert_near(half.logits(tokens, member, documents), exact, torch.bfloat16)


# In training.

END = 3
WINDOW = torch.tensor(
    [[5, 1, 4, END, 2, 2, 7, END, END, 9, 8], [END, 6, 1, 4, 4, 2, 5, 5, 1, 2, 0]]
)
"""(b, t + 1) text with five documents, one of a single token; each begins with END."""
BATCH = batch_of_documents(WINDOW, END)
SPANS = [(0, 0, 3), (0, 3, 7), (0, 8, 11), (1, 0, 11)]
"""Row, first token and one after the last, of the documents that have targets."""


def module_of(mode: str) -> ElasticModule:
    """A stage on random parents; a frozen teacher where the mode has one."""
    settings = StageConfig(mode=mode, tokens=20, sequence_length=10, batch_tokens=20, model_lr=1e-3)
    (stage,) = plan({"only": settings}, TrainerConfig())
    parent, teacher, family, optimizer = random_parent(tiny_shape()), None, None, None
    if mode == "elastic":
        teacher = OnlineTeacher(random_parent(tiny_shape(), seed=1), "32-true")
        family, optimizer = SimpleNamespace(router=None), SimpleNamespace()
    objective, optim = ObjectiveConfig(chunk_tokens=4), OptimConfig()
    return ElasticModule(parent, family, teacher, optimizer, stage, {}, objective, optim, 0, 1)


def loss_by_documents(parent: HybridParent) -> Tensor:
    """Mean loss of the window, each document in a call of its own."""
    losses = []
    for row, first, last in SPANS:
        logits = parent.logits(WINDOW[row : row + 1, first : last - 1])[0]
        targets = WINDOW[row, first + 1 : last]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses).mean()


def test_a_step_learns_from_every_token_as_its_documents_alone_would() -> None:
    """Loss and gradients."""
    module = module_of("pretrain")
    expected = loss_by_documents(module.parent)
    wanted = gradients(module.parent, expected)
    loss = module.training_step(BATCH, 0)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_near(gradients(module.parent, loss), wanted)
    crossing = module_of("pretrain").training_step(one_document(WINDOW), 0)["loss"]
    assert crossing.item() != pytest.approx(expected.item(), rel=1e-2)


def test_validation_measures_what_training_learns() -> None:
    module = module_of("pretrain")
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(model=module),
        precision_plugin=SimpleNamespace(val_step_context=nullcontext),
    )
    losses, _ = BudgetValidation([BATCH], 1)._measure(trainer, module, {PARENT: (PARENT, None)})
    assert losses[PARENT] == pytest.approx(loss_by_documents(module.parent).item(), rel=1e-5)


def test_the_teacher_separates_documents_as_its_student_does() -> None:
    module = module_of("elastic")
    assert isinstance(module.teacher, OnlineTeacher)
    hidden, head = module.teacher.distributions(BATCH, "train", 0)
    expected = separately(module.teacher.model, BATCH.inputs, None, BATCH.documents)
    assert_near((hidden @ head.T).view_as(expected), expected)
