"""Online teachers: wherever the frozen parent's weights are, their distributions are the parent's.

A whole copy on the device is the plain twin of the streamed ones, and the parent's own forward pass
of that copy.
"""

import socket
from collections.abc import Iterator

import pytest
import torch
import torch.multiprocessing
from helpers.documents import batch_of_documents
from helpers.strategies import random_parent, random_tokens, tiny_shape
from helpers.teacher_processes import CPU, readable, run_together, same, teacher_of
from torch import nn

from elastic.config import ConfigError, ObjectiveConfig
from elastic.data import one_document
from elastic.teacher import StreamedTeacher, build_teacher

SHAPES = {
    "every_kind": tiny_shape(),
    "tied": tiny_shape(tied_head=True),
    "one_block": tiny_shape(pattern="M"),
    "long": tiny_shape(pattern="M-M*-M-*M-M-"),
}


# The whole copy


@pytest.mark.parametrize("start", [None, 3], ids=["one_document", "documents"])
def test_a_replicated_teacher_has_the_logits_of_its_parent(start: int | None) -> None:
    parent, batch = random_parent(tiny_shape()), random_tokens(tiny_shape(), time=12)
    rows = batch_of_documents(batch, start)
    hidden, head = teacher_of("replicated", parent).distributions(rows, "train", 0)
    tokens, documents = rows.inputs, rows.documents
    assert start is None or len(documents.unique()) > 1
    expected = parent.logits(tokens, None, documents).flatten(0, 1)
    assert torch.equal(hidden @ head.T, expected)
    assert not hidden.requires_grad and not head.requires_grad


@pytest.mark.parametrize("where", ["replicated", "cpu_offload"])
def test_what_becomes_of_the_parent_does_not_matter(where: str) -> None:
    """It is sorted and trained in place afterwards."""
    parent, batch = random_parent(tiny_shape()), one_document(random_tokens(tiny_shape()))
    teacher = build_teacher(ObjectiveConfig(teacher=where), parent, "32-true", 1)
    expected = parent.logits(batch.inputs).flatten(0, 1)
    with torch.no_grad():
        for weight in parent.parameters():
            weight.add_(1.0)
    teacher.start(CPU, "short")
    output = teacher.distributions(batch, "train", 0)
    assert isinstance(output, tuple)
    assert torch.equal(output[0] @ output[1].T, expected)


@pytest.mark.parametrize("start", [None, 3], ids=["one_document", "documents"])
@pytest.mark.parametrize("ambient", [False, True])
def test_in_bfloat16_it_is_a_float32_copy_under_autocast(start: int | None, ambient: bool) -> None:
    """To the bit, if the embedding survives rounding; whatever the precision around the call."""
    parent, batch = random_parent(tiny_shape()), random_tokens(tiny_shape(), time=12)
    with torch.no_grad():
        embedding = parent.backbone.embeddings.weight
        embedding.copy_(embedding.bfloat16())
    teacher, rows = teacher_of("replicated", parent, "bf16-mixed"), batch_of_documents(batch, start)
    tokens, documents = rows.inputs, rows.documents
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = parent(tokens, None, documents).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        hidden, head = teacher.distributions(rows, "train", 0)
    assert torch.equal(hidden, expected.bfloat16())
    assert torch.equal(head, parent.lm_head.weight.bfloat16())


def test_small_tensors_stay_in_float32_and_matrices_take_half() -> None:
    teacher = teacher_of("replicated", random_parent(tiny_shape()), "bf16-true")
    for name, weight in teacher.model.named_parameters():
        assert weight.dtype == (torch.bfloat16 if weight.ndim == 2 else torch.float32), name


def test_a_teacher_hands_nothing_to_the_module_that_holds_it() -> None:
    """Neither parameters, nor state to save, nor modules."""
    for where in ("replicated", "cpu_offload"):
        holder = nn.Module()
        holder.teacher = teacher_of(where, random_parent(tiny_shape()))
        assert not list(holder.parameters()) and not holder.state_dict()
        assert list(holder.modules()) == [holder]


# Streamed


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_offloaded_teacher_is_the_replicated_one(name: str, precision: str) -> None:
    """To the bit, in every call."""
    shape = SHAPES[name]
    parent = random_parent(shape)
    plain, streamed = (teacher_of(w, parent, precision) for w in ("replicated", "cpu_offload"))
    for seed in range(3):
        batch = batch_of_documents(random_tokens(shape, seed=seed), 3)
        output = plain.distributions(batch, "train", 0)
        assert same(output, streamed.distributions(batch, "train", 0))


