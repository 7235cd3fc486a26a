"""Text: sources, tokenising, packing, and batches for Lightning."""

from elastic.data.corpus import Corpus, load_corpus
from elastic.data.datamodule import TextDataModule
from elastic.data.packing import PackedTokens, load_tokens, save_tokens, tokenize
from elastic.data.prepare import PreparedData, prepare_data
from elastic.data.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "PackedTokens",
    "PreparedData",
    "TextDataModule",
    "check_vocabulary",
    "load_corpus",
    "load_tokenizer",
    "load_tokens",
    "prepare_data",
    "save_tokens",
    "tokenize",
    "train_tokenizer",
]
