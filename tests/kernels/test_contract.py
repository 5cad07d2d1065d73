"""What every op keeps, in every implementation and for every tensor argument; the samples are those of its cases.py."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bert_fast.kernels import ImplUnavailableError, available_impls
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.cases import Sample
from bert_fast.kernels._common.dispatch import IMPLS, OPS
from bert_fast.kernels._common.library import simulated
from bert_fast.testing import assert_three_way, compare, max_error, targets
from bert_fast.testing.checks import FEW
from bert_fast.testing.runs import Tensors, layouts, run, threads
from bert_fast.testing.three_way import as_tuple
from bert_fast.verification import compare_sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = [(op, impl, device) for op in sorted(OPS) for impl, device in targets(op)]
KERNELS = [target for target in TARGETS if target[1] != "reference"]
DIFFERENTIABLE = [target for target in KERNELS if cases.load(target[0]).samples(FEW)[0].gradients]


def samples(op: str, impl: str, lengths: cases.Lengths = FEW) -> list[Sample]:
    """The samples of an op; for a simulated `impl` of a few tokens at most."""
    torch.manual_seed(0)
    return cases.load(op).samples(FEW if lengths is None and simulated(impl) else lengths)


def richest(op: str) -> Sample:
    """The sample with the most inputs, the last of them."""
    return max(reversed(samples(op, "reference")), key=lambda sample: len(sample.inputs))


def attempt(call: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """(result, None), or (None, the error) where the call is refused."""
    try:
        return call(*arguments), None
    except RuntimeError as error:  # ImplUnavailableError and NotImplementedError are such errors
        return None, error


def assert_same_bits(results: Tensors, expected: Tensors, what: str) -> None:
    for name, value in expected.items():
        assert torch.equal(results[name], value), f"{what}: {name} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "impl", "device"), TARGETS)
def test_three_way(op: str, impl: str, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    dtypes = OPS[op].impls[impl].dtypes
    if dtypes is not None and dtype not in dtypes:
        with pytest.raises(ImplUnavailableError, match=rf"^{op}: impl='{impl}' takes .*; the input is {dtype}"):
            run(richest(op), impl, richest(op).cast(dtype, device))
        return
    torch.manual_seed(0)
    for sample in cases.load(op).samples():
        assert_three_way(compare_sample(sample, impl, device, dtype))


@pytest.mark.parametrize(("op", "impl", "device"), [*((op, "reference", "cpu") for op in sorted(OPS)), *TARGETS])
def test_empty_batch(op: str, impl: str, device: str, poisoned_empty: None) -> None:
    """Without tokens the outputs are empty, and the gradients of the parameters are zeros to the bit."""
    for sample in samples(op, impl, (0, 0)):
        for dtype in OPS[op].impls[impl].dtypes or DTYPES:
            for name, value in run(sample, impl, sample.cast(dtype, device)).items():
                assert not value.any(), f"{sample.name}, {dtype}: {name} is not zero"


class Recorder(TorchDispatchMode):
    """Collects calls of this project's operators: one for each operator and signature."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace.startswith("bert_fast"):
            signature = tuple((x.dtype, x.requires_grad) if isinstance(x, Tensor) else x is None for x in args)
            differentiable = not func.name().endswith("_bwd")
            copies = tree_map_only(
                Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad and differentiable), args
            )
            self.calls.setdefault((func, signature), (func, copies))
        return func(*args, **(kwargs or {}))


