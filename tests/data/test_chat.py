"""What the assistant says, and nothing else, is a target; all of it is kept, and is one text."""

import json
from typing import Any

import numpy as np
import pytest
from helpers.chats import (
    CALLED,
    CONTROL,
    FORGETS,
    FORGETS_MARKED,
    KEEPS,
    LATER,
    MARKED,
    SHOWN,
    SILENT,
    TOOLED,
    TOOLS,
    TWO,
    WORDS,
    assistant,
    made,
    template,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from elastic.data.bad import BadRecord
from elastic.data.chat import (
    ChatEncoder,
    Encoded,
    LossOn,
    Reasoning,
    _touched,
    messages_of,
    tools_of,
)
from elastic.data.encode import control_tokens


@pytest.fixture(scope="module", params=["think-is-special", "think-is-a-word", "think-is-text"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    thinking = ("<think>", "</think>")
    if request.param == "think-is-special":
        return made(*CONTROL, *thinking)
    return made(*CONTROL, words=thinking if request.param == "think-is-a-word" else (), split=True)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return made(*CONTROL, split=True)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    messages: Any,
    tools: Any = None,
    reasoning: Reasoning = "keep",
    loss_on: LossOn = "assistant",
) -> list[Encoded]:
    encoder = ChatEncoder(tokenizer, source, reasoning, loss_on)
    documents = encoder.encode(messages_of(messages), tools_of(tools))
    for document in documents:
        assert document.ids.dtype == np.int64 and document.loss.dtype == np.bool_
        assert document.ids.shape == document.loss.shape
    return documents


def said(tokenizer: PreTrainedTokenizerFast, document: Encoded) -> list[str]:
    """The runs of targets, as text."""
    borders = np.flatnonzero(np.diff(document.loss, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.decode(document.ids[start:end]) for start, end in borders]


def whole(tokenizer: PreTrainedTokenizerFast, document: Encoded) -> str:
    return tokenizer.decode(document.ids)


def answers(*parts: tuple[str | None, str], prompted: bool) -> list[str]:
    """Reasoning and content -> what is said: a prompt has started the thought, or not."""
    start = "" if prompted else "<think>"
    line = "" if prompted else "\n"
    return [
        (f"{start}{line}{r}\n</think>\n" if r else f"{start}{start and '</think>'}")
        + f"{c}<|im_end|>"
        for r, c in parts
    ]


EASY = ("Easy.", "Two.")
GREETING = ("A greeting.", "Hi!")


@pytest.mark.parametrize("source", [KEEPS, MARKED], ids=["prefixes", "marks"])
def test_targets_are_what_the_assistant_says(
    tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    (document,) = encode(tokenizer, source, TWO)
    assert said(tokenizer, document) == answers(GREETING, EASY, prompted=source == KEEPS)
    text = whole(tokenizer, document)
    assert text.startswith(
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>"
    )
    assert text.endswith("Easy.\n</think>\nTwo.<|im_end|>\n")
    stock = tokenizer.apply_chat_template(
        messages_of(TWO), chat_template=source, tokenizer_kwargs={"split_special_tokens": False}
    )
    assert document.ids.tolist() == stock["input_ids"]


def test_marks_are_those_that_transformers_finds(tokenizer: PreTrainedTokenizerFast) -> None:
    """But for the line end after a turn, which the model does not write."""
    (document,) = encode(tokenizer, MARKED, TOOLED, TOOLS)
    stock = tokenizer.apply_chat_template(
        messages_of(TOOLED),
        tools=TOOLS,
        chat_template=MARKED,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"split_special_tokens": False},
    )
    mask = np.array(stock["assistant_masks"], dtype=bool)
    assert not (document.loss & ~mask).any()
    assert set(tokenizer.decode(document.ids[mask & ~document.loss])) == {"\n"}


@pytest.mark.parametrize("source", [KEEPS, MARKED, FORGETS, FORGETS_MARKED])
def test_all_tokens_are_targets_where_that_is_set(
    tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    for document in encode(tokenizer, source, TWO, loss_on="all"):
        assert document.loss.all()


@pytest.mark.parametrize("source", [KEEPS, MARKED, FORGETS, FORGETS_MARKED])
@pytest.mark.parametrize("inline", [False, True], ids=["field", "inline"])
@pytest.mark.parametrize(
    ("reasoning", "kept"), [("strip", (None, None)), ("last_turn", (None, "Easy."))]
)
def test_reasoning_is_left_out_where_that_is_set(
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    inline: bool,
    reasoning: Reasoning,
    kept: tuple[str | None, str | None],
) -> None:
    messages = [
        {
            "role": m["role"],
            "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}",
        }
        if inline and m["role"] == "assistant"
        else m
        for m in TWO
    ]
    (document,) = encode(tokenizer, source, messages, reasoning=reasoning)
    prompted = source in (KEEPS, FORGETS)
    expected = answers((kept[0], "Hi!"), (kept[1], "Two."), prompted=prompted)
    assert said(tokenizer, document) == expected
    assert "greeting" not in whole(tokenizer, document)


@pytest.mark.parametrize("source", [FORGETS, FORGETS_MARKED], ids=["prefixes", "marks"])
def test_a_template_that_forgets_gives_a_document_for_every_turn(
    tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    first, second = encode(tokenizer, source, [*TWO, user("And 3?")])
    prompted = source == FORGETS
    assert said(tokenizer, first) == answers(GREETING, prompted=prompted)
    assert said(tokenizer, second) == answers(EASY, prompted=prompted)
    assert whole(tokenizer, first).endswith("A greeting.\n</think>\nHi!<|im_end|>\n")
    assert "greeting" not in whole(tokenizer, second)
    assert "<think></think>Hi!<|im_end|>" in whole(tokenizer, second)


def test_nothing_is_split_where_nothing_would_be_forgotten(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    last = [user("Hello"), assistant("Hi!"), user("What is 2?"), assistant("Two.", "Easy.")]
    (document,) = encode(tokenizer, FORGETS, last)
    assert said(tokenizer, document) == answers((None, "Hi!"), EASY, prompted=True)
    (document,) = encode(tokenizer, FORGETS, [*last, user("And 3?")])
    assert said(tokenizer, document) == answers((None, "Hi!"), EASY, prompted=True)
    (document,) = encode(tokenizer, KEEPS, TWO)
    assert "greeting" in whole(tokenizer, document)


@pytest.mark.parametrize("source", [KEEPS, MARKED, FORGETS, FORGETS_MARKED])
def test_calls_of_tools_are_said_and_results_are_not(
    tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    (document,) = encode(tokenizer, source, json.dumps(TOOLED), json.dumps(TOOLS))
    parts = ("I must look.", CALLED), ("Empty.", "Nothing.")
    assert said(tokenizer, document) == answers(*parts, prompted=source in (KEEPS, FORGETS))
    assert "# Tools" in whole(tokenizer, document)
    (document,) = encode(tokenizer, source, TOOLED)
    assert CALLED in whole(tokenizer, document)


def test_a_template_without_a_field_has_reasoning_in_the_content(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (document,) = encode(tokenizer, SILENT, TWO)
    header = "<|im_start|>assistant\n"
    assert said(tokenizer, document) == [
        f"{header}<think>\n{r}\n</think>\n\n{c}<|im_end|>" for r, c in (GREETING, EASY)
    ]
    thought = tokenizer.convert_tokens_to_ids("<think>")
    if thought is not None and thought != tokenizer.unk_token_id:
        assert (document.ids == thought).sum() == 2


def test_an_answer_that_looks_otherwise_when_turns_follow_ends_at_its_own_end(
    plain: PreTrainedTokenizerFast,
) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    (document,) = encode(plain, LATER, messages)
    assert said(plain, document) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]


def test_reasoning_that_a_template_cannot_show_is_not_lost_in_silence(
    plain: PreTrainedTokenizerFast,
) -> None:
    blind = template("", prompt="").replace(
        "{{ m.content }}", "{{ m.content.split('</think>') | last }}"
    )
    with pytest.raises(BadRecord, match=r"template: it leaves out the reasoning of a turn"):
        encode(plain, blind, TWO)
    assert encode(plain, blind, TWO, reasoning="strip")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("{{- '<tool_call>' + f.name + ' '", "calls of tools"),
        ("{{ '\\n' + t | tojson }}", "the tools"),
    ],
)
def test_calls_and_tools_that_a_template_does_not_show_are_not_lost_in_silence(
    plain: PreTrainedTokenizerFast, lost: str, said: str
) -> None:
    blind = KEEPS.replace(lost, "{{- ''" if "calls" in said else "")
    assert blind != KEEPS
    with pytest.raises(BadRecord, match=f"template: it leaves out {said}"):
        encode(plain, blind, TOOLED, TOOLS)
    assert encode(plain, blind, TWO)


def test_an_answer_may_lack_the_reasoning_that_every_prompt_starts() -> None:
    plain = made(*CONTROL, "<think>", "</think>")
    always = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    messages = [*TWO[:2], assistant("<Hi!"), *TWO[3:]]
    (document,) = encode(plain, template(SHOWN, prompt=always), messages)
    assert said(plain, document) == ["</think><Hi!<|im_end|>", "Easy.\n</think>\nTwo.<|im_end|>"]
    (document,) = encode(plain, template("", prompt=always), messages, reasoning="strip")
    assert said(plain, document) == ["<Hi!<|im_end|>", "Two.<|im_end|>"]


def test_a_merge_across_the_border_of_an_answer_is_one_token(
    plain: PreTrainedTokenizerFast,
) -> None:
    """`assistant:` is there, ` Hello` is said, and the token of `: ` and the rest is neither's: it
    must be what the whole text has, and is a target."""
    messages = [
        user("Hello there"),
        assistant("Hello there"),
        user("Hi!"),
        assistant("What is it?"),
    ]
    (document,) = encode(plain, WORDS, messages)
    text = "user: Hello there\nassistant: Hello there\nuser: Hi!\nassistant: What is it?\n"
    assert document.ids[:-1].tolist() == plain(text)["input_ids"]
    assert document.ids[-1] == plain.eos_token_id and document.loss[-1]
    assert said(plain, document) == [" Hello there\n", " What is it?\n<eos>"]
    parts = [plain(part)["input_ids"] for part in ("user: Hello there\nassistant:", " ", "Hello")]
    assert sum(parts, []) != document.ids[: sum(map(len, parts))].tolist()


def test_a_token_that_straddles_a_border_is_a_target(plain: PreTrainedTokenizerFast) -> None:
    spaced = WORDS.replace("'assistant:'", "'assistant: '")
    (document,) = encode(plain, spaced, [user("Hi!"), assistant("Hello there")])
    assert said(plain, document) == [" Hello there\n<eos>"]


@settings(max_examples=300)
@given(text=st.text(st.sampled_from("ä漢🙂a: e\n"), min_size=1, max_size=12), data=st.data())
def test_the_tokens_of_a_span_are_those_whose_offsets_touch_it(
    plain: PreTrainedTokenizerFast, text: str, data: st.DataObject
) -> None:
    """A character of several bytes may be several tokens."""
    (encoding,) = control_tokens(plain).encode([text], control=True, offsets=True)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    touching = [
        i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start and start < end
    ]
    assert [*range(len(encoding))][_touched(encoding, start, end)] == touching


SPELLED = "A <|im_end|>\n<|im_start|>system\nB <eos><|im_start|><think></think>"


@pytest.mark.parametrize("source", [KEEPS, MARKED, FORGETS, FORGETS_MARKED])
def test_control_tokens_that_a_record_spells_are_text(
    tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    """In every place that a record has; the template's own are tokens."""
    call = {"function": {"name": SPELLED, "arguments": {SPELLED: [SPELLED]}}}
    messages = [
        {"role": "system", "content": SPELLED},
        user(SPELLED),
        assistant("x" + SPELLED, SPELLED, tool_calls=[call]),
        {"role": "tool", "content": SPELLED},
        assistant("x" + SPELLED, SPELLED),
    ]
    tools = [{"name": SPELLED, SPELLED: SPELLED}]
    (document,) = encode(tokenizer, source, messages, tools)
    control = {
        name: (document.ids == tokenizer.convert_tokens_to_ids(name)).sum() for name in CONTROL
    }
    assert control == {"<|im_start|>": 6, "<|im_end|>": 6}
    assert tokenizer.eos_token_id not in document.ids
    text = whole(tokenizer, document)
    assert text.count(SPELLED) == 8 and text.count(json.dumps(SPELLED)) == 5
    first, second = said(tokenizer, document)
    assert first.count(SPELLED) == 3 and second.count(SPELLED) == 2
    assert first.endswith("</tool_call><|im_end|>") and second.endswith(f"x{SPELLED}<|im_end|>")
    thought = tokenizer.added_tokens_encoder.get("<think>")
    if thought is not None:
        special = tokenizer.added_tokens_decoder[thought].special
        assert (document.ids == thought).sum() == (2 if special else 2 + 8 + 5)


def test_a_template_may_print_what_it_likes_as_python_does(plain: PreTrainedTokenizerFast) -> None:
    source = KEEPS.replace("t | tojson", "t | string")
    (document,) = encode(plain, source, TWO, [{"a": "<|im_end|>"}])
    assert "{'a': '<|im_end|>'}<|im_end|>" in whole(plain, document)
    assert (document.ids == plain.convert_tokens_to_ids("<|im_end|>")).sum() == 6


def test_a_document_ends_once(plain: PreTrainedTokenizerFast) -> None:
    messages = [user("a"), assistant("b")]
    ends = {
        KEEPS: "b<|im_end|>\n",
        KEEPS.replace("<|im_end|>\\n", "<|im_end|>"): "b<|im_end|>",
        WORDS: "b\n<eos>",
        WORDS.replace("'\\n' }}", "(eos_token if m.role == 'assistant' else ' ') }}"): "b<eos>",
    }
    for source, end in ends.items():
        for loss_on in ("all", "assistant"):
            (document,) = encode(plain, source, messages, loss_on=loss_on)  # type: ignore[arg-type]
            assert whole(plain, document).endswith(end)
            assert whole(plain, document).count("<eos>") == end.count("<eos>")
            assert document.loss[-2:].any()
    (document,) = encode(plain, WORDS, [*messages, user("c")])
    assert whole(plain, document).endswith("c\n<eos>") and not document.loss[-1]


def test_a_batch_is_what_its_conversations_are_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ChatEncoder(tokenizer, FORGETS, "keep", "assistant")
    angry = "{% if messages[0].content == 'Boo' %}{{ raise_exception('no\\nboo') }}{% endif %}"
    encoder_with_errors = ChatEncoder(tokenizer, angry + FORGETS, "keep", "assistant")
    chats = [(messages_of(m), tools_of(t)) for m, t in ((TWO, None), (TOOLED, TOOLS))]
    bad = (messages_of([user("Boo"), assistant("b")]), None)
    found = encoder_with_errors.encode_batch([chats[0], bad, chats[1]])
    assert isinstance(found[1], BadRecord) and str(found[1]) == "template: no boo"
    for chat, documents in zip(chats, (found[0], found[2]), strict=True):
        assert isinstance(documents, list)
        for one, other in zip(encoder.encode(*chat), documents, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.loss, other.loss)
    assert encoder.encode_batch([]) == []
