"""Chat templates: programs of others, rendered in the sandbox of transformers, and what they do.

A template is known by what it makes of small conversations: whether it shows reasoning, and
forgets that of earlier turns; how a turn ends; whether its marks of what the assistant says are
where they must be.
"""

import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from elastic.config import ConfigError
from elastic.config.checks import visible
from elastic.data.bad import BadRecord
from elastic.data.encode import ControlTokens, control_tokens

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
"""Characters of a rendering: the first, and one after the last."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the constants that it may use."""

    source: str
    """Jinja."""
    constants: Mapping[str, Any]
    """`bos_token` and the like."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, source: str) -> "ChatTemplate":
        return cls(source, dict(tokenizer.special_tokens_map))

    @property
    def marked(self) -> bool:
        """Whether it marks what the assistant says, by `{% generation %}`."""
        return _MARK.search(self.source) is not None

    def render(
        self, messages: Messages, tools: Tools = None, prompt: bool = False, **more: Any
    ) -> str:
        """A conversation as text; with `prompt`, and the start of the assistant's next turn.

        Raises:
            BadRecord: `template`: it fails, or refuses this.
        """
        return self._rendered(messages, tools, prompt, False, more)[0]

    def render_marked(self, messages: Messages, tools: Tools = None) -> tuple[str, list[Span]]:
        """A conversation as text, and what is marked of it; as `render`."""
        return self._rendered(messages, tools, False, True, {})

    def _rendered(
        self, messages: Messages, tools: Tools, prompt: bool, marks: bool, more: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        try:
            render: Any = render_jinja_template  # its types say that it gives one text
            texts, spans = render(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **{**self.constants, **more},
            )
        except Exception as error:  # it is a program, and may do anything wrong
            said = " ".join(str(error).split())
            raise BadRecord("template", said[:300] or type(error).__name__) from error
        return texts[0], spans[0] if marks else []


_SPELLED = re.compile(r"<\|[\w-]+\|>")


def spelled_tokens(template: str) -> list[str]:
    """The control tokens that a template writes, for a tokenizer that is made for it."""
    return list(dict.fromkeys(_SPELLED.findall(template)))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str | None = None) -> dict[str, Any]:
    more = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": text, **more}


ASK, WHY, ANSWER = "What is a zebu?", "Zebus have humps.", "A humped ox."
"""Of conversations to try templates with: what is in no template."""


_CALL = {"type": "function", "function": {"name": "look_up_zebu", "arguments": {"name": "zebu"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up_zebu",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


def inline(text: str, reasoning: str) -> str:
    """Reasoning within the content, for a template that knows no field for it."""
    return f"<think>\n{reasoning}\n</think>\n\n{text}"


class Nature:
    """What a template does, found out by rendering."""

    def __init__(self, template: ChatTemplate, control: ControlTokens, eos: str | None) -> None:
        self._template, self._control, self._eos = template, control, eos

    @cached_property
    def reasoning(self) -> str | None:
        """Where reasoning must be to be shown: in its `field`, `inline` in the content, or
        None: nowhere."""
        ways = {
            "field": assistant(ANSWER, WHY),
            "inline": assistant(inline(ANSWER, WHY)),
        }
        for way, answer in ways.items():
            if WHY in self._template.render([user(ASK), answer]):
                return way
        return None

    @cached_property
    def forgets(self) -> bool:
        """Whether it leaves out the reasoning of turns before the last."""
        if self.reasoning is None:
            return False
        first = assistant(ANSWER, WHY)
        if self.reasoning == "inline":
            first = assistant(inline(ANSWER, WHY))
        turns = [user(ASK), first, user("Has it horns?"), assistant("Yes.")]
        return WHY not in self._template.render(turns)

    @cached_property
    def shows_calls(self) -> bool:
        """Whether it shows calls of tools; one that refuses this one may show others."""
        turns = [user(ASK), {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
        return self._tries(turns, None)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether it shows the tools that may be called."""
        return self._tries([user(ASK), assistant(ANSWER)], [_TOOL])

    def _tries(self, messages: Messages, tools: Tools) -> bool:
        try:
            return "look_up_zebu" in self._template.render(messages, tools)
        except BadRecord:
            return True

    @cached_property
    def header(self) -> str:
        """What starts a turn of the assistant, whatever it says, and its prompt."""
        before = self._template.render([user(ASK)])
        turns = [
            self._template.render([user(ASK)], prompt=True),
            self._template.render([user(ASK), assistant(ANSWER)]),
            self._template.render([user(ASK), assistant(WHY)]),
        ]
        if not all(turn.startswith(before) for turn in turns):
            return ""
        return os.path.commonprefix(turns)[len(before) :]

    @cached_property
    def end(self) -> str | None:
        """The control token that ends the assistant's turn, if one does."""
        text = self._template.render([user(ASK), assistant(ANSWER)])
        place = text.rfind(ANSWER) + len(ANSWER)
        match = self._control.written(text, place)
        return match[0] if match and not text[place : match.start()].strip() else None

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """What ends a turn or a document."""
        ends = [re.escape(end) for end in (self.end, self._eos) if end]
        return re.compile("|".join(ends) or "(?!)")

    @cached_property
    def closing(self) -> re.Pattern[str]:
        """The first of `ends` (group 1) after which there are only blanks."""
        return re.compile(rf"({self.ends.pattern})\s*\Z")

    @cached_property
    def follows(self) -> re.Pattern[str]:
        """One of `ends`, maybe after blanks."""
        return re.compile(rf"\s*(?:{self.ends.pattern})")

    def check(self) -> None:
        """Raise `BadRecord` when no answer can be learnt from what it renders."""
        turns = [user(ASK), assistant(ANSWER)]
        text = self._template.render(turns)
        for said in (ASK, ANSWER):
            if text.count(said) != 1:
                raise BadRecord("template", f"a message is shown {text.count(said)} times")
        if self._template.marked:
            text, spans = self._template.render_marked(turns)
            said = "".join(text[start:end] for start, end in spans)
            if ANSWER not in said or ASK in said:
                raise BadRecord("template", f"it marks {said!r} as what the assistant says")
        if self.end is None and self._eos is None:
            raise BadRecord("template", "nothing ends a turn, and the tokenizer has no end-of-text")