def operator_calls(op: str, impl: str, device: str, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of the operators that the samples run, forward and backward, with and without a gradient."""
    with Recorder() as recorder:
        for sample in (samples(op, impl)[0], richest(op)):
            inputs = sample.cast(dtype, device)
            run(sample, impl, inputs)
            with torch.no_grad():
                sample.call(impl=impl, **inputs)
    return list(recorder.calls.values())


WITH_OPERATORS = [(op, impl, device) for op, impl, device in KERNELS if op != "lamb"]  # lamb's are plain functions


@pytest.mark.parametrize(("op", "impl", "device"), WITH_OPERATORS)
def test_opcheck(op: str, impl: str, device: str) -> None:
    calls = operator_calls(op, impl, device, torch.float32)
    assert calls
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


def assert_layout_is_ignored(op: str, results: Any, expected: Any, what: str) -> None:
    """The same bits; of linear, whose products are a BLAS's that may sum in another order, the same but for rounding.

    A sum of K terms is off by about sqrt(K) roundings of float32, and each of the two results is rounded once.
    """
    for a, b in zip(tree_flatten(results)[0], tree_flatten(expected)[0], strict=True):
        if op == "linear":
            assert max_error(a, b) <= 16 * torch.finfo(b.dtype).eps * b.abs().max(), what
        else:
            assert torch.equal(a, b), what


@pytest.mark.parametrize(("op", "impl", "device"), KERNELS)
def test_any_layout_of_each_argument(op: str, impl: str, device: str) -> None:
    sample = richest(op)
    for dtype in (torch.float32,) if simulated(impl) else (torch.float32, torch.bfloat16):
        inputs = sample.cast(dtype, device)
        for argument, x in inputs.items():
            for layout, view, dense in layouts(x):
                expected, results = (sample.call(impl=impl, **{**inputs, argument: value}) for value in (dense, view))
                assert_layout_is_ignored(op, results, expected, f"{dtype}, {argument}: {layout}")


@pytest.mark.parametrize(("op", "impl", "device"), [t for t in WITH_OPERATORS if t[0] != "embedding_layer_norm"])
def test_rows_of_activations_far_apart(op: str, impl: str, device: str) -> None:
    """Each stride fits into 32 bits, the offset of the third row does not. Of the memory only the rows are touched."""
    sample = richest(op)
    inputs = sample.cast(torch.bfloat16, device)
    argument, x = next((name, x) for name, x in inputs.items() if x.is_floating_point())
    memory = torch.empty((x.shape[0] - 1) * 2**30 + x[0].numel(), dtype=x.dtype, device=device)
    far = memory.as_strided(x.shape, (2**30, *x.stride()[1:])).copy_(x)
    results = run(sample, impl, {**inputs, argument: far})
    del memory, far
    assert_layout_is_ignored(op, results, run(sample, impl, inputs), argument)


@pytest.mark.parametrize(("op", "impl", "device"), WITH_OPERATORS)
def test_any_layout_of_each_argument_of_the_operators(op: str, impl: str, device: str) -> None:
    """Forward and backward: the gradients of outputs, the statistics and the packed weights too.

    An operator may also refuse a layout.
    """
    for operator, arguments in dict(operator_calls(op, impl, device, torch.float32)).items():  # the last of each
        flat, spec = tree_flatten(tree_map_only(Tensor, Tensor.detach, arguments))
        for index, x in enumerate(flat):
            for layout, view, dense in layouts(x) if isinstance(x, Tensor) else ():
                what = f"{operator}, argument {index}: {layout}"
                expected = operator(*tree_unflatten([*flat[:index], dense, *flat[index + 1 :]], spec))
                results, refusal = attempt(operator, *tree_unflatten([*flat[:index], view, *flat[index + 1 :]], spec))
                if refusal is None:
                    assert_layout_is_ignored(op, results, expected, what)
                else:
                    assert "expected contiguous" in str(refusal), what


@pytest.mark.parametrize(("op", "impl", "device"), [t for t in TARGETS if "rng_state" in richest(t[0]).inputs])
def test_draws_the_dropout_mask_from_torchs_generator(op: str, impl: str, device: str) -> None:
    sample = richest(op)
    inputs = {name: x for name, x in sample.cast(torch.float32, device).items() if name != "rng_state"}
    torch.manual_seed(1)
    first, second = (sample.call(impl=impl, **inputs) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(sample.call(impl=impl, **inputs), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("op", "impl", "device"), KERNELS)
def test_same_bits_again_and_with_other_thread_counts(op: str, impl: str, device: str, dtype: torch.dtype) -> None:
    for sample in samples(op, impl, None):
        inputs = sample.cast(dtype, device)
        expected = run(sample, impl, inputs)
        assert_same_bits(run(sample, impl, inputs), expected, f"{sample.name}, again")
        for count in (1, 3) if impl == "cpu" else ():
            with threads(count):
                assert_same_bits(run(sample, impl, inputs), expected, f"{sample.name}, {count} threads")


@pytest.mark.parametrize(("op", "impl", "device"), TARGETS)
def test_inference_mode_is_no_grad(op: str, impl: str, device: str) -> None:
    for sample in samples(op, impl):
        inputs = sample.cast(torch.float32, device)
        with torch.no_grad():
            expected = as_tuple(sample.call(impl=impl, **inputs))
        with torch.inference_mode():
            for tensors in (inputs, {name: x.clone() for name, x in inputs.items()}):  # clones are inference tensors
                results = as_tuple(sample.call(impl=impl, **tensors))
                assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), sample.name


@pytest.mark.parametrize(("op", "impl", "device"), TARGETS)
def test_autocast(op: str, impl: str, device: str) -> None:
    """The reference's dtypes and, in the three-way test, its error; parameters and gradients stay float32."""
    for sample in samples(op, impl):
        inputs = sample.cast(torch.float32, device)
        with torch.autocast(device, torch.bfloat16):
            results, expected = (run(sample, name, inputs) for name in (impl, "reference"))
        wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        exact = run(sample, "reference", wide)
        for name, value in expected.items():
            assert results[name].dtype == value.dtype, name
        # With GeLU linear is two ops, one rounded after the other, hence 3 of DESIGN's factors; the floor is bfloat16's
        # unit in the last place, for the reference may hit a value exactly.
        assert_three_way([compare(n, results[n], expected[n].bfloat16(), exact[n], 3.0) for n in exact])


@pytest.mark.parametrize(("op", "impl", "device"), [t for t in TARGETS if t[0] != "lamb"])  # lamb reads addresses
def test_compiles_whole(op: str, impl: str, device: str, compile_backend: str) -> None:
    """In training and in inference. Inductor fuses and reorders what surrounds the kernels: a few roundings."""
    torch._dynamo.reset()
    sample = richest(op)
    backend = compile_backend if impl == "cpu" else "aot_eager"
    compiled = torch.compile(functools.partial(sample.call, impl=impl), fullgraph=True, backend=backend)
    inputs = sample.cast(torch.float32, device)
    torch.testing.assert_close(run(sample, impl, inputs, compiled), run(sample, impl, inputs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), sample.call(impl=impl, **inputs))


def rejected(impl: str) -> list[tuple[str, str]]:
    """(op, impl) that can't run here."""
    return [(op, impl) for op, impls in available_impls().items() if impl not in impls or not impls[impl].ok]


@pytest.mark.parametrize(("op", "impl"), [pair for impl in IMPLS for pair in rejected(impl)])
def test_an_absent_implementation_is_refused(op: str, impl: str) -> None:
    with pytest.raises(ImplUnavailableError, match=f"^{op}: impl='{impl}'.*Available here: reference"):
        richest(op).call(impl=impl, **richest(op).cast(torch.float32))


@pytest.mark.parametrize(("op", "impl", "device"), KERNELS)
def test_no_fallback_for_a_device_or_dtype(op: str, impl: str, device: str) -> None:
    sample = richest(op)
    with pytest.raises(ImplUnavailableError, match=f"impl='{impl}' runs on {device} tensors; the input is on meta"):
        sample.call(impl=impl, **sample.cast(torch.float32, "meta"))
    if OPS[op].impls[impl].dtypes is not None:
        with pytest.raises(ImplUnavailableError, match=f"impl='{impl}' takes float32, .*; the input is torch.float64"):
            sample.call(impl=impl, **sample.cast(torch.float64, device))


MALFORMED = {f"{op}: {case.name}": case for op in sorted(OPS) for case in cases.load(op).malformed()}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_input_is_named(name: str) -> None:
    with pytest.raises(MALFORMED[name].error, match=MALFORMED[name].match):
        MALFORMED[name].call()


def scalar(
    sample: Sample, impl: str, inputs: Tensors, *, squared: bool = True
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(sum of the outputs or of their squares, a function of the floating-point inputs; those inputs)."""
    names = [name for name, x in inputs.items() if x.is_floating_point()]

    def function(*leaves: Tensor) -> Tensor:
        outs = as_tuple(sample.call(impl=impl, **{**inputs, **dict(zip(names, leaves, strict=True))}))
        return torch.stack([(out.square() if squared else out).sum() for out in outs]).sum()

    return function, [inputs[name] for name in names]


def gradient(function: Callable[..., Tensor], leaves: list[Tensor]) -> Any:
    return torch.func.grad(function, tuple(range(len(leaves))))(*leaves)


def forward_mode(function: Callable[..., Tensor], leaves: list[Tensor]) -> Any:
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in leaves))
        return forward_ad.unpack_dual(out).tangent


def jvp(function: Callable[..., Tensor], leaves: list[Tensor]) -> Any:
    return torch.func.jvp(function, tuple(leaves), tuple(map(torch.ones_like, leaves)))


def vmap(function: Callable[..., Tensor], leaves: list[Tensor]) -> Any:
    return torch.func.vmap(function, in_dims=(0, *[None] * (len(leaves) - 1)))(
        torch.stack([leaves[0], leaves[0]]), *leaves[1:]
    )


def second(function: Callable[..., Tensor], leaves: list[Tensor]) -> Any:
    leaves = [x.detach().requires_grad_() for x in leaves]
    gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([x.square().sum() for x in gradients]).sum(), leaves)


@pytest.mark.parametrize("transform", [gradient, forward_mode, jvp, vmap, second], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("op", "impl", "device"), [*DIFFERENTIABLE, *((t[0], "auto", t[2]) for t in DIFFERENTIABLE)])
def test_other_derivatives(op: str, impl: str, device: str, transform: Callable[..., Any]) -> None:
    """Those of the reference in float64, or an error that names the op."""
    sample = richest(op)
    results, refusal = attempt(transform, *scalar(sample, impl, sample.cast(torch.float32, device)))
    if refusal is not None:
        assert re.search(rf"^{op}: impl='{impl}'|^bert_fast\w*::\w+ has no second derivative", str(refusal))
        assert impl != "auto" or transform is second
        return
    expected = transform(*scalar(sample, "reference", sample.cast(torch.float64, device)))
    for a, b in zip(tree_flatten(results)[0], tree_flatten(expected)[0], strict=True):
        # A wrong derivative is off by its own size. Float32 is off by the roundings of a sum of a hundred thousand
        # squares, whose terms cancel: less than a thousand units in the last place.
        assert max_error(a, b) <= 1000 * torch.finfo(torch.float32).eps * b.abs().max()


@pytest.mark.parametrize(("op", "impl", "device"), DIFFERENTIABLE)
def test_the_second_derivative_of_a_sum_is_no_silent_zero(op: str, impl: str, device: str) -> None:
    """The gradient of the output is constant: what depends on the inputs is what the operator saved."""

    def derivative(impl: str, dtype: torch.dtype) -> list[Tensor]:
        function, leaves = scalar(sample, impl, sample.cast(dtype, device), squared=False)
        leaves = [x.detach().requires_grad_() for x in leaves]
        gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        total = torch.stack([x.square().sum() for x in gradients]).sum()
        if not total.requires_grad:
            return [torch.zeros_like(x) for x in leaves]
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))

    sample = richest(op)
    results, refusal = attempt(derivative, impl, torch.float32)
    if refusal is not None:
        assert re.search(r"^bert_fast\w*::\w+ has no second derivative", str(refusal))
        return
    for a, b in zip(results, derivative("reference", torch.float64), strict=True):
        assert max_error(a, b) <= 1000 * torch.finfo(torch.float32).eps * b.abs().max()  # as above
