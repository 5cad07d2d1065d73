"""float16 on a CPU: within the bounds of eager PyTorch, and without its slow products in the layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bert_fast
from bert_fast.models import BertConfig, BertForMaskedLM, BertModel
from bert_fast.models.embedding import pack
from bert_fast.testing import assert_three_way, compare

LENGTHS = (7, 1, 30)


class Products(TorchDispatchMode):
    """Counts the products of float16 operands."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_product = func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "matmul", "linear", "baddbmm")
        tensors = [x for x in args if isinstance(x, Tensor)]
        self.count += is_product and any(x.dtype is torch.float16 for x in tensors)
        return func(*args, **(kwargs or {}))


def batch() -> dict[str, Any]:
    return pack([[5 + (7 * i) % 50 for i in range(length)] for length in LENGTHS])


def hidden_of(model: Any) -> Tensor:
    hidden: Tensor = model(**batch()).last_hidden_state
    return hidden


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_inference(model: BertModel, frozen: bool) -> None:
    half = copy.deepcopy(model).half()
    if frozen:
        bert_fast.freeze(half)
    exact = hidden_of(copy.deepcopy(half).double()).detach()  # of the same weights
    with torch.inference_mode(), Products() as products:
        ours = hidden_of(half)
    assert products.count == 0
    assert ours.dtype == torch.float16
    with torch.inference_mode(), bert_fast.kernels.use_impl("reference"), Products() as products:
        eager = hidden_of(half)
    assert products.count > 0
    assert_three_way([compare("hidden", ours, eager, exact)])


def test_logits_of_the_vocabulary() -> None:
    torch.manual_seed(0)
    config = BertConfig.size("tiny", vocab_size=60).replace(num_hidden_layers=1)
    half = BertForMaskedLM(config).eval().half()
    exact = copy.deepcopy(half).double()(**batch()).logits.detach()
    with torch.inference_mode(), Products() as products:
        ours = half(**batch()).logits
    assert products.count == 0
    with torch.inference_mode(), bert_fast.kernels.use_impl("reference"):
        eager = half(**batch()).logits
    assert_three_way([compare("logits", ours, eager, exact)])


def test_gradients(model: BertModel) -> None:
    half = copy.deepcopy(model).half()

    def gradients(of: Any) -> dict[str, Tensor]:
        of.zero_grad()
        hidden_of(of).float().square().mean().backward()
        return {name: parameter.grad for name, parameter in of.named_parameters() if parameter.grad is not None}

    exact = gradients(copy.deepcopy(half).double())
    with Products() as products:
        ours = {name: grad.clone() for name, grad in gradients(half).items()}
    assert products.count == 0
    with bert_fast.kernels.use_impl("reference"):
        eager = gradients(half)
    names = [name for name in ours if "encoder" in name]
    assert len(names) == 24
    assert all(ours[name].dtype is torch.float16 for name in names)
    assert_three_way([compare(name, ours[name], eager[name], exact[name]) for name in names])


def test_int8(model: BertModel) -> None:
    """Quantized, a float16 model is as exact as a float32 one to float16's rounding."""
    expected = hidden_of(bert_fast.quantize(copy.deepcopy(model).half().float()))
    with torch.inference_mode():
        ours = hidden_of(bert_fast.quantize(copy.deepcopy(model).half()))
    assert ours.dtype == torch.float16
    # An activation that rounds to the other of two int8 values changes a value by a 250th of its range.
    torch.testing.assert_close(ours.float(), expected.detach(), rtol=0.0, atol=0.05)
