"""From text to packed training batches: corpus, vocabulary, shards, examples."""

from bert_fast.data.batch import PackedBatch
from bert_fast.data.examples import Example, PretrainingData, PretrainingDataConfig
from bert_fast.data.preparation import PrepareReport, prepare
from bert_fast.data.prepare_config import PrepareConfig
from bert_fast.data.remote import local_folder
from bert_fast.data.tokenizer import load_tokenizer
from bert_fast.data.tokenizer_saving import copy_tokenizer, save_tokenizer
from bert_fast.data.vocab import train_vocab

__all__ = [
    "Example",
    "PackedBatch",
    "PrepareConfig",
    "PrepareReport",
    "PretrainingData",
    "PretrainingDataConfig",
    "copy_tokenizer",
    "load_tokenizer",
    "local_folder",
    "prepare",
    "save_tokenizer",
    "train_vocab",
]