def test_streamed_matrices_are_there_only_while_they_are_read() -> None:
    shape = SHAPES["long"]
    teacher = teacher_of("cpu_offload", random_parent(shape))
    batch = one_document(random_tokens(shape))
    model, seen = teacher.model, []
    for block in model.backbone.layers:
        block.register_forward_hook(
            lambda *_: seen.append(readable(model)), prepend=True
        )  # before the block's own matrices go
    assert readable(model) == set()
    for _ in range(2):
        teacher.distributions(batch, "train", 0)
        assert readable(model) == {"lm_head.weight"}
    assert len(seen) == 2 * len(shape.pattern)
    for index, names in enumerate(seen):
        number = index % len(shape.pattern)
        assert names and all(name.startswith(f"backbone.layers.{number}.") for name in names)


def test_a_device_holds_two_blocks_and_an_end() -> None:
    shape = SHAPES["long"]
    teacher = teacher_of("cpu_offload", random_parent(shape))
    assert isinstance(teacher, StreamedTeacher) and teacher.stream is not None
    largest = max(unit.size for unit in teacher.stream.blocks)
    assert teacher.stream.held() <= 2 * largest + teacher.stream.first.size
    places = {unit.place.data_ptr() for unit in teacher.stream.blocks}
    assert len(places) == 2 and teacher.stream.last.place is teacher.stream.first.place


def test_a_second_stage_starts_without_a_second_copy() -> None:
    parent, batch = random_parent(tiny_shape()), one_document(random_tokens(tiny_shape()))
    teacher = teacher_of("cpu_offload", parent)
    stream = teacher.stream  # type: ignore[attr-defined]
    output = teacher.distributions(batch, "train", 0)[0].clone()
    teacher.start(CPU, "long")
    assert teacher.stream is stream  # type: ignore[attr-defined]
    assert torch.equal(output, teacher.distributions(batch, "validation", 0)[0])


def test_one_process_cannot_partition_a_teacher() -> None:
    with pytest.raises(ConfigError, match="zero3: must be replicated or cpu_offload") as caught:
        teacher_of("zero3", random_parent(tiny_shape()))
    assert "\n" not in str(caught.value)


# Two processes


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    path = tmp_path_factory.mktemp("together")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, shape in SHAPES.items():
        parents = [random_parent(shape, seed) for seed in (0, 1)]
        batches = [random_tokens(shape, seed=seed) for seed in range(4)]
        torch.save((parents, batches), path / f"{name}.case")
    torch.multiprocessing.spawn(run_together, (port, path), nprocs=2)
    yield [torch.load(path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_a_shared_teacher_is_the_replicated_one(together: list[dict]) -> None:
    """To the bit, on both processes, though each has text of its own."""
    for found in together:
        assert len(found["same"]) == 4 * len(SHAPES) and all(found["same"].values())
        for plain, shared in found["losses"].values():
            assert shared == pytest.approx(plain, rel=1e-6)
    assert together[0]["losses"] != together[1]["losses"]


def test_a_process_keeps_half_of_a_shared_teacher(together: list[dict]) -> None:
    for found in together:
        for held, whole in found["held"].values():
            assert (
                whole / 2 <= held <= whole / 2 + len("M-M*-M-*M-M-") + 2
            )  # a byte of padding each


def test_blocks_are_shared_out_again_after_their_forward_pass(together: list[dict]) -> None:
    for found in together:
        for (case, _), names in found["after"].items():
            head = "backbone.embeddings.weight" if case.startswith("tied") else "lm_head.weight"
            assert names == {head}


# A GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_offloaded_teacher_is_the_replicated_one_on_a_gpu(precision: str) -> None:
    """Blocks large enough for a copy to be still under way when it is needed."""
    shape = tiny_shape(
        pattern="M-M-*-M-", hidden_size=512, vocab_size=4096, intermediate_size=4096,
        num_attention_heads=8, head_dim=64, mamba_num_heads=16, mamba_head_dim=64,
        ssm_state_size=64,
    )  # fmt: skip
    parent, device = random_parent(shape), torch.device("cuda", 0)
    teachers = []
    for where in ("replicated", "cpu_offload"):
        teacher = build_teacher(ObjectiveConfig(teacher=where), parent, precision, 1)
        teacher.start(device, "short")
        teachers.append(teacher)
    for seed in range(4):
        batch = one_document(random_tokens(shape, batch=2, time=65, seed=seed)).to(device)
        plain, streamed = (teacher.distributions(batch, "train", 0) for teacher in teachers)
        assert isinstance(plain, tuple) and isinstance(streamed, tuple)
        assert same(plain, streamed)
