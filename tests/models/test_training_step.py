"""A packed training step with dropout of the whole model, on each implementation, against the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from bert_fast import BertConfig, BertForPreTraining
from bert_fast.kernels import use_impl
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.testing import compare

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80}
LENGTHS = (5, 1, 17)

# lamb is the optimizer's.
STEP_OPS = {name: op.impls for name, op in OPS.items() if name != "lamb"}
IMPLS = [
    (impl, STEP_OPS["attention"][impl].device)
    for impl in ("triton", "cpu")
    if all(impl in impls and impls[impl].availability.ok for impls in STEP_OPS.values())
]


def batch(device: str) -> dict[str, Tensor | int]:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    total = sum(LENGTHS)
    ids = torch.randint(5, 50, (total,))
    tensors = {
        "input_ids": ids,
        "token_type_ids": torch.arange(total) % 2,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]),
        "labels": torch.where(torch.rand(total) < 0.3, ids, -100),
        "next_sentence_label": torch.tensor([0, 1, 1]),
        "cu_seqlens": ends,
    }
    return {name: x.to(device) for name, x in tensors.items()} | {"max_seqlen": max(LENGTHS)}


def step(model: BertForPreTraining, inputs: dict[str, Tensor | int], impl: str) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    torch.manual_seed(7)  # the dropout states
    with use_impl(impl):
        loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_a_training_step_equals_the_reference_with_the_same_dropout(impl: str, device: str) -> None:
    config = BertConfig.size("tiny", vocab_size=50, max_position_embeddings=32, **SIZES)
    model = BertForPreTraining(config).to(device).train()
    inputs = batch(device)
    eager = step(model, inputs, "reference")
    truth = step(model.double(), inputs, "reference")
    ours = step(model.float(), inputs, impl)
    assert ours.keys() == truth.keys()
    rows = [compare(name, ours[name], eager[name], truth[name], factor=3.0, floor_ulps=4.0) for name in truth]
    assert not [row for row in rows if not row.ok]
