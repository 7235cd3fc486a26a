"""Law 9, packed == alone: documents in one row compute what each computes in a call of its own.

Compared: hidden states, logits, the loss, and the gradient of every weight, for each kind of layer
and for the whole model, however it runs. Documents begin at, before and after the scan's chunks,
follow one another inside the convolution's window, and are one token long at a row's start, middle
and end; padding is a document of its own, in which no loss counts.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.documents import pieces
from helpers.strategies import (
    TOLERANCE,
    difference,
    gradient_differences,
    gradients,
    random_parent,
    random_tokens,
    tiny_shape,
    with_own_norms,
)
from torch import Tensor

import elastic.parent.attend
import elastic.parent.borders
import elastic.parent.hybrid
import elastic.parent.ssd
import elastic.parent.ssd_fused
from elastic.config import ParentShape
from elastic.members.architecture import (
    Architecture,
    AttentionLayer,
    Layer,
    MambaLayer,
    MLPLayer,
)
from elastic.parent import HybridParent, Keep, LayerKeep, Member
from elastic.parent.ssd import Conv1d, MambaMixer
from elastic.parent.ssd_ref import CHUNK
from elastic.routing.masks import hard_keep

ROWS = {
    "at chunks": [CHUNK, CHUNK, 9],
    "around chunks": [CHUNK - 1, 2, CHUNK - 1, 9],
    "in the window": [1, 1, 2, 3, 1, 2, 27, 1, 3, CHUNK - 1, 1],
    "padded": [3, 2 * CHUNK - 4, 10],
}
"""Lengths of the documents of each row; the last one of `padded` is padding."""

PATTERNS = {"mamba": "M", "mlp": "-", "attention": "*", "whole model": "M-*M-"}

RUNS = ("whole", "soft", "hard", "sliced", "own sliced", "own hard", "checkpointed", "plain twin")


def documents_of(rows: dict[str, list[int]]) -> Tensor:
    """(b, t) ids that begin anywhere."""
    lines = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows.values()]
    return torch.stack([3 * number + line for number, line in enumerate(lines)]).int()


def member_of(shape: ParentShape) -> Architecture:
    """Smaller on every axis that the parent's layers have."""
    sizes: dict[str, Callable[[int], Layer]] = {
        "mamba": lambda index: MambaLayer(index, 4, 5),
        "mlp": lambda index: MLPLayer(index, 9),
        "attention": lambda index: AttentionLayer(index, 4),
    }
    layers = tuple(sizes[kind](index) for index, kind in enumerate(shape.kinds))
    return Architecture(8, layers)


def soft_keep(shape: ParentShape) -> Keep:
    """Every mask that there is, nothing in it zero or one."""

    def mask(*size: int) -> Tensor:
        return torch.linspace(0.3, 0.9, torch.Size(size).numel()).view(size)

    kinds = {
        "mamba": LayerKeep(mask(1), mask(1, shape.mamba_num_heads), mask(1, shape.mamba_head_dim)),
        "mlp": LayerKeep(mask(1), mask(1, shape.intermediate_size)),
        "attention": LayerKeep(mask(1), mask(1, shape.num_attention_heads)),
    }
    return Keep(mask(1, shape.hidden_size), tuple(kinds[kind] for kind in shape.kinds))


def subject(pattern: str, run: str) -> tuple[HybridParent, Member, int | None]:
    """A random parent, how to run it, and the budget whose own norms count."""
    shape = tiny_shape(pattern=pattern)
    parent = with_own_norms(shape) if "own" in run else random_parent(shape)
    parent.activation_checkpointing = run == "checkpointed"
    if run == "plain twin":
        for module in parent.modules():
            if isinstance(module, MambaMixer):
                module.observe = lambda _: None  # only the twin can be observed
    member: Member = None
    if "sliced" in run:
        member = member_of(shape)
    elif "hard" in run:
        member = hard_keep(shape, member_of(shape))
    elif run == "soft":
        member = soft_keep(shape)
    return parent, member, 1 if "own" in run else None


