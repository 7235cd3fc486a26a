"""A chat with anything wrong in it is named, and the others of its batch are kept."""

import json
import random
from typing import Any

import pytest
from helpers.chats import CONTROL, FORGETS, KEEPS, TOOLED, TOOLS, TWO, assistant, made, user
from transformers import PreTrainedTokenizerFast

from elastic.data.bad import BadRecord
from elastic.data.chat import ChatEncoder, messages_of, tools_of


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return made(*CONTROL, split=True)


def calling(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [user("a"), assistant("b", tool_calls=[{"name": "f", "arguments": arguments}])]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("wrong_type", [user("\U000130001"), assistant("b")]),
        ("wrong_type", [user("\ufdd0\U000f0000"), assistant("b")]),
        ("not_utf8", json.dumps([user("\ud800"), assistant("b")])),
        ("wrong_type", calling(nested(5000))),
        ("wrong_type", calling(nested(65))),
    ],
)
def test_what_cannot_be_encoded_is_named_and_spoils_no_batch(
    plain: PreTrainedTokenizerFast, kind: str, messages: Any
) -> None:
    encoder = ChatEncoder(plain, KEEPS, "keep", "assistant")
    good, bad = encoder.encode_batch([(messages_of(TWO), None), (messages_of(messages), None)])
    assert isinstance(good, list) and isinstance(bad, BadRecord)
    assert bad.kind == kind and "\n" not in str(bad)


def broken(rng: random.Random, value: Any) -> Any:
    """A value with something done to it, somewhere."""
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], broken(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        return {**value, name: broken(rng, value[name])}
    odd = (None, 5, True, "", " ", "user", "[", "{}", "<|im_end|>", "\ud800", [], {}, [None], [[]])
    return rng.choice([*odd, nested(2000)])


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_broken_chats_are_named_and_good_ones_are_kept(
    plain: PreTrainedTokenizerFast, count: int
) -> None:
    rng = random.Random(0)
    encoder = ChatEncoder(plain, FORGETS, "keep", "assistant")
    good = encoder.encode(messages_of(TWO))
    ready, bad = [], 0
    for _ in range(count):
        messages, tools = broken(rng, [TWO, TOOLED][rng.randrange(2)]), TOOLS
        if rng.random() < 0.3:
            tools = broken(rng, TOOLS)
        try:
            ready.append((messages_of(messages), tools_of(tools)))
        except BadRecord as error:
            assert "\n" not in str(error)
            bad += 1
        ready.append((messages_of(TWO), None))
    found = encoder.encode_batch(ready)
    assert len(found) == len(ready) and bad > count / 4
    for chat, documents in zip(ready, found, strict=True):
        if isinstance(documents, BadRecord):
            assert chat[0] != messages_of(TWO) or chat[1] is not None
        elif chat == (messages_of(TWO), None):
            assert [d.ids.tolist() for d in documents] == [d.ids.tolist() for d in good]
