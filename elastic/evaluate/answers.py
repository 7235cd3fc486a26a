"""Problems that a member has never seen, answered: the share of exactly right answers by family and
difficulty, and how far it is from the parent's on the same problems."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError, EvaluateConfig
from elastic.config.tasks import FAMILIES
from elastic.console import Bar
from elastic.console import table as console_table
from elastic.data.arithmetic import Problem, problems
from elastic.evaluate.writing import Writer, greedy_writer, write_all

END_OF_TURN = "<|im_end|>"

END_OF_THOUGHT = "</think>"

ALL = "all"
"""Of families: the row over all of them."""


@dataclass(frozen=True)
class Score:
    """One member's answers to one family's problems of one difficulty."""

    member: str
    family: str
    difficulty: int | None
    """None is all of them."""
    problems: int
    right: float
    """Share of exactly right answers."""
    right_error: float
    """Its standard error over problems."""
    to_parent: float
    """Share minus the parent's, on the same problems."""
    to_parent_error: float
    """Its standard error, paired."""
    finished: float
    """Share that came to the end of the turn within `answer_tokens`."""
    tokens: float
    """Written per answer."""


@dataclass(frozen=True)
class Answers:
    """What one member made of all problems, in their order; (problems,) each."""

    right: np.ndarray
    finished: np.ndarray
    tokens: np.ndarray


def held_out(config: EvaluateConfig) -> list[Problem]:
    """The problems of a task: the same for every member, every run and every day."""
    return [
        problem
        for family in FAMILIES
        for difficulty in config.difficulties
        for problem in problems(0, (family,), (difficulty,), config.problems, "held_out")
    ]


def prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The user's turn, and the beginning of the assistant's."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids
    return [int(token) for token in ids]


def check_chat(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise ConfigError, naming what the tokenizer in `where` lacks for a conversation."""
    if tokenizer.chat_template is None:
        lacks = "no chat template"
    elif END_OF_TURN not in tokenizer.get_vocab():
        lacks = f"no token {END_OF_TURN}, which ends a turn"
    else:
        return
    raise ConfigError(
        f"tasks=[arithmetic]: the tokenizer in {where} has {lacks}; must be that of a run on "
        "conversations, such as experiment=tiny_reasoning"
    )


def ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer."""
    found = {tokenizer.get_vocab()[END_OF_TURN], tokenizer.eos_token_id}
    return {token for token in found if token is not None}


def final_answer(written: str) -> str | None:
    """What stands behind the last thought; None where it never ended."""
    _, found, answer = written.rpartition(END_OF_THOUGHT)
    return answer.strip() if found else None


def answer(
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Problem],
    answer_tokens: int,
    done: Callable[[int], object] = lambda count: None,
) -> Answers:
    """Let a member answer; right is what is the answer to the letter, and ended."""
    last = ends(tokenizer)
    prompts = [prompt(tokenizer, each.question) for each in asked]
    right, finished, lengths = [], [], []
    for problem, tokens in zip(
        asked, write_all(writer, prompts, last, answer_tokens, done), strict=True
    ):
        ended = bool(tokens) and tokens[-1] in last
        text = str(tokenizer.decode(tokens[:-1] if ended else tokens))
        finished.append(ended)
        right.append(ended and final_answer(text) == problem.answer)
        lengths.append(len(tokens))
    return Answers(np.array(right, float), np.array(finished, float), np.array(lengths, float))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Of independent values; the error of a single one is unknown, and nan."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def scores(
    asked: Sequence[Problem], members: Mapping[str, Answers], parent: Answers
) -> list[Score]:
    """Every member, by family and difficulty, then over all difficulties, then over all."""
    places: dict[tuple[str, int | None], list[int]] = {}
    for index, problem in enumerate(asked):
        for cell in (
            (problem.family, problem.difficulty),
            (problem.family, None),
            (ALL, problem.difficulty),
            (ALL, None),
        ):
            places.setdefault(cell, []).append(index)
    cells = sorted(places, key=lambda cell: (cell[0] == ALL, cell[1] is None))  # as they came
    return [
        Score(
            member,
            *cell,
            len(at),
            *mean_and_error(answers.right[at]),
            *mean_and_error(answers.right[at] - parent.right[at]),
            float(answers.finished[at].mean()),
            float(answers.tokens[at].mean()),
        )
        for member, answers in members.items()
        for cell in cells
        for at in (places[cell],)
    ]


def arithmetic(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    models: Mapping[str, Callable[[], Any]],
) -> list[Score]:
    """Let all members answer; the first of `models` is the parent. Each is opened when its turn
    comes, and let go afterwards."""
    asked, found = held_out(config), dict[str, Answers]()
    last = ends(tokenizer)
    with Bar(total=len(asked) * len(models), desc="answers", unit="problems") as bar:
        for member, opened in models.items():
            bar.set_postfix_str(member)
            writer = greedy_writer(opened(), last)
            found[member] = answer(writer, tokenizer, asked, config.answer_tokens, bar.update)
    return scores(asked, found, next(iter(found.values())))


def table(found: Sequence[Score]) -> str:
    """Shares of right answers; a row per member and family, a column per difficulty."""
    difficulties = sorted({each.difficulty for each in found if each.difficulty is not None})
    header = ["right answers", "family", *map(str, difficulties), ALL, "to parent"]
    cells = {(each.member, each.family, each.difficulty): each for each in found}
    lines = []
    for member, family in dict.fromkeys((each.member, each.family) for each in found):
        shares = [
            f"{each.right:.0%} +- {each.right_error:.0%}"
            for each in (cells[member, family, column] for column in (*difficulties, None))
        ]
        whole = cells[member, family, None]
        distance = f"{whole.to_parent:+.1%} +- {whole.to_parent_error:.1%}"
        first = member == found[0].member
        lines.append([member, family, *shares, "" if first else distance])
    return "\n".join(console_table(header, lines))


def as_json(config: EvaluateConfig, found: Sequence[Score]) -> dict[str, Any]:
    """What goes into the JSON of a family; an error that is unknown is null there."""
    rows = [
        {key: None if value != value else value for key, value in asdict(each).items()}
        for each in found
    ]
    return {"answer_tokens": config.answer_tokens, "scores": rows}
