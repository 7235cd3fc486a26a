"""From documents to token ids, from token ids to windows, and to disk and back."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset as TextDataset
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from elastic.config import ConfigError
from elastic.data.corpus import text_batches
from elastic.data.tokenizer import vocabulary_size
from elastic.storage.arrays import StoredArray
from elastic.storage.files import atomic_file
from elastic.storage.seals import FileSeal, Sealing


def tokenize(texts: TextDataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of all documents of `texts` (column `text`), each followed by end-of-text: (tokens,).

    uint16 where the vocabulary fits, else uint32. Memory holds the result and one batch of text.
    Raises ConfigError when the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            "data.tokenizer: the tokenizer has no end-of-text token (eos_token), which separates "
            "documents; must be one that has, or train"
        )
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    ids = bytearray()  # grows in place: joining arrays at the end would need twice the memory
    for batch in text_batches(texts):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning that documents are longer than the model's context
        )
        for document in encoded["input_ids"]:
            ids += np.array([*document, end], dtype=dtype).tobytes()
    return np.frombuffer(ids, dtype=dtype)


Tokens = np.ndarray | StoredArray
"""(tokens,) uint16 or uint32, in memory or on disk."""


class PackedTokens(Dataset[Tensor]):
    """A flat array of tokens as consecutive windows, which document boundaries do not affect.

    Item i is int64 (sequence_length + 1,): the inputs and, one further, the targets. Neighbours
    share that one token, so every token but the first is a target at most once, and what does not
    fill a last window is left out. Raises ConfigError when not even one window fits, and for a
    window with a token that a `vocabulary` of that size does not have (None takes any).

    `setting` and `text` are names for these errors: whose length it is, and of which text.
    """

    def __init__(
        self,
        tokens: Tokens,
        sequence_length: int,
        *,
        setting: str = "sequence_length",
        text: str = "text",
        vocabulary: int | None = None,
    ) -> None:
        assert tokens.ndim == 1 and sequence_length > 0
        if len(tokens) < sequence_length + 1:
            raise ConfigError(
                f"{setting}={sequence_length}: a sequence longer than the {text}, which has "
                f"{len(tokens)} tokens; must be at most {max(len(tokens) - 1, 0)}, or give more "
                "text (data.source, data.path)"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.text = text
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.sequence_length
        window = self.tokens[start : start + self.sequence_length + 1]
        largest = int(window.max())
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise ConfigError(
                f"{getattr(self.tokens, 'path', self.text)}: has token {largest}, the parent's "
                f"vocabulary is {self.vocabulary}; it is damaged, or of another run"
            )
        return torch.from_numpy(window.astype(np.int64))


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Write `tokens` to a .npy file, whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.asarray(tokens), allow_pickle=False)


def load_tokens(path: Path) -> StoredArray:
    """The array that `save_tokens` wrote, read from disk, and compared with its seal, as it is
    used."""
    return StoredArray(path)


class _Sealed(Sealing):
    """A file of which only the seal is wanted, for `numpy.save`."""

    def write(self, data: bytes) -> None:
        self.update(memoryview(data))


def sealed_tokens(tokens: Tokens) -> FileSeal:
    """The seal of the file that `save_tokens` writes, or has written."""
    if isinstance(tokens, StoredArray) and tokens.seal is not None:
        return tokens.seal
    file = _Sealed()
    np.save(file, np.asarray(tokens), allow_pickle=False)
    return file.seal()
