"""Does every implementation compute the right thing on this machine? One entry an op, for `bert-fast verify`.

Each case is the three-way test of `bert_fast.testing`: outputs and every gradient against the reference in float64. The
tests try many more shapes; these are the few that a user can run in seconds wherever the package is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast import kernels
from bert_fast.kernels._common import records
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.testing import Comparison, compare, three_way

LENGTHS = (1, 2, 63, 64, 65, 0, 127, 33)  # around the sizes of vectors and tiles, and an empty sequence
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DROPOUT = 0.1
E, F, N, D, V = 128, 512, 2, 32, 1000


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Args:
        name: what is special about it.
        call: called with impl=... and `inputs` as keywords; returns a tensor or a tuple of them.
        inputs: float64 tensors, cast for each dtype; other tensors are passed as they are.
        parameters: the inputs that stay float32 under bfloat16, as weights do under autocast.
        gradients: False for a function that has none.
        rows: how many rows the only output is the float32 mean of; 0 where it is none. Its dtype says nothing about the
            rows' precision: each may be off by a unit in the last place of the dtype under test, independently.
    """

    name: str
    call: Callable[..., Any]
    inputs: dict[str, Tensor]
    parameters: tuple[str, ...] = ()
    gradients: bool = True
    rows: int = 0


@dataclass(frozen=True)
class Result:
    """The comparisons of one case; `error` instead where it raised."""

    op: str
    impl: str
    device: str
    dtype: str
    case: str
    comparisons: tuple[Comparison, ...]
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and all(comparison.ok for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        """The output or gradient that is nearest to its bound, or furthest over it."""
        return max(self.comparisons, key=lambda c: c.ours / c.bound if c.bound else c.ours, default=None)


def _cu_seqlens() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def _with_dropout(call: Callable[..., Any], inputs: dict[str, Tensor], parameters: tuple[str, ...]) -> list[Case]:
    state = torch.tensor([1234, 5678])

    def dropped(**arguments: Any) -> Any:
        return call(dropout_p=DROPOUT, **arguments)

    return [
        Case("no dropout", call, inputs, parameters),
        Case(f"dropout {DROPOUT}", dropped, {**inputs, "rng_state": state}, parameters),
    ]


def _attention() -> list[Case]:
    # D decides which kernels run: on a Hopper those of 64 and 128 are others.
    short, long = _cu_seqlens(), torch.tensor([0, 150, 153], dtype=torch.int32)
    cases: list[Case] = []
    for heads, dim, cu_seqlens in ((N, D, short), (1, 64, long), (1, 128, long)):
        longest, T = int(cu_seqlens.diff().max()), int(cu_seqlens[-1])

        def call(qkv: Tensor, bias: Tensor, cu_seqlens: Tensor, longest: int = longest, **options: Any) -> Tensor:
            return kernels.attention(qkv, cu_seqlens, longest, bias=bias, **options)

        inputs = {"qkv": _random(T, 3, heads, dim), "bias": _random(3, heads, dim, scale=0.1), "cu_seqlens": cu_seqlens}
        found = _with_dropout(call, inputs, ("bias",))
        cases += found if dim == D else [replace(case, name=f"{case.name}, D {dim}") for case in found]
    return cases


def _bias_gelu() -> list[Case]:
    inputs = {"x": _random(sum(LENGTHS), F, scale=2.0), "bias": _random(F)}

    def tanh(**arguments: Any) -> Tensor:
        return kernels.bias_gelu(approximate="tanh", **arguments)

    return [Case("erf", kernels.bias_gelu, inputs, ("bias",)), Case("tanh", tanh, inputs, ("bias",))]


def _add_layer_norm() -> list[Case]:
    T = sum(LENGTHS)
    inputs = {
        "x": _random(T, E),
        "residual": _random(T, E),
        "weight": 1 + _random(E, scale=0.1),
        "bias": _random(E, scale=0.1),
        "x_bias": _random(E, scale=0.1),
    }
    return _with_dropout(kernels.add_layer_norm, inputs, ("weight", "bias", "x_bias"))


def _embedding_layer_norm() -> list[Case]:
    lengths = LENGTHS[:4]  # tokens don't meet: where a sequence ends only places positions
    T = sum(lengths)
    inputs = {
        "input_ids": torch.randint(0, V, (T,)),
        "token_type_ids": torch.randint(0, 2, (T,)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "word": _random(V, E),
        "token_type": _random(2, E),
        "position": _random(max(lengths), E),
        "weight": 1 + _random(E, scale=0.1),
        "bias": _random(E, scale=0.1),
    }
    return _with_dropout(kernels.embedding_layer_norm, inputs, ())


def _linear() -> list[Case]:
    inputs = {"x": _random(sum(LENGTHS), E), "weight": _random(F, E, scale=E**-0.5), "bias": _random(F)}
    parameters = ("weight", "bias")

    def gelu(**arguments: Any) -> Tensor:
        return kernels.linear(activation="gelu", **arguments)

    def product(x: Tensor, weight: Tensor, impl: str) -> Tensor:
        return kernels.linear(x, [weight[:100], weight[100:]], impl=impl)

    stacked = {name: inputs[name] for name in ("x", "weight")}
    return [
        Case("bias", kernels.linear, inputs, parameters),
        Case("bias, GeLU", gelu, inputs, parameters),
        Case("two weights", product, stacked, ("weight",)),
    ]


def _linear_int8() -> list[Case]:
    # Every row has 0 and 255 sixteenths, so that rounding to 8 bits rounds nothing, in no dtype.
    x = torch.randint(0, 256, (sum(LENGTHS), E)).double() / 16
    x[:, 0], x[:, 1] = 0.0, 255 / 16
    inputs = {
        "x": x,
        "values": torch.randint(-64, 65, (F, E), dtype=torch.int8),
        "scale": _random(F).abs() / 1000,
        "bias": _random(F),
    }

    def call(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor]:
        weight = kernels.Int8Weight(values, scale, values.sum(1).to(scale.dtype))
        return (kernels.linear_int8(x, weight, bias, **options),)

    def gelu(**arguments: Any) -> tuple[Tensor]:
        return call(activation="gelu", **arguments)

    return [Case(name, case, inputs, ("scale", "bias"), False) for name, case in (("bias", call), ("GeLU", gelu))]


def _masked_lm_loss() -> list[Case]:
    T = sum(LENGTHS)
    inputs = {
        "hidden": _random(T, E),
        "labels": torch.where(torch.rand(T) < 0.15, torch.randint(0, V, (T,)), -100),
        "dense_weight": _random(E, E, scale=E**-0.5),
        "dense_bias": _random(E, scale=0.1),
        "norm_weight": 1 + _random(E, scale=0.1),
        "norm_bias": _random(E, scale=0.1),
        "decoder_weight": _random(V, E, scale=E**-0.5),
        "decoder_bias": _random(V, scale=0.1),
    }

    def call(**arguments: Any) -> Tensor:
        return kernels.masked_lm_loss(**arguments).loss

    def regularised(**arguments: Any) -> Tensor:
        return call(label_smoothing=0.1, z_loss=1e-3, **arguments)

    parameters = tuple(name for name in inputs if name not in ("hidden", "labels"))
    rows = int((inputs["labels"] != -100).sum())
    return [
        Case("15 % masked", call, inputs, parameters, rows=rows),
        Case("label smoothing, z-loss", regularised, inputs, parameters, rows=rows),
    ]


def _padding() -> list[Case]:
    B, S = 7, 65
    mask = torch.rand(B, S) < 0.7  # holes, and padding on both sides

    def call(x: Tensor, attention_mask: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        packed = kernels.unpad(x, attention_mask, impl=impl)
        return packed.x, kernels.pad(packed.x, packed.indices, B, S, impl=impl)

    return [Case("unpad, pad", call, {"x": _random(B, S, E), "attention_mask": mask})]


def _lamb() -> list[Case]:
    def call(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, impl: str) -> tuple[Tensor, ...]:
        state = [x.clone() for x in (param, exp_avg, exp_avg_sq)]
        kernels.lamb_step(state[:1], [grad], state[1:2], state[2:], step=3, lr=0.01, impl=impl)
        return tuple(state)

    inputs = {name: _random(F, E) for name in ("param", "grad", "exp_avg")}
    inputs["exp_avg_sq"] = _random(F, E).square()
    return [Case("one step", call, inputs, ("exp_avg", "exp_avg_sq"), gradients=False)]


BORROWED = ("linear",)  # ops whose GPU kernels are another op's, which is what a record is of

CASES: dict[str, Callable[[], list[Case]]] = {
    "add_layer_norm": _add_layer_norm,
    "attention": _attention,
    "bias_gelu": _bias_gelu,
    "embedding_layer_norm": _embedding_layer_norm,
    "lamb": _lamb,
    "linear": _linear,
    "linear_int8": _linear_int8,
    "masked_lm_loss": _masked_lm_loss,
    "padding": _padding,
}


def verify(ops: list[str] | None = None, impls: list[str] | None = None, seed: int = 0) -> Iterator[Result]:
    """Run every available implementation of `ops` (None: all) in every dtype on every device of this machine.

    Args:
        ops: names of ops.
        impls: names of implementations to look at; None for all that are available.
        seed: of the inputs.

    Raises:
        ValueError: a name is unknown.
    """
    for name, given, known in (("ops", ops, CASES), ("impls", impls, ("reference", "triton", "cuda", "cpu"))):
        unknown = sorted(set(given or []) - set(known))
        if unknown:
            raise ValueError(f"{name} has {', '.join(unknown)}; expected some of {', '.join(known)}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in ops or CASES:
        for impl, found in OPS[op].impls.items():
            if not found.availability.ok or (impls is not None and impl not in impls):
                continue
            for device in devices:
                if found.device in (None, device):
                    for dtype in DTYPES:
                        if found.dtypes is None or dtype in found.dtypes:
                            yield from _verify(op, impl, device, dtype, seed)


def record(results: list[Result]) -> Path:
    """Write the passing runs on this machine's GPU, for `auto` to rely on; returns the file.

    In a checkout the file is part of the project (bert_fast/verified), else it is in the user's cache. An
    implementation is recorded when every one of its cases passed, and struck out of the file when one failed.

    Raises:
        ValueError: there is no result of a GPU kernel.
    """
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.device == "cuda" and result.impl in records.RECORDED and result.op not in BORROWED:
            runs.setdefault((result.op, result.impl), []).append(result)
    if not runs:
        raise ValueError(
            "nothing to record: records are of Triton and CUDA kernels on a CUDA device, and none of them ran here"
        )
    passed = {
        key: [_case(result) for result in found] if all(result.ok for result in found) else None
        for key, found in runs.items()
    }
    return records.write(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), passed)


def _case(result: Result) -> dict[str, Any]:
    worst = result.worst
    assert worst is not None
    return {
        "case": result.case,
        "dtype": result.dtype,
        "worst": worst.name,
        "error": float(f"{worst.ours:.3g}"),
        "bound": float(f"{worst.bound:.3g}"),
    }


def _verify(op: str, impl: str, device: str, dtype: torch.dtype, seed: int) -> Iterator[Result]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cases = CASES[op]()
        for case in cases:
            described = (op, impl, device, str(dtype).removeprefix("torch."), case.name)
            try:
                yield Result(*described, tuple(_compare(case, impl, device, dtype)))
            except Exception as error:  # an implementation that raises is a failed row, not the end of the table
                yield Result(*described, (), f"{type(error).__name__}: {error}")


def _compare(case: Case, impl: str, device: str, dtype: torch.dtype) -> list[Comparison]:
    inputs = {name: x.to(device) for name, x in case.inputs.items()}

    def ours(**arguments: Any) -> Any:
        return case.call(impl=impl, **arguments)

    def reference(**arguments: Any) -> Any:
        return case.call(impl="reference", **arguments)

    low = {
        name: torch.float32 if name in case.parameters else dtype for name, x in inputs.items() if x.is_floating_point()
    }
    rounded = {name: x.to(low[name]) if name in low else x for name, x in inputs.items()}
    if not case.gradients:
        exact = reference(**{name: x.double() if name in low else x for name, x in rounded.items()})
        results = zip(ours(**rounded), reference(**rounded), exact, strict=True)
        return [compare(f"out{index}", *found) for index, found in enumerate(results)]
    outs = reference(**rounded)
    douts = tuple(torch.randn_like(out) for out in (outs if isinstance(outs, tuple) else (outs,)))
    rows = three_way(ours, reference, rounded, dtype, douts, parameter_dtype=torch.float32, parameters=case.parameters)
    if case.rows:
        floor = torch.finfo(dtype).eps * float(outs) / case.rows**0.5
        rows[0] = rows[0]._replace(bound=rows[0].bound + floor)
    return rows
