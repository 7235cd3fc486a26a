"""Problems with worked solutions, generated: reasoning that a small model can learn and that a
program can check.

Everything is a function of a seed; which split a problem belongs to is one of its question alone.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from elastic.config.tasks import DIFFICULTIES, FAMILIES
from elastic.data.worked import WORKED

SPLITS = ("train", "held_out")

HELD_OUT = 8
"""One question in so many is held out."""

PATIENCE = 3000
"""A family has no unseen problem left when so many draws in a row found none."""


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and the way there."""

    family: str
    difficulty: int
    question: str
    trace: str
    answer: str

    def record(self) -> dict[str, Any]:
        """The problem as a chat of two turns."""
        answer = {
            "role": "assistant",
            "reasoning_content": self.trace,
            "content": self.answer,
        }
        return {"messages": [{"role": "user", "content": self.question}, answer]}


def split_of(question: str) -> str:
    """The split that a question belongs to, whatever seed drew it."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest) % HELD_OUT == 0]


def problems(
    seed: int,
    families: Sequence[str],
    difficulties: Sequence[int],
    count: int,
    split: str,
) -> Iterator[Problem]:
    """`count` problems, no question twice, in equal shares over families and difficulties.

    A family that has no unseen problem of a difficulty left is left out from then on; when all are,
    the iterator ends early. What is drawn for one family and difficulty does not depend on which
    others are asked for.

    Raises:
        ValueError: a family, difficulty or split that there is not.
    """
    for name, given, known in (
        ("families", families, FAMILIES),
        ("difficulties", difficulties, DIFFICULTIES),
        ("split", (split,), SPLITS),
    ):
        for each in given:
            if each not in known:
                raise ValueError(f"{name}={each}: must be of {', '.join(map(str, known))}")
    order = random.Random(f"{seed}/order")
    cells = [
        _unseen(seed, family, difficulty, split)
        for family in dict.fromkeys(families)
        for difficulty in dict.fromkeys(difficulties)
    ]
    left = count
    while cells and left > 0:
        order.shuffle(cells)
        for cell in tuple(cells):
            if left == 0:
                return
            problem = next(cell, None)
            if problem is None:
                cells.remove(cell)
                continue
            left -= 1
            yield problem


def _unseen(seed: int, family: str, difficulty: int, split: str) -> Iterator[Problem]:
    """The problems of one family and difficulty, each once."""
    rng, seen, misses = random.Random(f"{seed}/{family}/{difficulty}"), set(), 0
    while misses < PATIENCE:
        question, trace, answer = WORKED[family](rng, difficulty)
        if split_of(question) == split and question not in seen:
            seen.add(question)
            misses = 0
            yield Problem(family, difficulty, question, trace, answer)
        else:
            misses += 1


def solve(question: str) -> str:
    """The answer, found from the text of a question in another way than its trace goes.

    Raises:
        ValueError: the text is no question of any family.
    """
    kind, _, rest = question.partition(":")
    if kind == "Add":
        return _spaced(sum(_numbers(rest, "+")))
    if kind == "Subtract":
        first, *others = _numbers(rest, "-")
        return _spaced(first - sum(others))
    if kind == "Sort":
        return " , ".join(map(_spaced, sorted(_numbers(rest, ","))))
    if kind == "Which is larger":
        return _spaced(max(_numbers(rest.removesuffix(" ?"), "or")))
    if kind.startswith("How many are larger than"):
        fixed = _number(kind.removeprefix("How many are larger than"))
        others = _numbers(rest.removesuffix(" ?"), ",")
        return _spaced(sum(other > fixed for other in others))
    if kind == "Run":
        return _spaced(_printed(rest.strip().splitlines()))
    raise ValueError(f"no question of {', '.join(FAMILIES)}: {question[:60]!r}")


def _number(text: str) -> int:
    return int(text.replace(" ", ""))


def _numbers(text: str, between: str) -> list[int]:
    return [_number(each) for each in text.split(between)]


def _spaced(number: int) -> str:
    return " ".join(str(number))


def _printed(program: Sequence[str]) -> int:
    """What a program prints, worked out backwards from its last line."""
    *lines, last = program
    unrolled = list[str]()
    for line in lines:
        number, code = line.split(" . ")
        _, repeated, count = number.rpartition("repeat ")
        unrolled += [code] * (int(count) if repeated else 1)

    @cache
    def value(text: str, before: int) -> int:
        """Of a name or a number as it is before a line."""
        name = text.strip()
        if not name.isalpha():
            return _number(text)
        at = max(i for i in range(before) if unrolled[i].startswith(f"{name} ="))
        right = unrolled[at].partition("=")[2]
        for sign in "+-*":
            if sign in right:
                one, two = (value(side, at) for side in right.split(sign))
                return one + two if sign == "+" else one - two if sign == "-" else one * two
        return value(right, at)

    return value(last.removeprefix("print "), len(unrolled))
