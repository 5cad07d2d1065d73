"""From text to packed training batches: corpus, vocabulary, shards, examples."""

from bert_fast.data.batch import PackedBatch
from bert_fast.data.corpus import Corpus
from bert_fast.data.examples import Example, PretrainingData, PretrainingDataConfig
from bert_fast.data.preparation import PrepareConfig, PrepareReport, prepare
from bert_fast.data.tokenizer import load_tokenizer
from bert_fast.data.vocab import save_tokenizer, train_vocab

__all__ = [
    "Corpus",
    "Example",
    "PackedBatch",
    "PrepareConfig",
    "PrepareReport",
    "PretrainingData",
    "PretrainingDataConfig",
    "load_tokenizer",
    "prepare",
    "save_tokenizer",
    "train_vocab",
]
