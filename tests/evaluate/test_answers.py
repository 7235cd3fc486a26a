"""Answers of members: asked, stopped, read and scored. Members here are rules."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.chatml import CHATML, TURNS, chat_tokenizer
from helpers.runs import small_settings
from torch import Tensor
from transformers import AutoTokenizer

from elastic.config import ConfigError, EvaluateConfig
from elastic.config.tasks import FAMILIES
from elastic.data.arithmetic import Problem, problems, solve, split_of
from elastic.evaluate.answers import (
    Answers,
    Score,
    answer,
    as_json,
    check_chat,
    final_answer,
    held_out,
    mean_and_error,
    prompt,
    scores,
    table,
)
from elastic.evaluate.family import evaluate
from elastic.evaluate.writing import Writer
from elastic.training.launch import launch

TOKENIZER = chat_tokenizer()

PROBLEMS = list(problems(0, FAMILIES, (1, 2), 40, "held_out"))


def settings(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig(run_dir="a", tasks=["arithmetic"], **changes)


def follows(rule: Callable[[str], str]) -> Writer:
    """A member that reads the question and writes what the rule says, with a tail behind its end
    of turn."""

    def write(prompts: Tensor, most: int) -> Tensor:
        rows = []
        for row in prompts.tolist():
            text = str(TOKENIZER.decode(row))
            assert text.startswith("<|im_start|>user\n")
            assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
            question = text.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
            ids = TOKENIZER(rule(question), split_special_tokens=False).input_ids
            rows.append((ids + [5] * most)[:most])
        return torch.tensor(rows)

    return write


def knows(question: str) -> str:
    return f"so\n</think>\n{solve(question)}<|im_end|>\n"


def adds_only(question: str) -> str:
    return knows(question) if question.startswith("Add") else "so\n</think>\n?<|im_end|>"


def made(rule: Callable[[str], str], answer_tokens: int = 80) -> Answers:
    return answer(follows(rule), TOKENIZER, PROBLEMS, answer_tokens)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("1 + 2\n</think>\n3", "3"),
        ("1 + 2\n</think>\n 3 \n", "3"),
        ("a</think>b</think>c", "c"),
        ("</think>", ""),
        ("1 + 2\n3", None),
        ("", None),
    ],
)
def test_the_answer_stands_behind_the_last_thought(written: str, expected: str | None) -> None:
    assert final_answer(written) == expected


def test_a_prompt_has_the_marks_of_turns_as_tokens() -> None:
    tokens = prompt(TOKENIZER, "Add: 1 + 2")
    marks = [TOKENIZER.convert_tokens_to_ids(turn) for turn in TURNS]
    assert [token for token in tokens if token in marks] == [marks[0], marks[1], marks[0]]
    assert str(TOKENIZER.decode(tokens)).endswith("<|im_start|>assistant\n<think>\n")


def test_a_member_that_knows_all_is_all_right() -> None:
    found = made(knows)
    assert found.right.all() and found.finished.all()
    assert found.tokens.max() < 80  # what stands behind the end of turn is not counted


@pytest.mark.parametrize(
    "rule",
    [
        lambda question: f"so\n</think>\n{solve(question)} .<|im_end|>",  # not to the letter
        lambda question: f"{solve(question)}<|im_end|>",  # still thinking
        lambda question: f"{solve(question)}\n</think>\n<|im_end|>",
    ],
)
def test_what_is_not_the_answer_to_the_letter_is_wrong(rule: Callable[[str], str]) -> None:
    found = made(rule)
    assert not found.right.any() and found.finished.all()


def test_an_answer_that_does_not_end_is_wrong() -> None:
    """Though what there is of it is right."""
    found = made(lambda question: f"so\n</think>\n{solve(question)}")
    assert not found.right.any() and not found.finished.any()
    assert (found.tokens == 80).all()
    assert not made(knows, answer_tokens=4).right.any()


def test_scores_are_shares_by_family_and_difficulty_with_paired_distances() -> None:
    parent, member = made(knows), made(adds_only)
    cells = {
        (each.member, each.family, each.difficulty): each
        for each in scores(PROBLEMS, {"parent": parent, "small": member}, parent)
    }
    assert len(cells) == 2 * (len(FAMILIES) + 1) * 3
    assert cells["parent", "all", None].right == 1
    assert cells["parent", "sorting", 2].to_parent == 0
    assert cells["small", "addition", 1].right == 1 and cells["small", "sorting", 1].right == 0
    whole = cells["small", "all", None]
    assert (whole.problems, whole.right, whole.to_parent) == (40, 0.2, -0.8)
    expected = math.sqrt(0.2 * 0.8 / 39)
    assert whole.right_error == pytest.approx(expected)
    assert whole.to_parent_error == pytest.approx(expected)
    assert cells["small", "addition", None].problems == 8


def test_paired_distances_have_the_error_of_differences() -> None:
    """Two that are wrong on the same problems are the same, for certain."""
    right = np.array([1.0, 0.0, 1.0, 0.0])
    same = Answers(right, right, right)
    asked = [Problem("addition", 1, str(i), "", "") for i in range(4)]
    for each in scores(asked, {"parent": same, "twin": same}, same):
        assert each.right_error > 0 and each.to_parent_error == 0


def test_the_error_of_one_problem_is_unknown() -> None:
    mean, error = mean_and_error(np.array([1.0]))
    assert mean == 1 and math.isnan(error)
    score = Score("parent", "addition", 1, 1, mean, error, 0.0, error, 1.0, 9.0)
    written = as_json(settings(), [score])["scores"][0]
    assert written["right_error"] is None and written["right"] == 1
    json.dumps(written, allow_nan=False)


def test_the_table_has_a_row_per_member_and_family() -> None:
    parent, member = made(knows), made(adds_only)
    lines = table(scores(PROBLEMS, {"parent": parent, "small": member}, parent)).splitlines()
    assert len(lines) == 1 + 2 * (len(FAMILIES) + 1)
    assert lines[0].split("  ")[0] == "right answers"
    assert "100% +- 0%" in lines[1]
    assert lines[-1].startswith("small") and lines[-1].endswith("-80.0% +- 6.4%")


def test_problems_are_held_out_and_as_many_as_there_are() -> None:
    asked = held_out(settings(problems=200, difficulties=[1]))
    counts = {family: sum(each.family == family for each in asked) for family in FAMILIES}
    assert counts["addition"] == counts["comparison"] == 200
    assert counts["sorting"] < 200  # there are no more
    assert all(split_of(each.question) == "held_out" for each in asked)
    assert asked[:200] == held_out(settings(problems=200, difficulties=[1, 4]))[:200]


def test_a_tokenizer_that_cannot_chat_is_refused_in_one_line() -> None:
    check_chat(chat_tokenizer(), "there")
    without = chat_tokenizer()
    without.chat_template = None
    with pytest.raises(ConfigError, match="^tasks=.*in there has no chat template; must be"):
        check_chat(without, "there")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a step per stage, which knows no turns; tests must not change it."""
    directory = tmp_path_factory.mktemp("runs") / "short"
    launch(small_settings(directory, steps=(1, 1, 1)))
    return directory


