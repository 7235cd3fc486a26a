"""The chat template of this package: ChatML, thoughts first, marked where the assistant writes."""

from typing import Any

import pytest
from helpers.chatml import chat_tokenizer

from elastic.data.arithmetic import Problem

TOKENIZER = chat_tokenizer()

ASK = {"role": "user", "content": "Add: 1 + 2"}


def reply(content: str, thought: Any = None) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content}
    return turn if thought is None else turn | {"reasoning_content": thought}


def rendered(messages: list[dict[str, Any]], ask: bool = False) -> str:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert isinstance(text, str)
    return text


ASKED = "<|im_start|>user\nAdd: 1 + 2<|im_end|>\n"


def test_a_problem_is_two_turns_with_a_thought() -> None:
    record = Problem("addition", 1, "Add: 1 + 2", "1 + 2\n= 3", "3").record()
    assert rendered(record["messages"]) == (
        ASKED + "<|im_start|>assistant\n<think>\n1 + 2\n= 3\n</think>\n3<|im_end|>\n"
    )


def test_a_prompt_is_the_beginning_of_what_is_trained_on() -> None:
    """To the letter, or a model would be asked in another way than it was taught."""
    whole = rendered([ASK, reply("3", "1 + 2")])
    prompt = rendered([ASK], ask=True)
    assert prompt == ASKED + "<|im_start|>assistant\n<think>\n"
    assert whole.startswith(prompt)


@pytest.mark.parametrize("thought", [None, "", " \n"])
def test_no_thought_is_an_empty_one(thought: str | None) -> None:
    assert rendered([ASK, reply("3", thought)]) == (
        ASKED + "<|im_start|>assistant\n<think></think>3<|im_end|>\n"
    )


def test_a_system_turn_is_there_when_given_only() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert rendered([system, ASK]) == "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED


def test_turns_follow_each_other() -> None:
    two = [ASK, reply("3", "1 + 2"), ASK, reply("3")]
    assert rendered(two) == rendered(two[:2]) + rendered(two[2:])


def test_what_the_assistant_writes_is_marked_to_its_end_of_turn() -> None:
    messages = [ASK, reply("3", "1 + 2"), ASK, reply("4")]
    found = TOKENIZER.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"split_special_tokens": False},
    )
    ids, mask = found["input_ids"], found["assistant_masks"]
    marked = TOKENIZER.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
    assert marked == "<think>\n1 + 2\n</think>\n3<|im_end|><think></think>4<|im_end|>"