Outputs = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Hidden states, logits and loss; and the gradient of every tensor."""


def outputs(
    parent: HybridParent, member: Member, own: int | None, tokens: Tensor, documents: Tensor | None
) -> dict[str, Tensor]:
    """The loss is a sum over all tokens whose next one is of the same document; no padding."""
    hidden = parent(tokens, member, documents, own)
    logits = (hidden @ parent.head_weight(member).T).float()
    counts = torch.ones_like(tokens, dtype=torch.bool)
    if documents is not None:
        counts[-1, -ROWS["padded"][-1] :] = False
        counts[:, :-1] &= documents[:, :-1] == documents[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    return {"hidden": hidden, "logits": logits, "loss": (losses * counts[:, :-1]).sum()}


def packed_and_alone(parent: HybridParent, member: Member, own: int | None) -> list[Outputs]:
    documents = documents_of(ROWS)
    tokens = random_tokens(parent.shape, *documents.shape)
    together = outputs(parent, member, own, tokens, documents)
    each = [
        outputs(parent, member, own, tokens[row : row + 1, span], None)
        for row, span in pieces(documents)
    ]
    alone = {
        name: torch.cat([one[name] for one in each], dim=1).view(together[name].shape)
        for name in ("hidden", "logits")
    }
    alone["loss"] = sum((one["loss"] for one in each[:-1]), torch.zeros(()))
    return [(found, gradients(parent, found["loss"])) for found in (together, alone)]


def off(pattern: str, run: str) -> tuple[float, float]:
    """Largest difference of what is computed, and of the gradients."""
    packed, alone = packed_and_alone(*subject(pattern, run))
    found = [difference(packed[0][name], alone[0][name]) for name in alone[0]]
    return max(found), max(gradient_differences(packed[1], alone[1]).values())


def is_near(found: tuple[float, float]) -> bool:
    limit = TOLERANCE[torch.float32]
    return found[0] <= limit and found[1] <= 10 * limit


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_packed_is_alone(pattern: str, run: str) -> None:
    found = off(pattern, run)
    assert is_near(found), found


@pytest.mark.parametrize("short", [1, 10**9], ids=["document by document", "mask"])
@pytest.mark.parametrize("run", ["whole", "soft", "sliced"])
def test_packed_is_alone_in_either_form_of_attention(
    run: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one a CPU takes depends on how long the documents are."""
    monkeypatch.setattr(elastic.parent.attend, "SHORT", short)
    form = elastic.parent.attend.seen_in(documents_of(ROWS), 5)
    assert isinstance(form, tuple if short == 1 else Tensor)
    found = off("-*M", run)
    assert is_near(found), found


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_packed_is_alone_for_other_convolutions(width: int) -> None:
    """A window of one step reads nothing else; one of five is longer than many documents."""
    for bias in (True, False):
        parent = random_parent(tiny_shape(pattern="M", conv_kernel=width, conv_bias=bias))
        packed, alone = packed_and_alone(parent, None, None)
        assert difference(packed[0]["logits"], alone[0]["logits"]) <= TOLERANCE[torch.float32]
        worst = max(gradient_differences(packed[1], alone[1]).values())
        assert worst <= 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("time", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1])
def test_rows_of_one_token_documents_are_tokens_alone(time: int) -> None:
    parent = random_parent(tiny_shape())
    tokens, documents = random_tokens(parent.shape, 2, time), torch.arange(time).int()
    together = parent.logits(tokens, None, documents.expand(2, -1))
    alone = parent.logits(tokens.reshape(-1, 1)).view_as(together)
    assert difference(together, alone) <= TOLERANCE[torch.float32]


# The guards: each border's own part, forwards and backwards, is missed where it is gone.


def _one_document(whole: Callable) -> Callable:
    return lambda ids, *rest: whole(torch.zeros_like(ids), *rest)


def _unaware(whole: Callable) -> Callable:
    return lambda *arguments: whole(*arguments[:-1], None)


MISTAKES = {
    "state": ("whole", elastic.parent.borders, "chunk_borders", _one_document),
    "convolution": ("whole", elastic.parent.ssd_fused, "_convolve", _unaware),
    "gradient of the convolution": (
        "whole", elastic.parent.ssd_fused, "_convolve_backward", _unaware,
    ),
    "attention": ("whole", elastic.parent.hybrid, "seen_in", lambda _: lambda *_: None),
    "mask": ("whole", elastic.parent.attend, "document_mask", _one_document),
    "state of the twin": ("plain twin", elastic.parent.ssd, "scan", _unaware),
    "convolution of the twin": ("plain twin", Conv1d, "forward", _unaware),
}  # fmt: skip


@pytest.fixture(params=MISTAKES)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    run, owner, name, breakage = MISTAKES[request.param]
    if request.param == "mask":
        monkeypatch.setattr(elastic.parent.attend, "SHORT", 10**9)
    monkeypatch.setattr(owner, name, breakage(getattr(owner, name)))
    yield run


def test_the_comparison_notices_each_leak(broken: str) -> None:
    found = off(PATTERNS["whole model"], broken)
    assert found[1] > 1e-2, found