def measure(run_dir: Path, output: Path) -> dict[str, Any]:
    return evaluate(
        EvaluateConfig(
            run_dir=str(run_dir),
            sequences=2,
            sequence_length=32,
            tasks=["arithmetic"],
            problems=2,
            difficulties=[1],
            answer_tokens=3,
            output=str(output / "family.json"),
        )
    )


def test_a_run_on_plain_text_is_refused_before_anything_is_measured(
    run_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no chat template") as caught:
        measure(run_dir, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "family.json").exists()


def test_evaluate_lets_the_parent_and_every_member_answer(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run's own tokenizer with two of its tokens as marks of turns: no embedding is added."""

    def chatting(path: Path, *_: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = CHATML
        vocabulary = tokenizer.get_vocab()
        tokenizer.get_vocab = lambda: vocabulary | {"<|im_end|>": 3}
        return tokenizer

    monkeypatch.setattr("elastic.evaluate.family.load_tokenizer", chatting)
    found = measure(run_dir, tmp_path)
    written = json.loads((tmp_path / "family.json").read_text())
    assert written == found
    rows = written["tasks"]["arithmetic"]["scores"]
    assert written["tasks"]["arithmetic"]["answer_tokens"] == 3
    assert list(dict.fromkeys(row["member"] for row in rows)) == [
        "parent",
        "full",
        "medium",
        "small",
    ]
    assert all(row["right"] == 0 for row in rows)  # three tokens are too few for any answer
    assert all(0 < row["tokens"] <= 3 for row in rows)
    captured = capsys.readouterr()
    assert "right answers" in captured.out and "answers: 100%" in captured.err
