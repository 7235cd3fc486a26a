"""The messages of all data sets have one form, and what has none is named."""

import json
from typing import Any

import pytest
from helpers.chats import CALL, TOOLS, assistant, user

from elastic.data.bad import BadRecord
from elastic.data.messages import messages_of, tools_of

BAD: list[tuple[str, Any]] = [
    ("wrong_type", None),
    ("wrong_type", {"role": "user"}),
    ("wrong_type", "Hello"),
    ("wrong_type", ["Hello"]),
    ("wrong_type", [user("a"), assistant(5)]),  # type: ignore[arg-type]
    ("wrong_type", [user("a"), assistant({"text": "b"})]),  # type: ignore[arg-type]
    ("wrong_type", [user("a"), assistant([{"type": "image", "url": "b"}])]),  # type: ignore[arg-type]
    ("wrong_type", [user("a"), assistant([{"type": "text"}])]),  # type: ignore[arg-type]
    ("wrong_type", [user("a"), assistant(["b"])]),  # type: ignore[arg-type]
    ("wrong_type", [user("a"), assistant("b", ["c"])]),  # type: ignore[arg-type]
    ("missing_field", [{"content": "a"}]),
    ("missing_field", [{"role": "user"}, assistant("b")]),
    ("missing_field", [user("a"), assistant(None)]),
    ("missing_field", [user("a"), assistant(None, " \n")]),
    ("unknown_role", [{"role": "narrator", "content": "a"}]),
    ("unknown_role", [{"role": ["user"], "content": "a"}]),
    ("consecutive_user", [user("a"), user("b"), assistant("c")]),
    ("no_assistant", [user("a")]),
    ("empty", []),
    ("empty", [user("a"), assistant("")]),
    *(
        ("bad_tool_call", [user("a"), assistant("b", tool_calls=calls)])
        for calls in (
            {"name": "f"},
            "[{",
            5,
            ["f"],
            [{"function": "f"}],
            [{"function": {"arguments": {}}}],
            [{"function": {"name": "", "arguments": {}}}],
            [{"function": {"name": "f", "arguments": "{"}}],
            [{"function": {"name": "f", "arguments": "[1]"}}],
            [{"function": {"name": "f", "arguments": '{"a": NaN}'}}],
            [{"function": {"name": "f", "arguments": [1]}}],
            [{"function": {"name": "f", "arguments": "[" * 5000}}],
        )
    ),
    ("bad_tool_call", [{**user("a"), "tool_calls": [CALL]}, assistant("b")]),
]


@pytest.mark.parametrize(("kind", "messages"), BAD)
def test_messages_that_are_wrong_are_named(kind: str, messages: Any) -> None:
    with pytest.raises(BadRecord) as caught:
        messages_of(messages)
    assert caught.value.kind == kind and "\n" not in str(caught.value)


def test_messages_come_in_one_form() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "ö", "n": 1}}}
    expected = [
        user("ab"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "c", "name": "look"},
        {"role": "assistant", "content": "d", "reasoning_content": " e"},
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    arguments = {"at": "ö", "n": 1}
    for calls in ([CALL], json.dumps([CALL]), [{"name": "look", "arguments": arguments}]):
        messages = [
            {"role": "user", "content": parts, "tool_calls": [], "reasoning_content": 5, "x": 1},
            assistant(None, " \n ", tool_calls=calls, name="x"),
            {"role": "tool", "content": "c", "name": "look", "tool_call_id": None},
            assistant("d", " e", tool_calls=None),
        ]
        assert messages_of(messages) == messages_of(json.dumps(messages)) == expected


def test_tools_are_objects_or_none() -> None:
    for none in (None, "", [], "[]"):
        assert tools_of(none) is None
    for some in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        assert tools_of(some) == TOOLS
    for wrong in (5, "tools", {}, [5], ["a"]):
        with pytest.raises(BadRecord, match="wrong_type"):
            tools_of(wrong)
