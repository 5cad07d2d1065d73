"""The data and the model of a run, from its configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.data import PackedBatch, PretrainingData, PretrainingDataConfig, load_tokenizer
from bert_fast.data.tokenizer import TOKENIZER_FILES
from bert_fast.models import BertConfig, BertForPreTraining
from bert_fast.pretrain.config import DataOptions, ModelOptions, PretrainConfig
from bert_fast.pretrain.metrics import log_frequencies, token_counts, unigram_loss


@dataclass(frozen=True)
class RunData:
    """The two splits of a prepared folder.

    Args:
        train: the training split.
        held_out: the split for evaluation.
        fingerprint: of the folder's contents; a run resumes only if it is the same.
        tokenizer: the folder of the tokenizer, which is copied into every checkpoint.
    """

    train: PretrainingData
    held_out: PretrainingData
    fingerprint: str
    tokenizer: Path

    def count_held_out(self, limit: int = 0) -> int:
        """The number of held-out batches, at most `limit` unless it is 0."""
        count = self.held_out.num_batches(0)
        return min(limit, count) if limit else count

    def held_out_batches(self, limit: int = 0) -> Iterator[PackedBatch]:
        """The first `limit` held-out batches, or all for 0: the same ones in each evaluation."""
        return (self.held_out.batch(0, index) for index in range(self.count_held_out(limit)))

    def count_batches(self, epochs: int) -> int:
        """The number of training batches in the first `epochs` epochs."""
        return sum(self.train.num_batches(epoch) for epoch in range(epochs))

    def train_counts(self) -> Tensor:
        """How often each token is a target in epoch 0 of the training split, int64 (V,)."""
        return token_counts(self.train.batches(0), self.train.vocab_size)

    def unigram_loss(self, limit: int = 0) -> float:
        """The loss on the held-out targets of always predicting the token frequencies of the training split.

        The frequencies are those of the targets of epoch 0: 15 % of the tokens, without special tokens.
        """
        counts = self.train_counts()
        targets: list[Tensor] = [batch.labels[batch.labels != -100] for batch in self.held_out_batches(limit)]
        return unigram_loss(counts, torch.cat(targets))


def open_data(options: DataOptions, seed: int, *, checksums: bool = True) -> RunData:
    """Open and verify the prepared folder `options.folder`.

    Args:
        options: see `DataOptions`.
        seed: of the examples.
        checksums: verify the contents of every file; if False, only the sizes.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a prepared folder, a file is corrupt (the message names it), or a split has no examples.
    """
    folder = Path(options.folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.folder is {options.folder}, which is not a folder; create it with bert-fast prepare"
        )
    settings: dict[str, Any] = {**vars(options), "checksums": checksums}
    train = PretrainingData(PretrainingDataConfig(**settings, split="train", seed=seed))
    held_out = PretrainingData(PretrainingDataConfig(**settings, split="heldout", seed=seed))
    for data in (train, held_out):
        if not data.num_batches(0):
            raise ValueError(f"{folder}, {data.config.split}: its text is too short for one example; prepare more text")
    manifest = (folder / "manifest.json").read_bytes()
    return RunData(train, held_out, hashlib.sha256(manifest).hexdigest(), folder)


def model_config(options: ModelOptions, vocab_size: int, seq_len: int) -> BertConfig:
    """The configuration of the model to train.

    Raises:
        ValueError: it does not fit the data: fewer positions than `seq_len`, or a checkpoint with fewer rows than the
            data has tokens; more rows (a padded vocabulary) are kept.
    """
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    settings: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.init_from is not None:
        config = BertConfig.from_pretrained(options.init_from, **settings)
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"model.init_from {options.init_from} has {config.vocab_size} word embeddings and the data a "
                f"vocabulary of {vocab_size} tokens; prepare the data with vocab={options.init_from}"
            )
    elif options.config is not None:
        path = Path(options.config)
        folder = path.parent if path.is_file() and path.name == "config.json" else path
        config = BertConfig.from_pretrained(folder, vocab_size=vocab_size, **settings)
    else:
        config = BertConfig.size(options.size, vocab_size=vocab_size, **settings)
    if config.max_position_embeddings < seq_len:
        raise ValueError(
            f"data.seq_len is {seq_len} and the model has {config.max_position_embeddings} positions; "
            "lower seq_len or choose another model.config"
        )
    return config


def _check_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Raise ValueError if the checkpoint has a tokenizer and its vocabulary differs from that of the data."""
    if not any((checkpoint / name).is_file() for name in TOKENIZER_FILES):
        return
    ours, theirs = load_tokenizer(folder).get_vocab(), load_tokenizer(checkpoint).get_vocab()
    if different := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        raise ValueError(
            f"model.init_from {checkpoint} has another vocabulary than the data {folder}: {len(different)} tokens "
            f"differ, such as {different[0]!r}; prepare the data with vocab={checkpoint}"
        )


def build_model(config: PretrainConfig, data: RunData, start: Path | None) -> BertForPreTraining:
    """The model in training mode: from the checkpoint `start`, from model.init_from, or newly initialized."""
    settings = model_config(config.model, data.train.vocab_size, config.data.seq_len)
    source = start or config.model.init_from
    if start is None and source is not None:
        _check_tokenizer(Path(source), data.tokenizer)
    if source is not None:
        return BertForPreTraining.from_pretrained(source, config=settings).train()
    model = BertForPreTraining(settings).train()
    if config.model.unigram_bias:
        with torch.no_grad():
            model.cls.predictions.bias.copy_(log_frequencies(data.train_counts()))
    return model
