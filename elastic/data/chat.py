"""Chats to token ids, and which of the tokens are targets.

A conversation is rendered by the template as one text, and that text is tokenised once: what the
assistant says is known as characters of it, and a token is a target when any of them is its own.
Pieces that are tokenised apart would be other tokens where merges cross their borders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from elastic.data.bad import BadRecord, check_unicode
from elastic.data.encode import control_tokens
from elastic.data.messages import messages_of, thought, tools_of
from elastic.data.template import ChatTemplate, Messages, Span, Tools, check_template, inline

__all__ = ["ChatEncoder", "Encoded", "LossOn", "Reasoning", "messages_of", "tools_of"]

Reasoning = Literal["keep", "strip", "last_turn"]
"""All of it, none, or that of the last turn alone."""

LossOn = Literal["all", "assistant"]
"""Every token is a target, or what the assistant says and the end of its turns."""


@dataclass(frozen=True)
class Encoded:
    """One document."""

    ids: np.ndarray
    """(tokens,) int64."""
    loss: np.ndarray
    """(tokens,) bool: whether the token is a target."""


@dataclass(frozen=True)
class _Rendering:
    """One document as text."""

    text: str
    """With control tokens by name."""
    spans: list[Span] | None
    """Characters of it that are targets; None: all."""
    ended: bool
    """Whether its last token is one that ends it; else end-of-text will."""
    answered: bool
    """Whether the assistant speaks last, so that such an end is a target too."""


class ChatEncoder:
    """Chats to documents, by one template.

    Args:
        template: Jinja.
        reasoning: what becomes of reasoning. A template may leave out that of earlier turns by
            itself; then `keep` makes one document for every turn of the user that is answered: all
            up to the answer, with this turn's reasoning.
        loss_on: which tokens are targets.

    Raises:
        ConfigError: the template or the tokenizer cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        reasoning: Reasoning = "keep",
        loss_on: LossOn = "all",
    ) -> None:
        assert reasoning in get_args(Reasoning) and loss_on in get_args(LossOn)
        self.reasoning, self.loss_on = reasoning, loss_on
        self._nature = check_template(tokenizer, template)
        self._template = ChatTemplate.of(tokenizer, template)
        self._control = control_tokens(tokenizer)
        self._end: int | None = tokenizer.eos_token_id

    def encode(self, messages: Messages, tools: Tools = None) -> list[Encoded]:
        """The documents of a conversation, of which there is one unless it is split.

        Args:
            messages: as `messages_of` gives them.
            tools: as `tools_of` gives them.

        Raises:
            BadRecord: `template`: it fails on this conversation, or does not show its reasoning.
        """
        (found,) = self.encode_batch([(messages, tools)])
        if isinstance(found, BadRecord):
            raise found
        return found

    def encode_batch(
        self, conversations: Sequence[tuple[Messages, Tools]]
    ) -> list[list[Encoded] | BadRecord]:
        """The documents of many conversations, in order, tokenised in one call; or what is wrong
        with one."""
        rendered: list[list[_Rendering] | BadRecord] = []
        for messages, tools in conversations:
            try:
                rendered.append(self._render(messages, tools))
            except BadRecord as bad:
                rendered.append(bad)
        all_of_them = [r for each in rendered if isinstance(each, list) for r in each]
        encoded = iter(self._encode(all_of_them))
        return [
            [next(encoded) for _ in each] if isinstance(each, list) else each for each in rendered
        ]

    def _encode(self, renderings: list[_Rendering]) -> list[Encoded]:
        found = []
        texts = [rendering.text for rendering in renderings]
        masked = self.loss_on == "assistant"
        encodings = self._control.encode(texts, control=True, offsets=masked)
        for rendering, encoding in zip(renderings, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            loss = np.full(len(ids), rendering.spans is None)
            for start, end in rendering.spans or ():
                loss[_touched(encoding, start, end)] = True
            if not rendering.ended:
                assert self._end is not None  # `_document`
                ids = np.append(ids, self._end)
                loss = np.append(loss, rendering.spans is None or rendering.answered)
            found.append(Encoded(ids, loss))
        return found

    def _render(self, messages: Messages, tools: Tools) -> list[_Rendering]:
        """The documents of a conversation as text, in which spelled control tokens are hidden."""
        if any("tool_calls" in message for message in messages) and not self._nature.shows_calls:
            raise BadRecord("template", "it leaves out calls of tools")
        if tools and not self._nature.shows_tools:
            raise BadRecord("template", "it leaves out the tools")
        turns = _turns(messages)
        last = turns[-1][0]
        shown: Messages = []
        kept: dict[int, str] = {}
        for index, message in enumerate(messages):
            new = {
                name: v if name == "role" else self._control.hide(v) for name, v in message.items()
            }
            if message["role"] == "assistant":
                reasoning, content = map(self._control.hide, thought(message))
                new.pop("reasoning_content", None)
                new["content"] = content
                wanted = self.reasoning == "keep" or self.reasoning == "last_turn" and index >= last
                if wanted and reasoning is not None:
                    kept[index] = reasoning.strip()
                    if self._nature.reasoning == "field":
                        new["reasoning_content"] = reasoning
                    else:
                        new["content"] = inline(content, reasoning)
            shown.append(new)
        tools = self._control.hide(tools)
        if self._nature.forgets and kept:
            if any(index < last for index in kept):
                return [self._document(shown[:end], tools, kept, start) for start, end in turns]
            shown = shown[: turns[-1][1]]  # or it would be forgotten for a question without answer
        return [self._document(shown, tools, kept, 0)]

    def _document(
        self, messages: Messages, tools: Tools, kept: dict[int, str], first: int
    ) -> _Rendering:
        """Some messages as one document, of which those from `first` on are its own."""
        spans: list[Span] | None = None
        if self.loss_on == "assistant" and self._template.marked:
            text, spans = self._template.render_marked(messages, tools)
        else:
            text = self._template.render(messages, tools)
        shown = [reasoning for i, reasoning in kept.items() if first <= i < len(messages)]
        if not all(reasoning in text for reasoning in shown):
            raise BadRecord("template", "it leaves out the reasoning of a turn")
        if spans is not None:
            spans = self._own(text, spans, messages, tools, first)
        elif self.loss_on == "assistant":
            spans = self._found(text, messages, tools, first)
        if spans == []:
            raise BadRecord("template", "it shows nothing that the assistant says")
        check_unicode(text)
        ended = self._nature.closing.search(text, max(0, len(text) - 256)) is not None
        if not ended and self._end is None:
            raise BadRecord("template", "nothing ends it, and the tokenizer has no end-of-text")
        revealed = self._control.reveal(text)
        if spans is not None:
            spans = [(revealed.place(start), revealed.place(end)) for start, end in spans]
        return _Rendering(revealed.text, spans, ended, messages[-1]["role"] == "assistant")

    def _own(
        self, text: str, spans: list[Span], messages: Messages, tools: Tools, first: int
    ) -> list[Span]:
        """Those that the template has marked after the message `first`, or all from 0 on."""
        before = self._template.render(messages[: first + 1], tools) if first else ""
        if not text.startswith(before):
            raise BadRecord("template", "it shows a turn in another way when more turns follow")
        return [self._to_end(text, span) for span in spans if span[0] >= len(before)]

    def _found(self, text: str, messages: Messages, tools: Tools, first: int) -> list[Span]:
        """What is between the start and the end of an answer, as shorter renderings show it."""
        spans = []
        for index in range(first, len(messages)):
            if messages[index]["role"] == "assistant":
                start = self._start(text, messages[:index], tools)
                stop = self._stop(text, start, messages, index, tools)
                spans.append(self._to_end(text, (start, stop)))
        return spans

    def _start(self, text: str, before: Messages, tools: Tools) -> int:
        """Where the answer to `before` starts: after all that is there before it is written, which
        may include the start of its reasoning, or that there is none."""
        for more in ({}, {"enable_thinking": False}):
            prompt = self._template.render(before, tools, prompt=True, **more)
            if text.startswith(prompt):
                return len(prompt)
        # a prompt may start reasoning, and the answer have none
        header = self._template.render(before, tools) + self._nature.header
        if text.startswith(header):
            return len(header)
        raise BadRecord("template", "what it shows before an answer is not what it shows with it")

    def _stop(self, text: str, start: int, messages: Messages, index: int, tools: Tools) -> int:
        """Where the answer `index` ends; a template that shows it in another way when more turns
        follow says so by the token that ends turns."""
        until = text
        if index + 1 < len(messages):
            until = self._template.render(messages[: index + 1], tools)
        if text.startswith(until) and len(until) > start:
            return len(until)
        ends = self._nature.ends.search(text, start)
        if ends is None:
            raise BadRecord("template", "it shows a turn in another way when more turns follow")
        return ends.end()

    def _to_end(self, text: str, span: Span) -> Span:
        """The same characters up to the token that ends the turn, and not beyond: the assistant
        does not say the line end after it."""
        start, end = span
        if inside := self._nature.closing.search(text, start, end):
            return start, inside.end(1)
        after = self._nature.follows.match(text, end)
        return start, after.end() if after else end


def _touched(encoding: Encoding, start: int, end: int) -> slice:
    """The tokens that have one of the characters from `start` to before `end`. As offsets say, too,
    which are slow to fetch: a character may have several tokens, or be in none."""
    found = (encoding.char_to_token(place) for place in range(start, end))
    first = next((token for token in found if token is not None), None)
    if first is None:
        return slice(0, 0)
    found = (encoding.char_to_token(place) for place in reversed(range(start, end)))
    after = next(token for token in found if token is not None) + 1
    while (next_one := encoding.token_to_chars(after)) and next_one[0] < end:
        after += 1
    return slice(first, after)


def _turns(messages: Messages) -> list[tuple[int, int]]:
    """The turns of the user that are answered: the first message of each, and one after the
    assistant's last. What is before the first user's message belongs to the first turn."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    borders = [0, *users[1:], len(messages)]
    turns = []
    for start, end in pairwise(borders):
        answers = [i for i in range(start, end) if messages[i]["role"] == "assistant"]
        if answers:
            turns.append((start, answers[-1] + 1))
    assert turns  # `messages_of`
    return turns
