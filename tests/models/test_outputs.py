"""Outputs are read by attribute, key and index, as transformers'."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree

from bert_fast.models.outputs import BertForPreTrainingOutput, MaskedLMOutput

LOSS, LOGITS, COUNT = torch.tensor(1.0), torch.arange(3.0), torch.tensor(2)


def test_none_is_left_out_and_extra_fields_are_not_in_the_tuple() -> None:
    out = MaskedLMOutput(loss=LOSS, logits=LOGITS, mlm_count=COUNT)
    assert out.loss is out["loss"] is out[0] is out[:2][0] is LOSS
    assert out.to_tuple() == (LOSS, LOGITS)
    assert out.keys() == list(out) == ["loss", "logits", "mlm_count"]
    assert "hidden_states" not in out
    assert out.get("hidden_states") is None
    assert out.get("mlm_count") is COUNT
    assert len(out) == 3
    with pytest.raises(KeyError, match="'hidden_states' is not in this output, which has loss, logits, mlm_count"):
        out["hidden_states"]
    with pytest.raises(IndexError):
        out[2]


def test_without_a_loss_the_logits_come_first() -> None:
    out = BertForPreTrainingOutput(prediction_logits=LOGITS, seq_relationship_logits=LOSS)
    assert out[0] is LOGITS
    assert out[1] is LOSS


def test_outputs_are_pytrees() -> None:
    out = _pytree.tree_map(lambda x: x + 1, MaskedLMOutput(loss=LOSS, hidden_states=(LOGITS, LOGITS)))
    assert isinstance(out, MaskedLMOutput)
    assert out.loss == 2
    assert torch.equal(out.hidden_states[1], LOGITS + 1)
    assert out.logits is None
