"""What a text spells is text, whatever the tokenizer; all else is tokenised as it always is."""

import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elastic.config import ConfigError
from elastic.data.bad import BadRecord
from elastic.data.encode import ControlTokens, control_tokens, encode_texts, text_of
from elastic.data.tokenizer import train_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "[s]"]
WORDS = ["<think>", "</think>"]
PIECES = [*SPECIAL, *WORDS, *("<eos>", "<", "|im_end", "|>", " ", "\n", "an ox", "ä漢🙂")]
ODD = ["\ufdd0", "\U000f0001", "\U00013000", "\U000130001"]
"""What stands for a control token where a template is at work, and parts of it."""


def made(split: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with control tokens, and with added tokens that are words."""
    tokenizer = train_tokenizer([Path(__file__).read_text()], 320)
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL], True)
    tokenizer.add_tokens(WORDS)
    tokenizer.split_special_tokens = split
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """As tokenizers are loaded, and as ours are made: without an eye for control tokens."""
    return made(request.param)


def unigram() -> PreTrainedTokenizerFast:
    """Like that of Llama 2: </s> is a piece that its model may choose, and the best one."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "▁<>/sabcdefg"), ("▁a", -1.5)]
    backend = Tokenizer(models.Unigram(pieces, 0, False))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def whole_words() -> PreTrainedTokenizerFast:
    """Like that of Llama 3: a word of the vocabulary is taken before merges are looked at."""
    vocab = {c: i for i, c in enumerate("<>end ")} | {"<end>": 6}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_split_special_tokens_of_transformers_keeps_spelled_tokens_text() -> None:
    """What the newer way must agree with; added tokens that are words stay tokens."""
    one, text = made(False), "a <|im_end|> <eos> <think> b"
    ids = one(text, split_special_tokens=True)["input_ids"]
    assert one.decode(ids) == text
    assert not {*one.all_special_ids, *one.convert_tokens_to_ids(SPECIAL)} & {*ids}
    assert one.convert_tokens_to_ids("<think>") in ids
    clean = "an ox <think> ä漢🙂"
    assert one(clean, split_special_tokens=True)["input_ids"] == one(clean)["input_ids"]


@settings(max_examples=300)
@given(parts=st.lists(st.sampled_from([*PIECES, *ODD]), max_size=12))
def test_documents_are_those_of_the_tokenizer_that_splits(
    tokenizer: PreTrainedTokenizerFast, parts: list[str]
) -> None:
    text = "".join(parts)
    (ids,) = encode_texts(tokenizer, [text], 2)
    assert ids.dtype == np.int64 and ids[-1] == 2 and 2 not in ids[:-1]
    assert ids[:-1].tolist() == tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids[:-1]) == text


@settings(max_examples=300)
@given(parts=st.lists(st.sampled_from([*PIECES, *ODD]), max_size=12))
def test_renderings_are_those_of_the_tokenizer_that_does_not(
    tokenizer: PreTrainedTokenizerFast, parts: list[str]
) -> None:
    """Where nothing is quoted: ids, and offsets, which are in the text that was encoded."""
    text, control = "".join(parts), control_tokens(tokenizer)
    if re.search("\ufdd0\U000f0001|\U000130001", text):
        with pytest.raises(BadRecord, match="noncharacter|hieroglyph"):
            control.reveal(control.hide(text))
        return
    revealed = control.reveal(text)
    (encoding,) = control.encode([revealed.text], control=True, offsets=True)
    stock = tokenizer(text, split_special_tokens=False, return_offsets_mapping=True)
    assert encoding.ids == stock["input_ids"]
    ours = [tuple(revealed.place(at) for at in span) for span in stock["offset_mapping"]]
    assert encoding.offsets == ours
    plain = control.encode([revealed.text], control=True, offsets=False)
    assert plain[0].ids == encoding.ids


def test_what_is_hidden_is_text_and_what_is_written_is_a_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    control, rng = control_tokens(tokenizer), random.Random(0)
    for _ in range(200):
        text, expected, ids = "", "", []
        for _ in range(rng.randint(1, 6)):
            said = "".join(rng.choices(PIECES, k=4))
            written = rng.choice(SPECIAL)
            text += control.hide(said) + written
            expected += said + written
            ids += [*tokenizer(said, split_special_tokens=True)["input_ids"]]
            ids += [tokenizer.convert_tokens_to_ids(written)]
        if any(longer in text for longer in ("<|im_end|>x",)):
            continue  # one token may start where another ends
        (encoding,) = control.encode([control.reveal(text).text], control=True, offsets=False)
        assert encoding.ids == ids and tokenizer.decode(encoding.ids) == expected


def test_hidden_values_keep_their_form(tokenizer: PreTrainedTokenizerFast) -> None:
    control = control_tokens(tokenizer)
    value = {"a <eos>": ["<|im_end|>", 1, None, {"b": True}], "<think>": 1.5}
    hidden = control.hide(value)
    assert "<eos>" not in str(hidden) and "im_end" not in str(hidden) and "<think>" in hidden
    assert control.reveal(str(hidden)).text == str(value)
    for one in ("\ufdd0", "\U00013000", "\U00013000\U00013000", "\U000f0000"):
        assert control.hide(one) == one
    with pytest.raises(BadRecord, match="hieroglyph"):
        control.hide([{"a\U000130007": 1}])


@pytest.mark.parametrize("kind", ["unigram", "whole_words"])
def test_a_model_that_makes_a_control_token_of_text_does_not_here(kind: str) -> None:
    """`split_special_tokens` alone would let these end a document."""
    one = {"unigram": unigram, "whole_words": whole_words}[kind]()
    text = {"unigram": "a </s> b", "whole_words": "e <end> d"}[kind]
    end = one.eos_token_id
    assert end in one(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    (ids,) = encode_texts(one, [text], end)
    assert ids[-1] == end and end not in ids[:-1]
    assert one.decode(ids[:-1]).replace(" ", "") == text.replace(" ", "")
    control = control_tokens(one)
    clean = text.replace(one.eos_token, "")
    whole = [clean, one.eos_token + clean, clean + one.eos_token + clean]
    for rendering in whole:
        (encoding,) = control.encode([control.reveal(rendering).text], control=True, offsets=True)
        stock = one(rendering, split_special_tokens=False, add_special_tokens=False)
        assert encoding.ids == stock["input_ids"]


def test_a_tokenizer_that_merges_text_to_a_control_token_is_refused() -> None:
    vocab = {c: i for i, c in enumerate("<s>")} | {"<s": 3, "<s>": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">")]))
    one = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: .*; must be") as error:
        ControlTokens(one)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_library_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: object .*; must be"):
        ControlTokens(object())  # type: ignore[arg-type]


def test_control_tokens_survive_the_way_between_processes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    control = pickle.loads(pickle.dumps(ControlTokens(tokenizer)))
    text = control.reveal("<|im_start|>" + control.hide("a<eos>")).text
    ours = control_tokens(tokenizer)
    assert control.ids == ours.ids
    assert control.encode([text], True, False)[0].ids == ours.encode([text], True, False)[0].ids


def test_texts_of_records() -> None:
    assert text_of("a") == text_of({"text": "a"}) == text_of({"b": "a"}, "b", 1) == "a"
    wrong = {
        "missing_field": {"text": None},
        "wrong_type": {"text": ["a"]},
        "empty": {"text": ""},
        "not_utf8": {"text": "\ud800"},
        "too_long": {"text": "ab"},
    }
    for kind, value in wrong.items():
        with pytest.raises(BadRecord) as caught:
            text_of(value, max_characters=1)
        assert caught.value.kind == kind
