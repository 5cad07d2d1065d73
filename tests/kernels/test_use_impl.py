"""`use_impl`: the default implementation of every op, or of the ops that are named."""

from __future__ import annotations

import pytest
import torch

from bert_fast.kernels import bias_gelu, use_impl
from bert_fast.kernels._common.dispatch import OPS, ImplUnavailableError

X = torch.ones(2, 8)
ON_CPU = [name for name, op in OPS.items() if "cpu" in op.impls]


def chosen(op: str) -> str:
    """The implementation that `impl="auto"` means."""
    call = OPS[op].select("auto", X)
    return next(name for name, implementation in OPS[op].impls.items() if implementation.call is call)


@pytest.mark.skipif(not OPS["bias_gelu"].impls["cpu"].availability.ok, reason="the CPU kernels are not built")
def test_ops_are_named_and_the_others_keep_the_default() -> None:
    with use_impl("reference"), use_impl({"bias_gelu": "cpu"}):
        assert {op: chosen(op) for op in ON_CPU} == {op: "cpu" if op == "bias_gelu" else "reference" for op in ON_CPU}
        with use_impl({"add_layer_norm": "cpu"}):
            assert chosen("bias_gelu") == chosen("add_layer_norm") == "cpu"
        assert chosen("add_layer_norm") == "reference"
        with use_impl("reference"):
            assert chosen("bias_gelu") == "reference"
    assert chosen("bias_gelu") == "cpu"


def test_an_explicit_argument_precedes_it() -> None:
    with use_impl({"bias_gelu": "cuda"}):
        assert bias_gelu(X, torch.zeros(8), impl="reference").shape == X.shape


def test_an_op_without_the_implementation_raises() -> None:
    with use_impl({"bias_gelu": "cuda"}), pytest.raises(ImplUnavailableError, match="bias_gelu: impl='cuda'"):
        bias_gelu(X.to("meta"), torch.zeros(8, device="meta"))


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("gpu", "impl is 'gpu'"),
        ({"bias_gelu": "gpu"}, "impl is 'gpu'"),
        ({"gelu": "cpu"}, "impl names the op 'gelu'; expected some of add_layer_norm, "),
        ({"": "cpu"}, "impl names the op ''"),
    ],
)
def test_unknown_names_are_refused(impl: str | dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message), use_impl(impl):
        pass
    assert chosen("bias_gelu") in ("cpu", "reference")
