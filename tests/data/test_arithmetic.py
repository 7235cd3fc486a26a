"""Problems with worked solutions: right, apart in their splits, the same every time."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from helpers.paths import ROOT

from elastic.data.arithmetic import (
    DIFFICULTIES,
    FAMILIES,
    Problem,
    problems,
    solve,
    split_of,
)
from elastic.data.tokenizer import train_tokenizer
from elastic.data.worked import WORKED


def drawn(count: int, split: str = "train", seed: int = 0) -> list[Problem]:
    return list(problems(seed, FAMILIES, DIFFICULTIES, count, split))


@pytest.mark.parametrize(("split", "count"), [("train", 1600), ("held_out", 200)])
def test_every_answer_is_that_of_an_independent_solver(split: str, count: int) -> None:
    for problem in drawn(count, split):
        assert solve(problem.question) == problem.answer, problem


def test_a_trace_ends_with_its_answer() -> None:
    """The last step is a copy; of a comparison of two, the sign says which."""
    for problem in drawn(400):
        if problem.family != "comparison" or "How many" in problem.question:
            last = problem.trace.splitlines()[-1]
            assert problem.answer in last, problem


def test_every_step_of_a_column_adds_up() -> None:
    """The columns of a trace, read as text."""
    for problem in problems(1, ("addition", "subtraction"), DIFFICULTIES, 400, "train"):
        for line in problem.trace.splitlines():
            left, _, right = line.partition(" = ")
            if not left or not right:
                continue  # the operands, and the result
            one, sign, two, _, carry = left.split()
            flag, digit = map(int, right.split(" : ")[0].split())
            if sign == "+":
                assert int(one) + int(two) + int(carry) == 10 * flag + digit, problem
            else:
                assert int(one) - int(two) - int(carry) == digit - 10 * flag, problem


def test_splits_never_share_a_question() -> None:
    """Whatever the seeds, also where a family has few problems."""

    def questions(split: str, seed: int) -> set[str]:
        return {p.question for p in problems(seed, FAMILIES, (1, 2), 2000, split)}

    train, held_out = questions("train", 1) | questions("train", 2), questions("held_out", 3)
    assert not train & held_out
    assert all(split_of(question) == "train" for question in train)
    assert all(split_of(question) == "held_out" for question in held_out)


def test_one_question_in_eight_is_held_out() -> None:
    rng = random.Random(0)
    questions = {WORKED["addition"](rng, 3)[0] for _ in range(3000)}
    share = sum(split_of(question) == "held_out" for question in questions) / len(questions)
    assert 0.1 < share < 0.15


def test_no_question_comes_twice() -> None:
    questions = Counter(p.question for p in problems(0, FAMILIES, (1,), 4000, "train"))
    assert max(questions.values()) == 1


def test_families_and_difficulties_have_equal_shares() -> None:
    cells = Counter((p.family, p.difficulty) for p in drawn(len(FAMILIES) * 8 * 5))
    assert cells == {cell: 5 for cell in itertools.product(FAMILIES, DIFFICULTIES)}


def test_an_exhausted_family_leaves_its_place_to_the_others() -> None:
    """One-digit lists of three are few; additions are not."""
    cells = Counter(p.family for p in problems(0, ("sorting", "addition"), (1,), 4000, "train"))
    assert 800 < cells["sorting"] < 1000
    assert cells["addition"] == 4000 - cells["sorting"]


def test_all_problems_exhausted_ends_the_draw() -> None:
    found = list(problems(0, ("sorting",), (1,), 4000, "held_out"))
    train = list(problems(0, ("sorting",), (1,), 4000, "train"))
    assert len(found) + len(train) == 1000  # every list of three digits, in one split or the other


def test_draws_are_a_function_of_the_arguments() -> None:
    """In another process too, however Python hashes there."""
    code = (
        "from elastic.data.arithmetic import *\n"
        "for p in problems(7, FAMILIES, DIFFICULTIES, 80, 'train'): print(p)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "".join(f"{p}\n" for p in drawn(80, seed=7))
    assert drawn(80, seed=7) == drawn(80, seed=7) != drawn(80, seed=8)


def test_a_draw_does_not_depend_on_what_else_is_asked_for() -> None:
    alone = [p for p in problems(0, ("program",), (2,), 4, "train")]
    among = [p for p in drawn(len(FAMILIES) * 8 * 4) if (p.family, p.difficulty) == ("program", 2)]
    assert alone == among


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, ("algebra",), (1,), 1, "train"), "families=algebra"),
        ((0, ("sorting",), (9,), 1, "train"), "difficulties=9"),
        ((0, ("sorting",), (1,), 1, "test"), "split=test"),
    ],
)
def test_what_there_is_not_is_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        list(problems(*arguments))


@pytest.mark.parametrize("question", ["", "Multiply: 2 * 3", "2 + 3"])
def test_the_solver_refuses_other_questions(question: str) -> None:
    with pytest.raises(ValueError, match="no question of"):
        solve(question)


def test_low_difficulties_are_short_and_high_ones_long() -> None:
    """In tokens of a small tokenizer, with some for the marks of the turns."""
    chosen = drawn(len(FAMILIES) * 8 * 8)
    texts = ["\n".join((p.question, p.trace, p.answer)) for p in chosen]
    tokenizer = train_tokenizer(texts, 1024)
    lengths: dict[int, list[int]] = {difficulty: [] for difficulty in DIFFICULTIES}
    for problem, text in zip(chosen, texts, strict=True):
        lengths[problem.difficulty].append(len(tokenizer(text).input_ids) + 16)
    assert all(max(lengths[difficulty]) <= 256 for difficulty in (1, 2, 3))
    assert all(200 < min(lengths[difficulty]) for difficulty in (4, 5, 6, 7, 8))
    assert max(map(max, lengths.values())) <= 1500
    means = [sum(lengths[difficulty]) / len(lengths[difficulty]) for difficulty in DIFFICULTIES]
    assert means == sorted(means)


def test_settings_know_all_families() -> None:
    assert tuple(WORKED) == FAMILIES


def test_a_record_is_a_chat_of_two_turns() -> None:
    problem = Problem("addition", 1, "Add: 1 + 2", "1 + 2\n= 3", "3")
    assert problem.record() == {
        "messages": [
            {"role": "user", "content": "Add: 1 + 2"},
            {"role": "assistant", "reasoning_content": "1 + 2\n= 3", "content": "3"},
        ]
    }
