"""Text: sources -> records -> tokens -> packs -> batches."""

from elastic.data.batches import Batch, Sequences, TextDataModule, batch_of, one_document
from elastic.data.prepare import open_prepared, prepare_data
from elastic.data.prepared import SPLITS, PreparedData, StageText, stage_text
from elastic.data.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

__all__ = [
    "SPLITS",
    "Batch",
    "PreparedData",
    "Sequences",
    "StageText",
    "TextDataModule",
    "batch_of",
    "check_vocabulary",
    "load_tokenizer",
    "one_document",
    "open_prepared",
    "prepare_data",
    "stage_text",
    "train_tokenizer",
]
