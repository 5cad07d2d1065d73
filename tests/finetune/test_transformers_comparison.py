"""The fine-tuning loop compared with a plain loop over transformers' model: equal batches give equal losses."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers

from bert_fast.data import save_tokenizer, train_vocab
from bert_fast.finetune import BatchOptions, FinetuneConfig, FinetuneOptimizer, TableOptions
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.task_run import TaskRun
from bert_fast.models import BertConfig, BertForMaskedLM
from bert_fast.tasks.task import Example

WORDS = ("anna", "bonn", "sees", "likes", "rain")
LR, DECAY = 1e-2, 0.1


@pytest.fixture
def loop(tmp_path: Path) -> Finetuner:
    """A loop on rows of one to five words, with tagged names of people and places, without dropout."""
    tokenizer = train_vocab([" ".join(WORDS)] * 20, vocab_size=60)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    kinds = {"anna": "B-PER", "bonn": "B-LOC"}
    texts = [[WORDS[(i * j + j) % 5] for j in range(1, i % 5 + 2)] for i in range(48)]
    rows = [{"tokens": words, "tags": [kinds.get(word, "O") for word in words]} for words in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FinetuneConfig(
        "token-classification",
        model=str(tmp_path / "model"),
        output_dir=str(tmp_path / "out"),
        data=TableOptions(str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl")),
        batch=BatchOptions(rows=8),
        optimizer=FinetuneOptimizer(lr=LR, weight_decay=DECAY),
        epochs=2,
        dropout=0.0,
        classifier_dropout=0.0,
        device="cpu",
    )
    return Finetuner([TaskRun(config, None, lambda _: None)])


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    longest = max(len(example.input_ids) for example in examples)
    batch = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    tensors = {name: torch.full((len(examples), longest), value) for name, value in batch.items()}
    for row, example in enumerate(examples):
        tokens = slice(0, len(example.input_ids))
        tensors["input_ids"][row, tokens] = torch.as_tensor(example.input_ids)
        tensors["attention_mask"][row, tokens] = 1
        tensors["labels"][row, tokens] = torch.as_tensor(example.target)
    return tensors


def test_the_losses_of_twelve_steps_equal_those_of_transformers(loop: Finetuner, tmp_path: Path) -> None:
    loop.task_runs[0].model.save_pretrained(tmp_path / "begin")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "begin").train()
    decayed = [p for name, p in theirs.named_parameters() if "bias" not in name and "LayerNorm" not in name]
    others = [p for name, p in theirs.named_parameters() if "bias" in name or "LayerNorm" in name]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=1e-8)
    total, warmup = loop.total_steps, loop.warmup
    assert (total, warmup) == (12, 1)
    losses, expected = [], []
    for step, (_, batches) in enumerate(islice(loop.steps(), total), start=1):
        ((_, examples),) = batches
        for group in optimizer.param_groups:
            group["lr"] = LR * min(step / warmup, (total + 1 - step) / (total + 1 - warmup))
        loss = theirs(**padded(examples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
        step_losses, _ = loop.train_step(batches)
        losses.append(float(step_losses[0]))
    assert expected[-1] < 0.5 * expected[0]
    # fp32 sums in another order, accumulated over twelve updates.
    assert losses == pytest.approx(expected, rel=1e-3)
