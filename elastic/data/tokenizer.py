"""Tokenizers: train a small one on the text itself, or load one that exists."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from elastic.config import ConfigError

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
"""In the order of their ids 0, 1, 2: the ones that NemotronHConfig has by default."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, controls: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`, with at most `vocab_size` tokens; the same every time.

    Args:
        controls: further special tokens, those of a chat template.

    Any text is decoded to exactly itself. There is no unknown token, since every byte is a token,
    and text that happens to spell `<eos>` is bytes like any other: it cannot end a document.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS.values(), *controls],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(iter(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,  # it would eat spaces before punctuation
        split_special_tokens=True,
        additional_special_tokens=list(controls),
        **SPECIAL_TOKENS,
    )


def load_tokenizer(
    path_or_id: str | Path, setting: str = "data.tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or under a hub id; remote code is never run.

    Raises ConfigError, naming `setting`, when there is none that can be loaded.
    """
    name = os.path.expanduser(path_or_id)
    wanted = "must be a directory with tokenizer files or a hub id; data.tokenizer=train makes one"
    # asking the hub for what is plainly a local path would take half a minute to fail
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ConfigError(f"{setting}={name}: there is no such directory; {wanted}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"{setting}={name}: cannot load a tokenizer ({reason(error)}); {wanted}"
        ) from error
    for found in ("is_local", "local_files_only"):  # would be saved with it; how it came here
        tokenizer.init_kwargs.pop(found, None)
    return tokenizer


def reason(error: BaseException) -> str:
    """First line of the root cause of `error`, which libraries wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: the largest id + 1. Ids of added tokens may leave holes."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ConfigError when the tokenizer has ids that the parent's embedding has no row for."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise ConfigError(
            f"data.tokenizer: its vocabulary of {needed} does not fit the parent's vocabulary of "
            f"{vocab_size}; must be at most that: lower data.tokenizer_vocab, raise "
            "parent.shape.vocab_size, or use data.tokenizer=parent"
        )
