"""What is wrong with one record. The run goes on without it, and counts it by kind."""

from elastic.config.checks import visible

KINDS = {
    "not_json": "the line is not JSON",
    "not_utf8": "the bytes, or what their escapes spell, are not Unicode text",
    "not_object": "the line is JSON, but no object",
    "missing_field": "a field that is needed is absent or null",
    "wrong_type": "a field holds something else than it must",
    "empty": "there is no text",
    "too_long": "there are more characters than are allowed",
    "unknown_role": "a message is by nobody that a chat has",
    "consecutive_user": "two user's turns follow each other",
    "no_assistant": "no turn is the assistant's",
    "bad_tool_call": "a call of a tool has no name, or arguments that are no object",
    "template": "the chat template refuses the messages, or leaves out what it must show",
    "token_outside": "a token is none of the parent's vocabulary, or a control token made of text",
}
"""Every kind of bad record, and what it says. A closed set: reports and metrics are by kind."""


class BadRecord(ValueError):
    """A record that cannot be used. The message is one line, and says nothing of the place, which
    only the caller knows."""

    def __init__(self, kind: str, reason: str) -> None:
        assert kind in KINDS, kind
        self.kind = kind
        """One of `KINDS`."""
        self.reason = visible(reason)
        """What is wrong with this one: a phrase."""
        super().__init__(kind, self.reason)  # both, so that it survives a pickle

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


NAMES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    bytes: "bytes",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""What JSON and Arrow call a value of these types."""


def named(value: object) -> str:
    """What a value is, in words: "a list"."""
    return NAMES.get(type(value), f"a {type(value).__name__}")


def check_unicode(text: str) -> None:
    r"""JSON may spell "\ud800", half of a pair, which is no character; no tokenizer takes it.

    Raises:
        BadRecord: `not_utf8`.
    """
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("not_utf8", "half a surrogate pair is escaped in it") from error
