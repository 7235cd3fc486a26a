"""Sums by document, and standard errors over documents, against counts by hand and by bootstrap."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.stores import Document, MemoryStore, prepared
from torch import Tensor

from elastic.config import ConfigError
from elastic.data import PreparedData
from elastic.evaluate.documents import (
    ReportText,
    mean_and_error,
    mean_over_seeds,
    report_text,
    sums_by_document,
)

VOCABULARY, BORDER = 11, 6
"""Tokens below the border are of one source, the others of another."""


def documents(count: int, low: int, high: int, seed: int = 0, longest: int = 30) -> list[Document]:
    """Documents of 1 to `longest` tokens; of some tokens it is not asked what they are."""
    random = np.random.default_rng(seed)
    found = []
    for length in random.integers(1, longest + 1, count).tolist():
        ids = tuple(random.integers(low, high, length).tolist())
        found.append(Document(ids, tuple((random.random(length) < 0.8).tolist())))
    return found


def two_sources() -> PreparedData:
    """Every second document is held out; one source has two parts."""
    one = documents(41, 0, BORDER)
    other = documents(22, BORDER, VOCABULARY, seed=1)
    return prepared(
        MemoryStore([one[:15], one[15:]]), MemoryStore([other]), validation_every=2, weights=[2, 1]
    )


def report(data: PreparedData, sequences: int, length: int, batch: int) -> ReportText:
    return report_text(data, "report", sequences, length, batch)


def model(seed: int) -> Callable[[Tensor], Tensor]:
    """Logits that depend on the token before alone."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda tokens: table[tokens]


def test_every_target_counts_for_its_own_document() -> None:
    """One by one: pieces of the documents that are held out for the report, of both sources; what
    is no target, and the padding, for none."""
    data = two_sources()
    text = report(data, 1000, 16, 4)
    student, teacher = model(1), model(2)
    expected: list[list[float]] = []
    for name, store in data.stores.items():
        numbers = data.documents(name, "report")
        for start, size in zip(*(each.tolist() for each in store.places(numbers)), strict=True):
            ids, targets = store.read(start, size)
            row = [0.0, 0.0, 0.0]
            for place in range(1, size):
                if targets is not None and not targets[place]:
                    continue
                log_q = torch.log_softmax(student(torch.tensor(int(ids[place - 1]))), -1)
                log_p = torch.log_softmax(teacher(torch.tensor(int(ids[place - 1]))), -1)
                row[0] -= float(log_q[int(ids[place])])
                row[1] += float((log_p.exp() * (log_p - log_q)).sum())
                row[2] += 1
            if row[2]:
                expected.append(row)
    (found,) = sums_by_document([student], teacher, text)
    assert text.document_count == len(expected) > 10
    wanted = np.array(expected).T
    assert text.tokens == wanted[2].sum()
    for values, right in zip((found.loss, found.kl, found.tokens), wanted, strict=True):
        np.testing.assert_allclose(values, right, rtol=1e-5)


def test_a_row_is_of_one_document_and_documents_are_numbered_through() -> None:
    """Of the sequences that are asked for, those of each source by its share."""
    data = two_sources()
    text = report(data, 9, 16, 4)
    assert [len(batch) for batch in text.batches] == [4, 4, 1]
    assert all(batch.shape[1] == 17 for batch in text.batches)
    tokens, numbers = torch.cat(text.batches), torch.cat(text.documents)
    seen: dict[int, bool] = {}
    for row, which in zip(tokens, numbers, strict=True):
        (number,) = set(which[which >= 0].tolist())
        other = set((row[1:][which >= 0] >= BORDER).tolist())
        assert len(other) == 1 and {seen.setdefault(number, *other)} == other
    assert list(seen) == list(range(text.document_count)) and sorted(seen.values()) == list(
        seen.values()
    )
    rows = [bool((row >= BORDER).any()) for row in tokens]
    assert rows.count(True) == 3
    assert sum(int((which >= 0).sum()) for which in text.documents) == text.tokens


def test_what_is_behind_a_piece_is_not_looked_at() -> None:
    """Any model may read a row: the padding changes nothing of what counts."""
    text = report(two_sources(), 1000, 16, 4)
    assert any((each < 0).all(0).any() for each in text.documents)
    filled = ReportText(
        [
            torch.where(_behind(b, d), 7, b)
            for b, d in zip(text.batches, text.documents, strict=True)
        ],
        text.documents,
    )
    (one,), (two,) = (sums_by_document([model(1)], model(2), each) for each in (text, filled))
    assert (one.loss == two.loss).all() and (one.kl == two.kl).all()


def _behind(batch: Tensor, documents: Tensor) -> Tensor:
    """(b, t + 1) what comes after the last target of each row."""
    place = torch.arange(batch.shape[1])
    last = ((documents >= 0) * place[1:]).amax(1, keepdim=True)
    return place > last


def test_the_mean_is_that_of_all_tokens() -> None:
    text = report(two_sources(), 100, 16, 8)
    found, other = sums_by_document([model(1), model(3)], model(1), text)
    batch, counted = torch.cat(text.batches), torch.cat(text.documents) >= 0
    loss = F.cross_entropy(model(1)(batch[:, :-1])[counted], batch[:, 1:][counted])
    mean, _ = mean_and_error(found.loss, found.tokens)
    assert mean == pytest.approx(float(loss), rel=1e-6)
    assert mean_and_error(found.kl, found.tokens) == pytest.approx((0.0, 0.0), abs=1e-7)
    (alone,) = sums_by_document([model(3)], model(1), text)
    assert (alone.kl == other.kl).all() and other.kl.min() > 0, "each model by itself"


def test_the_error_is_the_spread_of_the_mean_over_documents() -> None:
    """As a bootstrap over documents has it; and tokens of one document do not count as
    independent."""
    random = np.random.default_rng(0)
    tokens = random.integers(5, 50, 200).astype(float)
    level = random.normal(2.0, 0.3, 200)  # what a document's tokens share
    sums = level * tokens
    mean, error = mean_and_error(sums, tokens)
    draws = random.integers(0, 200, (4000, 200))
    spread = (sums[draws].sum(1) / tokens[draws].sum(1)).std()
    assert mean == pytest.approx(sums.sum() / tokens.sum())
    assert error == pytest.approx(spread, rel=0.1)


def test_seeds_are_averaged_document_by_document() -> None:
    """What differs by seed alone averages out; what documents have in common does not."""
    random = np.random.default_rng(0)
    tokens = np.full(50, 20.0)
    shared = random.normal(0.1, 0.02, 50) * tokens
    noise = random.normal(0, 1.0, 50)
    one, _ = mean_and_error(shared, tokens)
    mean, error = mean_over_seeds([shared + noise, shared - noise], tokens)
    assert (mean, error) == pytest.approx(mean_and_error(shared, tokens))
    assert mean == pytest.approx(one) and error < mean_and_error(shared + noise, tokens)[1]


def test_pieces_of_one_document_are_refused() -> None:
    long = [Document((1,) * 100, (True,) * 100)]
    data = prepared(MemoryStore([long * 5]), validation_every=2)
    with pytest.raises(ConfigError, match=r"^sequences=1: all pieces of 16 tokens are of one docu"):
        report_text(data, "validation", 1, 16, 2)
