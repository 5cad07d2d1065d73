"""The question answering head of a fused model: its softmax over the tokens excludes padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import bert_fast

B, S = 3, 13
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


def make(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL, **settings))
    torch.nn.init.normal_(model.qa_outputs.bias)
    return model.double().eval()


def twins(**settings: Any) -> tuple[Any, Any]:
    """A fused model and its unfused twin."""
    return bert_fast.fuse(make(**settings)), make(**settings)


def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "input_ids": torch.randint(0, 61, (B, S), generator=generator),
        "token_type_ids": torch.randint(0, 2, (B, S), generator=generator),
    }


def test_padding_takes_no_part_in_the_loss_of_question_answering() -> None:
    ours, theirs = twins()
    lengths, (starts, ends) = (13, 6, 9), ([1, 3, 0], [2, 5, 8])
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    inputs = {**tokens(), "attention_mask": mask}
    out = ours(**inputs, start_positions=torch.tensor(starts), end_positions=torch.tensor(ends))
    # transformers on each sequence by itself, without padding
    alone = [
        theirs(
            inputs["input_ids"][i : i + 1, :n],
            token_type_ids=inputs["token_type_ids"][i : i + 1, :n],
            start_positions=torch.tensor([starts[i]]),
            end_positions=torch.tensor([ends[i]]),
        )
        for i, n in enumerate(lengths)
    ]
    sum(output.loss for output in alone).div(B).backward()
    out.loss.backward()
    torch.testing.assert_close(out.loss, sum(output.loss for output in alone) / B, **EXACT)
    for key in ("start_logits", "end_logits"):
        for row, n, output in zip(out[key], lengths, alone, strict=True):
            torch.testing.assert_close(row[:n], output[key][0], **EXACT)
            assert (row[n:] == torch.finfo(torch.float64).min).all()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, msg=key, **EXACT)
    # A position at padding or past the end is ignored.
    for outside in (12, 99):
        ignored = ours(
            **inputs, start_positions=torch.tensor([1, outside, 0]), end_positions=torch.tensor([2, outside, 8])
        )
        torch.testing.assert_close(ignored.loss, (alone[0].loss + alone[2].loss) / 2, **EXACT)
    assert all(
        torch.equal(x, y) for x, y in zip(ours(**inputs, return_dict=False), ours(**inputs).values(), strict=True)
    )


def test_with_the_original_forward_the_original_head_runs_too() -> None:
    ours, theirs = twins(attn_implementation="eager")
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, 9:] = 0
    ends = {"start_positions": torch.tensor([1, 3, 0]), "end_positions": torch.tensor([2, 7, 99])}
    inputs = {**tokens(), **ends, "attention_mask": mask, "output_attentions": True}
    with pytest.warns(UserWarning, match="output_attentions"):
        actual = ours(**inputs)
    expected = theirs(**inputs)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.start_logits, expected.start_logits)
    del inputs["output_attentions"]
    bert_fast.unfuse(ours.bert)
    assert torch.equal(ours(**inputs).loss, theirs(**inputs).loss)
    bert_fast.unfuse(ours)
    assert type(ours) is transformers.BertForQuestionAnswering
