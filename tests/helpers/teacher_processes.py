"""Two processes that share a teacher; a file of its own, which each of them imports."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.documents import batch_of_documents

from elastic.config import ObjectiveConfig
from elastic.data import Batch
from elastic.losses import Head, token_terms
from elastic.parent import HybridParent
from elastic.teacher import OnlineTeacher, StreamedTeacher, Teacher, build_teacher

CPU = torch.device("cpu")


def teacher_of(where: str, parent: HybridParent, precision: str = "32-true") -> OnlineTeacher:
    """A started teacher."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    objective = ObjectiveConfig(teacher=where)
    teacher = build_teacher(objective, parent, precision, world_size)
    assert isinstance(teacher, OnlineTeacher)
    teacher.start(CPU, "short")
    return teacher


def same(one: Head, two: Head) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, two, strict=True))


@torch.no_grad()
def loss(teacher: Teacher, student: HybridParent, batch: Batch) -> float:
    """What a student would minimise."""
    head = student(batch.inputs, None, batch.documents).flatten(0, 1), student.head_weight()
    output = teacher.distributions(batch, "train", 0)
    return float(token_terms(head, output, batch.targets, ObjectiveConfig())["total"])


def readable(model: HybridParent) -> set[str]:
    """Names of the matrices that are there now; convolutions and vectors always are."""
    stay = ("norm", "conv1d", "bias", "A_log", "D")
    names = {name for name, weight in model.named_parameters() if weight.numel()}
    return {name for name in names if not any(word in name for word in stay)}


def run_together(rank: int, port: int, path: Path) -> None:
    """One of two processes: the output of every `*.case`'s teacher for text of its own."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict = {"losses": {}, "held": {}, "same": {}, "after": {}}
    for file in sorted(path.glob("*.case")):
        (parent, student), batches = torch.load(file, weights_only=False)
        for precision in ("32-true", "bf16-mixed"):
            plain = teacher_of("replicated", parent, precision)
            shared = teacher_of("zero3", parent, precision)
            assert isinstance(shared, StreamedTeacher) and shared.stream is not None
            case = f"{file.stem} {precision}"
            units = {shared.stream.first, shared.stream.last, *shared.stream.blocks}
            shares = sum(unit.store.held for unit in units)
            found["held"][case] = shares, sum(unit.size for unit in units)
            for number, tokens in enumerate(batches[rank::2]):
                batch = batch_of_documents(tokens, 3)
                output = plain.distributions(batch, "train", 0)
                found["same"][case, number] = same(output, shared.distributions(batch, "train", 0))
                found["after"][case, number] = readable(shared.model)
                losses = [loss(teacher, student, batch) for teacher in (plain, shared)]
                found["losses"][case, number] = losses
    torch.save(found, path / f"{rank}.pt")
    dist.destroy_process_group()
