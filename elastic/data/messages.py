"""The messages of a chat as data sets write them, in the one form that templates read."""

import re
from typing import Any

from elastic.data.bad import BadRecord, named
from elastic.data.readers import parsed

ROLES = ("system", "developer", "user", "assistant", "tool")

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def messages_of(value: Any) -> list[dict[str, Any]]:
    """The messages of a record, each `role`, `content` (text) and, of the assistant, maybe
    `reasoning_content` (text) and `tool_calls`, whose arguments are objects; of a tool, maybe
    `name` and `tool_call_id`. All else that a message has is left out.

    Taken are a list, or JSON of one; content that is text, parts that are text, or null where
    there is reasoning or a call; reasoning that is blank, which is none; calls that are JSON, or
    have arguments that are.

    Raises:
        BadRecord: it is no such list; `unknown_role`, `consecutive_user`, `no_assistant`, `empty`
            where the assistant says nothing at all, `bad_tool_call`, `missing_field`, `wrong_type`.
    """
    value = _list(value, "the messages are")
    messages = [_message(each) for each in value]
    if not messages:
        raise BadRecord("empty", "there are no messages")
    for before, after in zip(messages, messages[1:], strict=False):
        if before["role"] == after["role"] == "user":
            raise BadRecord("consecutive_user", "a user's turn follows a user's turn")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no_assistant", "no turn is the assistant's")
    if not any(a["content"] or "reasoning_content" in a or "tool_calls" in a for a in answers):
        raise BadRecord("empty", "the assistant says nothing")
    return messages


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a chat may call: a list of objects, JSON of one, or null; None where there
    are none.

    Raises:
        BadRecord: `wrong_type`: it is something else.
    """
    if value is None or value == "":
        return None
    tools = [_json(tool) for tool in _list(value, "the tools are")]
    for tool in tools:
        if not isinstance(tool, dict):
            raise BadRecord("wrong_type", f"a tool is {named(tool)}, no object")
    return tools or None


def thought(message: dict[str, Any]) -> tuple[str | None, str]:
    """Reasoning and answer of a message of the assistant. Reasoning that has no field of its own
    may start the content, in `<think>`; blanks around it are none of either."""
    content: str = message["content"]
    reasoning: str | None = message.get("reasoning_content")
    if reasoning is None and (match := _THOUGHT.match(content)):
        return match[1].strip() or None, content[match.end() :]
    return reasoning, content


def _json(value: Any) -> Any:
    """The value of JSON, where there is any in a text; else the same."""
    try:
        return parsed(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _list(value: Any, what: str) -> list[Any]:
    found = _json(value)
    if not isinstance(found, list):
        raise BadRecord("wrong_type", f"{what} {named(found)}, no list")
    return found


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord("wrong_type", f"a message is {named(value)}, no object")
    role = value.get("role")
    if role is None:
        raise BadRecord("missing_field", "a message has no role")
    if role not in ROLES:
        said = repr(role[:80]) if isinstance(role, str) else named(role)
        raise BadRecord("unknown_role", f"a message is by {said}")
    message: dict[str, Any] = {"role": role, "content": ""}
    if role == "assistant":
        reasoning = value.get("reasoning_content")
        if not isinstance(reasoning, str | None):
            raise BadRecord("wrong_type", f"reasoning_content is {named(reasoning)}, no text")
        if reasoning is not None and reasoning.strip():
            message["reasoning_content"] = reasoning
    calls = _calls(value.get("tool_calls"))
    if calls and role != "assistant":
        raise BadRecord("bad_tool_call", f"the {role} calls a tool")
    if calls:
        message["tool_calls"] = calls
    content = value.get("content")
    if content is not None:
        message["content"] = _content(content)
    elif "reasoning_content" not in message and not calls:
        raise BadRecord("missing_field", f"the {role} has a message without content")
    if role == "tool":
        names = ("name", "tool_call_id")
        message |= {name: value[name] for name in names if isinstance(value.get(name), str)}
    return message


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRecord("wrong_type", f"the content of a message is {named(value)}, no text")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else None
            said = f"of type {kind[:80]!r}" if isinstance(kind, str) else named(part)
            raise BadRecord("wrong_type", f"a part of a message is {said}, no text")
        if not isinstance(part.get("text"), str):
            raise BadRecord("wrong_type", f"a part's text is {named(part.get('text'))}, no text")
    return "".join(part["text"] for part in value)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls of tools in the form of most templates: {type, function: {name, arguments}}."""
    calls = [] if value is None or value == "" else _json(value)
    if not isinstance(calls, list):
        raise BadRecord("bad_tool_call", f"tool_calls is {named(calls)}, no list")
    return [_call(_json(call)) for call in calls]


def _call(value: Any) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(function, dict):
        raise BadRecord("bad_tool_call", f"a call is {named(function)}, no object")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRecord("bad_tool_call", "a call names no tool")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parsed(arguments) if arguments.strip() else None
        except ValueError as error:
            said = f"the arguments of a call are not JSON ({error})"
            raise BadRecord("bad_tool_call", said) from error
    if not isinstance(arguments, dict | None):
        said = f"the arguments of a call are {named(arguments)}, no object"
        raise BadRecord("bad_tool_call", said)
    call = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})
