r"""Text to token ids, in which only we and a chat template can write a control token.

A record may spell `<|im_end|>` or `</s>`, and a tokenizer would make the token of it, which ends a
turn or a document in the middle of a sentence. `split_special_tokens` of transformers keeps spelled
tokens text, but then a template cannot write them either. So control tokens are renamed: a second
tokenizer, otherwise the same and with the same ids, calls them by two characters that no text has
(a Unicode noncharacter and one for private use). What a text spells is then text, what is written
in the new names are tokens, and a whole rendering is still tokenised in one go, so that merges,
offsets and whitespace around tokens are those of the tokenizer itself.

Control tokens are those that the tokenizer calls special. Other added tokens, as `<think>` or
`<tool_call>` often are, are words with an id of their own: text that spells one gets it, as it does
wherever the parent is served.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError
from elastic.config.checks import visible
from elastic.data.bad import BadRecord, check_unicode, named

_NAME, _FIRST, _MOST = "\ufdd0", 0xF0000, 0xFFFD
"""The name of a control token: a noncharacter, and the private character of its number."""

_NAMED = re.compile(f"{_NAME}[{chr(_FIRST)}-{chr(_FIRST + _MOST)}]")

_QUOTE = "\U00013000"
"""Stands before and after the number of a control token that a record spells, until its chat is
rendered. It is a hieroglyph: a template may print a list as Python does, with escapes for all that
cannot be shown."""

_QUOTED, _QUOTING = re.compile(f"{_QUOTE}([0-9]+){_QUOTE}"), re.compile(f"{_QUOTE}[0-9]")

_DEEPEST = 64
"""Levels of a value: how deep Python can go depends on where it comes from."""


@dataclass(frozen=True)
class Revealed:
    """A rendering in which control tokens have their other names."""

    text: str
    before: list[int]
    """Places in the rendering where something of another length starts, and where it ends."""
    after: list[int]
    """The same places in `text`."""

    def place(self, place: int) -> int:
        """Where a place of the rendering is in `text`."""
        index = bisect_right(self.before, place) - 1
        inside = index + 1 < len(self.after)
        found = self.after[index] + place - self.before[index]
        return min(found, self.after[index + 1]) if inside else found


class ControlTokens:
    """A tokenizer's control tokens, and ids of text that holds none but those that are meant.

    It can be sent to other processes.

    Raises:
        ConfigError: the tokenizer has no Rust backend, or makes a control token by merging text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"data.tokenizer: {type(tokenizer).__name__} is not of the tokenizers library; "
                "must be one that has a tokenizer.json"
            )
        value = json.loads(backend.to_str())
        special = set(tokenizer.all_special_tokens)
        added = sorted(value["added_tokens"], key=lambda token: token["id"])
        chosen = [token for token in added if token["special"] or token["content"] in special]
        self.ids: dict[str, int] = {token["content"]: token["id"] for token in chosen}
        """Spelling -> id."""
        assert len(self.ids) < _MOST
        self._numbers = {spelling: index for index, spelling in enumerate(self.ids)}
        self._spellings = list(self.ids)
        self._own = re.compile(_any_of(self._spellings))
        self._either = re.compile(f"{self._own.pattern}|{_QUOTED.pattern}")
        self._renamed = self._rename(value)

    def _rename(self, value: dict[str, Any]) -> Tokenizer:
        """The same tokenizer with other names for control tokens, from its JSON."""
        names = {spelling: self.name(spelling) for spelling in self.ids}
        for token in value["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "special": True}
        model = value["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(word, word), *rest] for word, *rest in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        value["post_processor"] = None  # adds tokens, which are named; trims offsets
        value["truncation"] = value["padding"] = None
        try:
            renamed = Tokenizer.from_str(json.dumps(value))
            wrong = [s for s, name in names.items() if renamed.token_to_id(name) != self.ids[s]]
            said = f"{wrong[0]} changes its id" if wrong else ""
        except Exception as error:  # the library has no other
            said = str(error)
        if said:
            raise ConfigError(
                f"data.tokenizer: its control tokens cannot be told from text ({visible(said)}); "
                "must be one that does not merge text to a special token"
            )
        return renamed

    def name(self, spelling: str) -> str:
        """What the token is called in a text for `encode`."""
        return _NAME + chr(_FIRST + self._numbers[spelling])

    def hide(self, value: Any, deep: int = 0) -> Any:
        """The same value, as deep as it goes, with spelled control tokens quoted, so that a
        template's own can be told from them; undone by `reveal`.

        Raises:
            BadRecord: `wrong_type`: a text has what could start a quotation here, or the value is
                nested too deeply.
        """
        if isinstance(value, str):
            if _QUOTING.search(value):
                raise BadRecord("wrong_type", "a digit follows the hieroglyph U+13000")
            return self._own.sub(lambda m: f"{_QUOTE}{self._numbers[m[0]]}{_QUOTE}", value)
        if deep > _DEEPEST:
            raise BadRecord("wrong_type", f"a value is nested more than {_DEEPEST} deep")
        if isinstance(value, dict):
            return {self.hide(name): self.hide(part, deep + 1) for name, part in value.items()}
        return [self.hide(p, deep + 1) for p in value] if isinstance(value, list) else value

    def written(self, rendering: str, place: int = 0) -> re.Match[str] | None:
        """The first control token at or after a place of a rendering that is no quotation."""
        return self._own.search(rendering, place)

    def reveal(self, rendering: str) -> Revealed:
        """A rendering of hidden values: control tokens by name, quotations as they were.

        Raises:
            BadRecord: `wrong_type`: there is such a name already.
        """
        if _NAMED.search(rendering):
            said = "a noncharacter U+FDD0 is followed by a private character"
            raise BadRecord("wrong_type", said)
        parts, end, at = [], 0, 0
        before, after = [0], [0]
        for match in self._either.finditer(rendering):
            number = match[1]
            new = self.name(match[0]) if number is None else self._spellings[int(number)]
            parts += [rendering[end : match.start()], new]
            at += match.start() - end
            before += [match.start(), match.end()]
            after += [at, at + len(new)]
            at, end = at + len(new), match.end()
        return Revealed("".join([*parts, rendering[end:]]), before, after)

    def encode(self, texts: Sequence[str], control: bool, offsets: bool) -> list[Encoding]:
        """Tokens of many texts in one call, each text whole.

        Args:
            control: names of control tokens are tokens; else there is nothing that is one.
            offsets: each token's characters are wanted too, which takes longer.
        """
        self._renamed.encode_special_tokens = not control
        encode: Callable[..., list[Encoding]] = (
            self._renamed.encode_batch if offsets else self._renamed.encode_batch_fast
        )
        return encode(list(texts), add_special_tokens=False)


@lru_cache(maxsize=4)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Those of a tokenizer, which must not change any more: a large one takes a second."""
    return ControlTokens(tokenizer)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], end: int
) -> list[np.ndarray]:
    """Ids of each document, and at its end, and nowhere else, `end`: int64 (tokens,) each.

    What a document spells is text: `<eos>` in it is no end.
    """
    encodings = control_tokens(tokenizer).encode(texts, control=False, offsets=False)
    return [np.array([*encoding.ids, end], dtype=np.int64) for encoding in encodings]


def text_of(value: Any, column: str = "text", max_characters: int | None = None) -> str:
    """The text of a plain record: a text itself, or what is in its column.

    Raises:
        BadRecord: `missing_field`, `wrong_type`, `empty`, `not_utf8` or `too_long`.
    """
    text = value.get(column) if isinstance(value, dict) else value
    if text is None:
        raise BadRecord("missing_field", f"the field {column} is absent or null")
    if not isinstance(text, str):
        raise BadRecord("wrong_type", f"the field {column} is {named(text)}, no text")
    if not text:
        raise BadRecord("empty", "there is no text")
    check_unicode(text)
    if max_characters is not None and len(text) > max_characters:
        raise BadRecord("too_long", f"the text has more than {max_characters:,} characters")
    return text


def _any_of(words: Sequence[str]) -> str:
    """A regular expression of the longest of some words. It goes letter by letter: thousands side
    by side would all be tried wherever their first letter is."""
    if len(words) < 2:
        return re.escape(words[0]) if words else "(?!)"
    rest: dict[str, list[str]] = {}
    for word in words:
        if word:
            rest.setdefault(word[0], []).append(word[1:])
    ways = "|".join(re.escape(first) + _any_of(more) for first, more in rest.items())
    return f"(?:{ways})" + ("?" if "" in words else "")
