"""Sums by document, and standard errors over documents, against counts by hand and by bootstrap."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.config import ConfigError
from elastic.evaluate.documents import (
    mean_and_error,
    mean_over_seeds,
    report_text,
    sums_by_document,
)

END, VOCABULARY = 0, 11


def documents(count: int, seed: int = 0) -> np.ndarray:
    """Documents of 1 to 30 tokens, each with its end."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 30, count)
    parts = [[*random.integers(1, VOCABULARY, length), END] for length in lengths]
    return np.concatenate(parts).astype(np.uint16)


def model(seed: int) -> Callable[[Tensor], Tensor]:
    """Logits that depend on the token before alone."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda tokens: table[tokens]


def test_every_target_counts_for_its_own_document() -> None:
    """One by one: a document's tokens, its end among them, in the windows that were taken."""
    tokens = documents(40)
    text = report_text(tokens, END, 9, 16, 4)
    assert [len(batch) for batch in text.batches] == [4, 4, 1]
    windows = (len(tokens) - 1) // 16
    owner, number = [], 0
    for token in tokens:
        owner.append(number)
        number += int(token == END)
    expected: dict[int, list[float]] = {}
    student, teacher = model(1), model(2)
    for i in range(9):
        start = i * windows // 9 * 16
        for place in range(start + 1, start + 17):
            before, token = int(tokens[place - 1]), int(tokens[place])
            log_q = torch.log_softmax(student(torch.tensor(before)), -1)
            log_p = torch.log_softmax(teacher(torch.tensor(before)), -1)
            kl = float((log_p.exp() * (log_p - log_q)).sum())
            row = expected.setdefault(owner[place], [0.0, 0.0, 0.0])
            for position, value in enumerate((-float(log_q[token]), kl, 1.0)):
                row[position] += value
    (found,) = sums_by_document([student], teacher, text)
    assert text.document_count == len(expected) and text.tokens == 144
    wanted = np.array(list(expected.values())).T
    for values, right in zip((found.loss, found.kl, found.tokens), wanted, strict=True):
        np.testing.assert_allclose(values, right, rtol=1e-5)


def test_the_mean_is_that_of_all_tokens() -> None:
    text = report_text(documents(40), END, 100, 16, 8)
    found, other = sums_by_document([model(1), model(3)], model(1), text)
    batch = torch.cat(text.batches)
    loss = F.cross_entropy(model(1)(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
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


def test_windows_within_one_document_are_refused() -> None:
    tokens = np.ones(100, dtype=np.uint16)
    with pytest.raises(ConfigError, match=r"^sequences=3: all windows of 16 tokens are within one"):
        report_text(tokens, END, 3, 16, 2)


def test_without_an_end_token_each_window_is_a_document() -> None:
    text = report_text(np.ones(100, dtype=np.uint16), None, 3, 16, 2)
    assert text.document_count == 3
    assert [each[:, 0].tolist() for each in text.documents] == [[0, 1], [2]]
