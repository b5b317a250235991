"""Corpora: sources, tokenizers, token shards and the loader.

`prepare(config)` gives the token shards of a corpus, `TokenLoader` batches of them from any position on.
"""

from data.errors import DataError
from data.loader import GlobalBatch, MicroBatch, TokenLoader, evaluation_batches
from data.preparation import PreparedData, Progress, load_tokenizer, open_prepared, prepare, prepare_tokenizer
from data.shards import TokenDataset

__all__ = [
    "DataError",
    "GlobalBatch",
    "MicroBatch",
    "PreparedData",
    "Progress",
    "TokenDataset",
    "TokenLoader",
    "evaluation_batches",
    "load_tokenizer",
    "open_prepared",
    "prepare",
    "prepare_tokenizer",
]
