"""Pairs of small models, ours and transformers', with the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import bert_fast
from bert_fast.models import from_hf

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def in_threads(function: Callable[[], Any], count: int = 4) -> list[Any]:
    """The results of `function` in threads that run at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(function) for _ in range(count)]]


def randomise(model: nn.Module) -> None:
    """Draw weights so large that every tensor matters: with the usual 0.02 attention is nearly uniform."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.dim() > 1 else 0.3)
            parameter.copy_(noise + (1.0 if name.endswith("LayerNorm.weight") else 0.0))


@pytest.fixture
def pair() -> Callable[..., tuple[Any, Any]]:
    """`pair(name, dtype, **settings)`: our model and transformers' of that class, in eval mode."""

    def make(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
        config = {**SMALL, **settings}
        theirs = getattr(transformers, name)(transformers.BertConfig(**config, attn_implementation="eager"))
        randomise(theirs)
        theirs = theirs.to(dtype).eval()
        ours = getattr(bert_fast, name)(bert_fast.BertConfig(**config)).to(dtype).eval()
        ours.load_state_dict(from_hf(theirs.state_dict()))
        return ours, theirs

    return make


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small models are faster on one thread; the kernels' tests cover several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
