"""A tokenizer made here loses nothing, is the same every time, and survives the disk."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from elastic.config import ConfigError
from elastic.data.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = [Path(pytest.__file__).read_text(), Path(__file__).read_text()]
TRICKY = " don 't , stop . <eos><pad> \r\n\t\x00 naïve 漢字 🙂\u200d"


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def test_special_tokens_have_the_ids_that_nemotron_h_expects(
    trained: PreTrainedTokenizerFast,
) -> None:
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert trained.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<bos>", "<eos>"]


def test_the_vocabulary_has_the_size_asked_for_and_merges(
    trained: PreTrainedTokenizerFast,
) -> None:
    assert len(trained) == vocabulary_size(trained) == 300
    assert len(ids(trained, TEXTS[1])) < 0.8 * len(TEXTS[1])


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_exactly(trained: PreTrainedTokenizerFast, text: str) -> None:
    assert trained.decode(ids(trained, text)) == text


def test_text_cannot_spell_a_control_token(trained: PreTrainedTokenizerFast) -> None:
    encoded = ids(trained, TRICKY)
    assert trained.decode(encoded) == TRICKY
    assert min(encoded) > 2


def test_saving_and_loading_changes_nothing(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert ids(loaded, TRICKY) == ids(trained, TRICKY)
        assert loaded.decode(ids(loaded, TRICKY)) == TRICKY
        assert loaded.eos_token_id == 2 and len(loaded) == len(trained)


def test_training_is_deterministic(trained: PreTrainedTokenizerFast) -> None:
    """Every hash map in the library has its own seed: merges must not depend on their order."""
    for _ in range(3):
        again = train_tokenizer(TEXTS, 300)
        assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


@pytest.mark.parametrize("setting", ["data.tokenizer", "parent.path"])
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, setting: str) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"^{setting}={path}: .*must be") as error:
            load_tokenizer(path, setting)
        assert "\n" not in str(error.value)
    assert "there is no such directory" in str(error.value)  # said without asking the hub


def test_a_tokenizer_that_needs_remote_code_is_refused(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_must_fit_the_parent(trained: PreTrainedTokenizerFast) -> None:
    check_vocabulary(trained, 300)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* 300 .* 299; must be"):
        check_vocabulary(trained, 299)
