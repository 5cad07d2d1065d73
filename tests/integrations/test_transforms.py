"""The transforms of torch.func over whole models, own and fused, beside transformers in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import bert_fast
from bert_fast.models import BertConfig, BertModel

IDS = torch.arange(5, 38).reshape(3, 11)
MASK = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 3 + [0] * 8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("transforms")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=60, **sizes)).save_pretrained(path)
    return path


def own(folder: Path) -> nn.Module:
    return BertModel.from_pretrained(folder)


def fused(folder: Path) -> nn.Module:
    return bert_fast.fuse(transformers.BertModel.from_pretrained(folder).eval())


def loss(model: nn.Module) -> Callable[..., Tensor]:
    """A loss of one sequence, of parameters, token ids (S,) and its mask (S,)."""

    def run(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": ids[None], "attention_mask": None if mask is None else mask[None]}
        pooled: Tensor = functional_call(model, parameters, (), inputs).pooler_output
        return (pooled * torch.arange(32.0)).sum()

    return run


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in model.named_parameters()}


@pytest.mark.parametrize("make", [own, fused])
def test_gradients_of_every_sample(make: Any, folder: Path) -> None:
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    model, name = make(folder), "embeddings.LayerNorm.weight"
    gradients = vmap(grad(loss(model)), (None, 0))(parameters_of(model), IDS)[name]
    expected = torch.stack([grad(loss(reference))(parameters_of(reference), ids)[name] for ids in IDS])
    # Sums of some hundred roundings of float32.
    assert float((gradients - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("make", [own, fused])
def test_a_mapped_mask_is_named(make: Any, folder: Path) -> None:
    model = make(folder)
    with pytest.raises(ValueError, match=r"attention_mask is mapped over by torch\.func\.vmap"):
        vmap(grad(loss(model)), (None, 0, 0))(parameters_of(model), IDS, MASK)
