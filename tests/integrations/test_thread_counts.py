"""What DESIGN.md promises of threads: the bits of the encoder in inference, where products are ours; else rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bert_fast
from bert_fast.kernels.linear import cpu_backends
from bert_fast.models import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from bert_fast.models.embedding import pack
from bert_fast.testing.runs import threads

CONFIG = BertConfig(
    vocab_size=70,
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=200,
    hidden_dropout_prob=0.1,
    num_labels=3,
)
ELECTRA = {"vocab_size": 70, "embedding_size": 40, "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3}
ROWS = [*range(1, 14), 31, 33, 66, 127, 130, 257, 511]  # most of them no multiples of 4
LABELS: dict[type, Callable[[int, int], dict[str, Tensor]]] = {
    BertForMaskedLM: lambda B, S: {"labels": torch.randint(5, 70, (B, S))},
    BertForNextSentencePrediction: lambda B, S: {"labels": torch.randint(0, 2, (B,))},
    BertForPreTraining: lambda B, S: {
        "labels": torch.randint(5, 70, (B, S)),
        "next_sentence_label": torch.randint(0, 2, (B,)),
    },
    BertForQuestionAnswering: lambda B, S: {
        "start_positions": torch.randint(0, S, (B,)),
        "end_positions": torch.randint(0, S, (B,)),
    },
    BertForSequenceClassification: lambda B, S: {"labels": torch.randint(0, 3, (B,))},
    BertForTokenClassification: lambda B, S: {"labels": torch.randint(0, 3, (B, S))},
    BertForMultipleChoice: lambda B, S: {"labels": torch.randint(0, 2, (B,))},
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "electra"])  # which has a projection of its embeddings
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_encoders_bits_in_inference(kind: str, model_type: str, frozen: bool) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    if kind != "int8" and cpu_backends.BACKENDS[dtype].inference != "tiles":
        return  # torch's product, of which nothing is promised
    torch.manual_seed(0)
    config = BertConfig.from_dict({**ELECTRA, "model_type": "electra"}) if model_type == "electra" else CONFIG
    model = BertModel(config, add_pooling_layer=False).eval().to(dtype)
    model = bert_fast.quantize(model) if kind == "int8" else model
    model = bert_fast.freeze(model) if frozen else model
    for rows in ROWS:
        inputs = pack([[5 + i % 60 for i in range(rows // 3)], [9 + i % 50 for i in range(rows - rows // 3)]])
        outs = []
        for count in (1, 2, 3):
            with threads(count), torch.inference_mode():
                outs.append(model(**inputs).last_hidden_state)
        assert torch.equal(outs[0], outs[1]), rows
        assert torch.equal(outs[0], outs[2]), rows


@pytest.mark.parametrize("kind", LABELS, ids=lambda kind: kind.__name__)
def test_every_heads_training_step_to_rounding(kind: type) -> None:
    """Losses and gradients; the same dropout. Repeated on as many threads, they are the same within rounding too."""
    torch.manual_seed(0)
    model = kind(CONFIG.replace(num_labels=2) if kind is BertForQuestionAnswering else CONFIG).train()
    for B, S in ((1, 5), (3, 7), (5, 9), (11, 6)):
        choices = kind is BertForMultipleChoice
        ids = torch.randint(5, 70, (B, 2, S) if choices else (B, S))
        labels = LABELS[kind](B, S)
        results = []
        for count in (1, 2, 3, 3):
            with threads(count):
                torch.manual_seed(1)
                model.zero_grad()
                loss = model(ids, **labels).loss
                loss.backward()
                results.append([loss.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                # Sums of at most 257 terms in another order, through two layers.
                assert (a - b).abs().max() <= 2e-5 * max(1.0, float(a.abs().max()))
