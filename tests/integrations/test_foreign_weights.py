"""Weights that are no plain dense tensors: their modules are called, in own and fused models; the ops refuse them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import bert_fast
from bert_fast.kernels import bias_gelu, linear
from bert_fast.kernels._common.dispatch import IMPLS
from bert_fast.models import BertConfig, BertModel

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IDS = torch.arange(5, 41).reshape(4, 9)


class Quantized(Tensor):
    """A wrapper subclass without memory of its own, as torchao's: INT8 values and a scale a row."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Quantized:
        out: Quantized = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        out.values, out.scale = values, scale
        return out

    @classmethod
    def of(cls, x: Tensor) -> Quantized:
        scale = x.abs().amax(-1, keepdim=True) / 100
        return cls((x / scale).round().to(torch.int8), scale)

    def dequantized(self) -> Tensor:
        return self.values.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(args[0].values, args[0].scale))
        return func(*tree_map_only(cls, cls.dequantized, args), **(kwargs or {}))


class Named(Tensor):
    """A subclass without operators of its own."""


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "subclass": Quantized.of,
    "sparse_csr": lambda x: x.to_sparse_csr() if x.dim() == 2 else x,
    "plain subclass": lambda x: x.as_subclass(Named),
}


def models(kind: str, types: tuple[type[nn.Module], ...]) -> list[tuple[nn.Module, nn.Module]]:
    """An own and a fused model with such weights, each with transformers' model that has dense ones of the values."""
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    dense = copy.deepcopy(theirs)
    for module in dense.modules():
        if type(module) in types:
            for x in module.parameters(recurse=False):
                x.data = Quantized.of(x.data).dequantized()
    ours = BertModel(BertConfig(**SIZES)).eval()
    ours.load_hf(dense.state_dict())
    fused = copy.deepcopy(dense)
    for model in (ours, fused):
        for module in model.modules():
            if type(module) in types:
                for name, x in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(KINDS[kind](x.detach()), requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(ours, dense), (bert_fast.fuse(fused), dense)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("types", [(nn.Linear,), (nn.LayerNorm,), (nn.Embedding,)], ids=lambda types: types[0].__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_are_called(kind: str, types: tuple[type[nn.Module], ...], grad: bool) -> None:
    if kind == "sparse_csr" and types != (nn.Linear,):
        return  # torch has no such embedding or LayerNorm
    for model, dense in models(kind, types):
        with torch.set_grad_enabled(grad):
            # Two layers of float32 at values of up to 3; the values of a wrapped weight are quantized twice.
            torch.testing.assert_close(model(IDS)[0], dense(IDS)[0], rtol=0, atol=2e-5)


def test_fuse_warns() -> None:
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    dense = model.encoder.layer[1].intermediate.dense
    dense.weight = nn.Parameter(Quantized.of(dense.weight.detach()), requires_grad=False)
    with pytest.warns(
        UserWarning, match=r"leaves 1 parameters .* encoder\.layer\.1\.intermediate\.dense\.weight, Quant"
    ):
        bert_fast.fuse(model)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_the_ops_refuse_them(impl: str) -> None:
    x, weight = torch.randn(3, 8), torch.randn(16, 8)
    with pytest.raises(TypeError, match="weight is Quantized, a tensor subclass with operators of its own"):
        linear(x, Quantized.of(weight), impl=impl)
    for sparse in (weight.to_sparse_csr(), weight.to_sparse(), weight.to_mkldnn()):
        with pytest.raises(TypeError, match=r"weight\[1\] has the layout torch\.\w+; expected a dense tensor"):
            linear(x, [weight, sparse], impl=impl)
    with pytest.raises(TypeError, match=r"x has the layout torch\.sparse_coo"):
        bias_gelu(x.to_sparse(), torch.zeros(8), impl=impl)
