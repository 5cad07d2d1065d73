"""torch.nn.DataParallel over a fused model, whose replicas have tensors where the model has Parameters.

DistributedDataParallel with two processes: tests/distributed.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import replicate

import bert_fast
from bert_fast.integrations.bert import is_fused

B, S = 4, 13
SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# float64 (eps 2.2e-16): two layers, with sums of up to 80 terms, differ by at most 1e-15 of 1 + |value|.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
HEADS = ["BertForMaskedLM", "BertForQuestionAnswering", "RobertaForSequenceClassification"]


def twins(name: str) -> tuple[Any, Any]:
    """A fused model and its unfused twin, in training mode."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig if name.startswith("Roberta") else transformers.BertConfig
    theirs = getattr(transformers, name)(config(**SMALL)).double().train()
    return bert_fast.fuse(copy.deepcopy(theirs)), theirs


def inputs_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 61, (B, S), generator=generator)
    mask = (torch.arange(S) < torch.tensor([[13], [4], [9], [1]])).long()
    if name == "BertForMaskedLM":
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if name == "BertForQuestionAnswering":  # transformers' softmax includes padding
        return {"input_ids": ids, "start_positions": ids[:, 0] % S, "end_positions": ids[:, 1] % S}
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


@pytest.mark.parametrize("name", HEADS)
def test_replicas_read_their_own_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel's steps, `replicate` and a thread per replica, without the copies between devices.

    The second replica's tensors are 0.7 of the model's, so that reading the model's would give another loss.
    """
    scales = (1.0, 0.7)

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[x if detach else x * scale for x in tensors] for scale, _ in zip(scales, devices, strict=True)]

    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", copies)
    ours, theirs = twins(name)
    inputs = inputs_of(name)
    halves = [{key: x.chunk(2)[rank] for key, x in inputs.items()} for rank in (0, 1)]
    replicas = replicate(ours, [0, 1])
    assert all(is_fused(replica.base_model) and not list(replica.parameters()) for replica in replicas)
    with ThreadPoolExecutor(2) as threads:
        losses = list(threads.map(lambda pair: pair[0](**pair[1]).loss, zip(replicas, halves, strict=True)))
    sum(losses).backward()

    gradients: dict[str, Tensor] = {}
    for half, scale, loss in zip(halves, scales, losses, strict=True):
        other = copy.deepcopy(theirs)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(scale)
        expected = other(**half).loss
        torch.testing.assert_close(loss, expected, **EXACT)
        expected.backward()
        for key, parameter in other.named_parameters():
            if parameter.grad is not None:
                gradients[key] = gradients.get(key, 0) + scale * parameter.grad
    assert gradients.keys() == {key for key, parameter in ours.named_parameters() if parameter.grad is not None}
    for key, value in gradients.items():
        torch.testing.assert_close(ours.get_parameter(key).grad, value, **EXACT, msg=lambda t, key=key: f"{key}: {t}")


@pytest.mark.parametrize("name", HEADS)
def test_data_parallel_over_the_available_devices(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, theirs = (model.to(device) for model in twins(name))
    inputs = {key: x.to(device) for key, x in inputs_of(name).items()}
    # One loss per device: of masked LM, a mean over that device's tokens.
    actual = nn.DataParallel(ours)(**inputs)
    expected = nn.DataParallel(theirs)(**inputs)
    torch.testing.assert_close(actual.loss, expected.loss, **EXACT)
