"""Numbers and tensors that no op takes: one error that names the argument, from public functions and operators."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import (
    add_layer_norm,
    attention,
    bias_gelu,
    clip_scale,
    embedding_layer_norm,
    feed_forward_int8,
    lamb_step,
    linear,
    linear_int8,
    masked_lm_loss,
    pad,
    quantize_weight,
)
from bert_fast.kernels._common.dispatch import OPS

NO_NUMBER = [None, "1e-5", True, [1.0], 1j]
NO_FLOAT = [*NO_NUMBER, math.nan, -math.inf, 1e300, 10**400]
NO_INT = [*NO_NUMBER, 1.5, math.nan, math.inf, -1, 2**63, 10**30]
X, E = torch.randn(5, 8), torch.randn(8)
IDS, STATE = torch.zeros(5, dtype=torch.int64), torch.tensor([1, 2])
CU_SEQLENS = torch.tensor([0, 2, 5], dtype=torch.int32)
HEAD = (torch.randn(8, 8), E, E, E, torch.randn(11, 8), torch.randn(11))


def lamb(**numbers: Any) -> None:
    lists = [[torch.zeros(3)] for _ in range(4)]
    lamb_step(*lists, **{"step": 1, "lr": 0.1, **numbers})


def without(values: list[Any], *accepted: Any) -> list[Any]:
    return [value for value in values if not any(value is x for x in accepted)]


norm = functools.partial(add_layer_norm, X, X, E, E, rng_state=STATE)
embed = functools.partial(embedding_layer_norm, IDS, IDS, IDS, X, X, X, E, E, rng_state=STATE)
loss = functools.partial(masked_lm_loss, X, IDS, *HEAD)
attend = functools.partial(attention, torch.randn(5, 3, 2, 4), CU_SEQLENS, rng_state=STATE)
NUMBERS: list[tuple[Callable[..., Any], str, list[Any]]] = [
    (norm, "eps", [*NO_FLOAT, 0, -1e-5, math.inf, 1e-300]),
    (norm, "dropout_p", [*NO_FLOAT, -0.1, 1.0, 1e-4, math.inf]),
    (embed, "eps", [*NO_FLOAT, 0.0, -1.0, math.inf]),
    (embed, "dropout_p", [*NO_FLOAT, -0.1, 1.0]),
    (embed, "padding_idx", [*without(NO_INT, None), 5]),
    (loss, "eps", [*NO_FLOAT, 0.0, -1.0, math.inf]),
    (loss, "label_smoothing", [*NO_FLOAT, -0.1, 1.0, math.inf]),
    (loss, "z_loss", [*NO_FLOAT, -0.1, math.inf]),
    (loss, "ignore_index", without(NO_INT, -1)),
    (functools.partial(attend, max_seqlen=3), "softmax_scale", [*without(NO_FLOAT, None), math.inf, -1e300]),
    (functools.partial(attend, max_seqlen=3), "dropout_p", [*NO_FLOAT, -0.1, 1.0]),
    (attend, "max_seqlen", [*NO_INT, 1e38]),
    (lamb, "step", [*NO_INT, 0]),
    (lamb, "lr", [*NO_FLOAT, -0.1, math.inf]),
    (lamb, "eps", [*NO_FLOAT, -0.1, math.inf]),
    (lamb, "weight_decay", [*NO_FLOAT, -0.1, math.inf]),
    (lamb, "grad_scale", [*NO_FLOAT, -0.1, math.inf]),
    (
        lambda betas: lamb(betas=betas),
        "betas",
        [None, "ab", 0.9, (0.9,), (0.9, True), (0.9, "x"), (1.0, 0.5), (0.9, math.nan)],
    ),
    (lambda max_norm: clip_scale([X], max_norm), "max_norm", [*NO_FLOAT, 0, -1.0]),
    (lambda batch: pad(X, IDS.cumsum(0), batch, 5), "batch", [*NO_INT, 1e38]),
    (lambda seqlen: pad(X, IDS.cumsum(0), 5, seqlen), "seqlen", [*NO_INT, 1e38]),
    (lambda limit: quantize_weight(X, limit=limit), "limit", [*without(NO_INT, None), 0, 128]),
    (functools.partial(bias_gelu, X, E), "approximate", [None, True, 1, "erf", ["none"]]),
    (functools.partial(linear, X, X), "activation", [True, 1, "relu", ["gelu"]]),
    (functools.partial(bias_gelu, X, E), "impl", [None, True, 1, "fast", ["cpu"]]),
]


@pytest.mark.parametrize(
    ("call", "name", "values"), NUMBERS, ids=[f"{i} {name}" for i, (_, name, _) in enumerate(NUMBERS)]
)
def test_a_wrong_number_is_named(call: Callable[..., Any], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"{name}\b.*; expected"):
            call(**{name: value})


def test_numbers_of_other_types_are_taken() -> None:
    import numpy as np

    for value in (np.float32(1e-5), np.float64(1e-5), np.array(1e-5)[()]):
        assert torch.equal(norm(eps=value), norm(eps=float(value)))
    assert torch.equal(attend(max_seqlen=np.int64(3), softmax_scale=2), attend(max_seqlen=3, softmax_scale=2.0))
    lamb(lr=np.float32(0.1), step=np.int32(3), weight_decay=10**30)
    assert clip_scale([X], 10**30).scale == clip_scale([X], math.inf).scale == 1
    assert torch.equal(norm(eps=10**30), norm(eps=1e30))


WEIGHT = quantize_weight(torch.randn(16, 8), limit=64)
INCONSISTENT: list[Any] = [
    WEIGHT._replace(values=WEIGHT.values[:, :0]),
    WEIGHT._replace(values=WEIGHT.values[0]),
    WEIGHT._replace(values=WEIGHT.values.int()),
    *(
        WEIGHT._replace(**{field: vector})
        for field in ("scale", "sums")
        for vector in (
            *(torch.ones(shape) for shape in ((), (0,), (1,), (15,), (16, 0), (16, 1), (16, 3), (1, 16))),
            torch.ones(16, dtype=torch.int32),
            torch.ones(16, device="meta"),
            torch.ones(16).to_sparse(),
            "scale",
            None,
        )
    ),
    (WEIGHT.values,),
    WEIGHT.values,
    None,
]


@pytest.mark.parametrize(
    "impl", [impl for impl in OPS["linear_int8"].impls if OPS["linear_int8"].impls[impl].availability.ok]
)
@pytest.mark.parametrize("weight", INCONSISTENT, ids=range(len(INCONSISTENT)))
def test_an_inconsistent_int8_weight_is_named(weight: Any, impl: str) -> None:
    for x in (X, X[:0], X[:, :0]):
        with pytest.raises((TypeError, ValueError), match=r"weight.* (is|has|are|was) .*; expected"):
            linear_int8(x, weight, impl=impl)
        with pytest.raises((TypeError, ValueError), match=r"weight.* (is|has|are|was) .*; expected"):
            feed_forward_int8(x, weight, None, WEIGHT, impl=impl)


def test_what_gets_no_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias\.requires_grad is True, and linear_int8 has no gradient"):
        linear_int8(X, WEIGHT, torch.zeros(16, requires_grad=True))
    with pytest.raises(ValueError, match=r"weight\.scale\.requires_grad is True"):
        linear_int8(X, WEIGHT._replace(scale=WEIGHT.scale.clone().requires_grad_()))


def test_views_with_a_pending_sign_are_right_or_refused() -> None:
    """Their memory holds the negated values."""
    view = torch.randn(5, 8, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    for impl in ("reference", "auto"):
        assert torch.equal(linear(view, view, impl=impl), linear(view.clone(), view.clone(), impl=impl))
        for position in range(4):
            lists = [[torch.zeros(5, 8)] for _ in range(4)]
            lists[position] = [view]
            with pytest.raises(ValueError, match=r"resolve_neg\(\)"):
                lamb_step(*lists, step=1, lr=0.1, impl=impl)


def test_the_operators_check_ranks_sizes_and_dtypes() -> None:
    """What the public functions never pass on; memory would be read by the wrong sizes."""
    ops = torch.ops.bert_fast
    if not OPS["linear"].impls["cpu"].availability.ok:
        return
    u, weight, none = torch.zeros(5, 8, dtype=torch.uint8), torch.randn(16, 8), torch.randn(16, 0)
    packed, bytes_packed, ones = ops.linear_pack(weight, False), ops.linear_int8_pack(WEIGHT.values), torch.ones(5)
    wrong: list[Callable[[], Tensor]] = [
        lambda: ops.bias_gelu_fwd(X, torch.randn(8, 0), False),
        lambda: ops.bias_gelu_bwd(X[..., None], X, E, False),
        lambda: ops.add_layer_norm_fwd(X, X, E, torch.randn(8, 0), None, 0.0, 1e-5, None),
        lambda: ops.add_layer_norm_fwd(X, X, E, E, torch.randn(8, 0), 0.0, 1e-5, None),
        lambda: ops.add_layer_norm_bwd(X, X, X, E, None, torch.ones(5, 0), ones, 0.0, None),
        lambda: ops.embedding_layer_norm_fwd(
            IDS, IDS, IDS, X, X, X, E[:, None][:, :0], E, 0.0, 1e-5, None, None, X.dtype
        ),
        lambda: ops.embedding_layer_norm_fwd(
            IDS, IDS, IDS, X, X, X, E, E[:, None][:, :0], 0.0, 1e-5, None, None, X.dtype
        ),
        lambda: ops.linear_fwd(X, weight[None], False),
        lambda: ops.linear_fwd(X, weight[:, :0], True),
        lambda: ops.linear_bwd(X, X, weight, [True, True]),
        lambda: ops.linear_tiles(X, packed, 16, none, 0),
        lambda: ops.linear_tiles(X, packed, -1, None, 0),
        lambda: ops.linear_tiles(X, packed.bfloat16(), 16, None, 0),
        lambda: ops.linear_tiles(X, packed[..., None], 16, None, 0),
        lambda: ops.linear_tiles(X, packed, 16, None, 7),
        lambda: ops.linear_unpacked(X, [weight[..., None]], None, 0),
        lambda: ops.linear_unpacked(X, [weight, weight[:, :7]], None, 0),
        lambda: ops.linear_unpacked(X, [], None, 0),
        lambda: ops.linear_unpacked(X, [weight], none, 0),
        lambda: ops.linear_int8_product(u, WEIGHT.values[None]),
        lambda: ops.linear_int8_product(X, WEIGHT.values),
        lambda: ops.linear_int8_tiles(
            u, bytes_packed, 16, torch.ones(5, 0), ones, WEIGHT.scale, WEIGHT.sums, None, 0, False
        ),
        lambda: ops.linear_int8_tiles(u, bytes_packed, 16, ones, ones, none, WEIGHT.sums, None, 0, False),
        lambda: ops.linear_int8_epilogue(torch.zeros(5, 16), ones, ones, WEIGHT.scale, none, None, 0, False),
        lambda: ops.linear_int8_epilogue(torch.zeros(5, 16), ones, ones, WEIGHT.scale, WEIGHT.sums, none, 0, False),
        lambda: ops.linear_int8_quantize(X, torch.ones(2, 0)),
        lambda: ops.masked_lm_loss_rows(X, IDS[:, None][:, :0], E, E, 1.0, 0.0, 0.0, False),
        lambda: ops.masked_lm_loss_rows(X, IDS, E[:, None][:, :0], E, 1.0, 0.0, 0.0, False),
        lambda: ops.scatter_rows(X, IDS[:, None].cumsum(0), 9),
    ]
    for index, call in enumerate(wrong):
        with pytest.raises((RuntimeError, ValueError), match=r"expected|unknown activation"):
            pytest.fail(f"call {index} was taken: {call()}")


def test_the_product_of_an_empty_int8_weight_is_zero() -> None:
    ops = torch.ops.bert_fast
    if OPS["linear_int8"].impls["cpu"].availability.ok:
        out = ops.linear_int8_product(torch.zeros(3, 0, dtype=torch.uint8), torch.zeros(4, 0, dtype=torch.int8))
        assert torch.equal(out, torch.zeros(3, 4))


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_whose_storage_was_freed(name: str, dtype: torch.dtype) -> None:
    """As FSDP frees a parameter's: an error, not a read of address 0."""
    calls: dict[Callable[..., Any], dict[str, Tensor]] = {
        linear: {"x": torch.randn(64, 32), "weight": torch.randn(64, 32), "bias": torch.randn(64)},
        add_layer_norm: {"x": torch.randn(8, 32), "weight": torch.randn(32), "bias": torch.randn(32)},
        bias_gelu: {"x": torch.randn(8, 32), "bias": torch.randn(32)},
    }
    for function, arguments in calls.items():
        if name not in arguments:
            continue
        arguments = {key: x.to(dtype) for key, x in arguments.items()}
        if function is add_layer_norm:
            arguments["residual"] = arguments["x"].clone()
        arguments[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"no memory|not allocated|API call failed"), torch.no_grad():
            function(**arguments)