def check_template(
    tokenizer: PreTrainedTokenizerBase, template: str, setting: str = "chat template"
) -> Nature:
    """What a template does, if it can be used.

    Raises:
        ConfigError: it cannot; names `setting`.
    """
    try:
        eos = tokenizer.eos_token
        nature = Nature(ChatTemplate.of(tokenizer, template), control_tokens(tokenizer), eos)
        nature.check()
        assert nature.forgets in (True, False)  # renders what it must, too
        return nature
    except BadRecord as bad:
        raise ConfigError(
            f"{setting}: cannot be used ({bad.reason}); must be a Jinja chat template that shows "
            "what user and assistant say"
        ) from bad


_REASONED = [user(ASK), assistant(ANSWER, WHY)]

PROBES: dict[str, tuple[Messages, Tools, bool]] = {
    "reasoning": (_REASONED, None, False),
    "an answer without reasoning": ([user(ASK), assistant(ANSWER)], None, False),
    "the start of an answer": ([user(ASK)], None, True),
    "a second turn": (
        [*_REASONED, user("Has it horns?"), assistant("Yes.", "It has horns.")],
        None,
        False,
    ),
    "a system message": (
        [{"role": "system", "content": "Be short."}, user(ASK), assistant(ANSWER)],
        None,
        False,
    ),
    "a call of a tool": (
        [
            user(ASK),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "An ox."},
            assistant(ANSWER),
        ],
        [_TOOL],
        False,
    ),
}
"""Conversations in which templates differ: messages, tools, and whether a prompt follows."""


def disagreement(template: str, teacher_template: str) -> str | None:
    """Where the data's template and the teacher's own differ, the first of `PROBES`: one phrase
    with both spellings, or None. A teacher sees text in a form that it was not trained on, then.
    """
    constants = {name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    for what, (messages, tools, prompt) in PROBES.items():
        shown: list[str | BadRecord] = []
        for source in (template, teacher_template):
            try:
                shown.append(ChatTemplate(source, constants).render(messages, tools, prompt))
            except BadRecord as bad:
                shown.append(bad)
        ours, theirs = shown
        if isinstance(ours, str) and isinstance(theirs, str):
            if ours != theirs:
                first, second = _around(ours, theirs)
                return f"{what} is {first!r} in the data's template and {second!r} in the teacher's"
        elif isinstance(theirs, BadRecord) and isinstance(ours, str):
            return f"{what} is refused by the teacher's template ({visible(theirs.reason)})"
        elif isinstance(ours, BadRecord) and isinstance(theirs, str):
            return f"{what} is refused by the data's template ({visible(ours.reason)})"
    return None


def _around(one: str, other: str, context: int = 12, most: int = 60) -> tuple[str, str]:
    """Where two texts differ first, and a little before it."""
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    tail = 0
    while tail < min(len(one), len(other)) - shared and one[-1 - tail] == other[-1 - tail]:
        tail += 1
    start = max(0, shared - context)
    shown = (text[start : len(text) - max(0, tail - context)] for text in (one, other))
    first, second = (text if len(text) <= most else text[:most] + "..." for text in shown)
    return first, second
