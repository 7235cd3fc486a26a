"""Token arrays: documents end, windows tile, files are whole or not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken

from elastic.config import ConfigError
from elastic.data.packing import PackedTokens, load_tokens, save_tokens, sealed_tokens, tokenize
from elastic.data.tokenizer import train_tokenizer
from elastic.storage.arrays import StoredArray
from elastic.storage.seals import FileSeal


def test_documents_are_concatenated_and_each_is_ended() -> None:
    tokenizer = train_tokenizer(["some words, some more words"], 270)
    texts = ["some words", "", "more <eos> words\n", "so"]
    tokens = tokenize(Dataset.from_dict({"text": texts}), tokenizer)
    assert tokens.dtype == np.uint16
    ends = np.flatnonzero(tokens == 2)
    assert len(ends) == 3 and ends[-1] == len(tokens) - 1
    decoded = [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]
    assert decoded == [text for text in texts if text]


def test_text_without_documents_is_no_tokens() -> None:
    tokens = tokenize(Dataset.from_dict({"text": ["", ""]}), train_tokenizer(["a"], 260))
    assert tokens.shape == (0,)


def test_ids_beyond_sixteen_bits_are_kept() -> None:
    tokenizer = train_tokenizer(["a"], 260)
    tokenizer.add_tokens([AddedToken(f"[{i}]") for i in range(1 << 16)])
    tokens = tokenize(Dataset.from_dict({"text": ["[65535]"]}), tokenizer)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [len(tokenizer) - 1, 2]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = train_tokenizer(["a"], 260)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*end-of-text"):
        tokenize(Dataset.from_dict({"text": ["a"]}), tokenizer)


@pytest.mark.parametrize("count", [5, 8, 9, 12, 13])
def test_windows_tile_the_text_and_share_one_token(count: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    packed = PackedTokens(tokens, 4)
    windows = [packed[i] for i in range(len(packed))]
    assert len(windows) == (count - 1) // 4
    for i, window in enumerate(windows):
        assert window.dtype == torch.int64
        assert window.tolist() == list(range(4 * i, 4 * i + 5))


def test_large_ids_do_not_wrap() -> None:
    tokens = np.array([65_535, 1, 65_534], dtype=np.uint16)
    assert PackedTokens(tokens, 2)[0].tolist() == [65_535, 1, 65_534]


def test_windows_end_where_they_end() -> None:
    windows = PackedTokens(np.arange(9), 4)
    for index in (2, -1):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize("count", [0, 4])
def test_a_sequence_longer_than_the_text_is_refused(count: int) -> None:
    with pytest.raises(ConfigError) as error:
        PackedTokens(np.arange(count), 4, setting="a.b", text="training text")
    assert str(error.value).startswith("a.b=4: a sequence longer than the training text")
    assert f"{count} tokens; must be at most {max(count - 1, 0)}, or" in str(error.value)
    PackedTokens(np.arange(5), 4)  # one more token and one window fits


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_tokens_survive_the_disk_and_stay_there(tmp_path: Path, dtype: type) -> None:
    tokens: np.ndarray = np.array([1, 2, np.iinfo(dtype).max], dtype=dtype)
    save_tokens(tmp_path / "t.npy", tokens)
    loaded = load_tokens(tmp_path / "t.npy")
    assert isinstance(loaded, StoredArray) and loaded.dtype == dtype
    np.testing.assert_array_equal(np.asarray(loaded), tokens)
    assert sealed_tokens(tokens) == sealed_tokens(loaded) == FileSeal.of(tmp_path / "t.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["t.npy"]


def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokens(tmp_path / "t.npy", np.arange(3))

    def fail(file: object, *args: object, **options: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tokens(tmp_path / "t.npy", np.arange(9))
    assert len(load_tokens(tmp_path / "t.npy")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["t.npy"]


@pytest.mark.parametrize("stored", [True, False])
def test_a_token_that_the_vocabulary_lacks_is_named_with_its_file(
    tmp_path: Path, stored: bool
) -> None:
    """The window that has it; its neighbours, and any token where no vocabulary is given, pass."""
    tokens: np.ndarray = np.arange(9, dtype=np.uint16)
    save_tokens(tmp_path / "t.npy", tokens)
    held = load_tokens(tmp_path / "t.npy") if stored else tokens
    where = str(tmp_path / "t.npy") if stored else "training text"
    windows = PackedTokens(held, 4, text="training text", vocabulary=8)
    assert windows[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError) as error:
        windows[1]
    assert str(error.value).startswith(f"{where}: has token 8, the parent's vocabulary is 8; ")
    assert PackedTokens(held, 4)[1].tolist() == PackedTokens(held, 4, vocabulary=9)[1].tolist()
