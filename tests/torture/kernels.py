"""Attacks on the ops: calls from the samples of kernels/<op>/cases.py with arguments changed, on each instruction set.

A public function raises a clear error, or returns what the reference returns in float64. A raw operator
(torch.ops.bert_fast.*), which checks no values, raises or returns; with arguments that say the same in another layout
it returns the same. Nothing crashes or hangs: half of the tensors end at a page that can't be read.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import bert_fast.kernels
from bert_fast.kernels import available_impls, feed_forward_int8, quantize_weight
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.dispatch import OPS
from tests.torture.attack import Attack, Broken, Case, clear, require_clear
from tests.torture.tensors import change, guarded, wrong

Call = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_LENGTHS = ((3, 0, 2), (1, 17, 40), (5,))
# Functions of bert_fast.kernels that compute nothing on tensors.
_OTHERS = {"Availability", "ClipScale", "ImplUnavailableError", "Int8Weight", "MaskedLMLoss", "Unpadded"}
_OTHERS |= {"available_impls", "use_impl"}


@functools.cache
def public_calls() -> list[Call]:
    """Valid calls of every public function, float32, recorded while the samples run."""
    calls: list[Call] = []
    torch.manual_seed(0)
    names = set(bert_fast.kernels.__all__) - _OTHERS
    for op in sorted(OPS):
        module = importlib.import_module(f"bert_fast.kernels.{op}.cases")
        with mock.patch.multiple(
            module, **{n: _recorder(calls, n, getattr(module, n)) for n in names if hasattr(module, n)}
        ):
            for lengths in _LENGTHS:
                for sample in module.CASES.samples(lengths):
                    sample.call(**sample.cast(torch.float32), impl="reference")
    first, second = (quantize_weight(torch.randn(*shape)) for shape in ((24, 16), (16, 24)))
    x = torch.randn(5, 16)
    calls.append(("feed_forward_int8", feed_forward_int8, (x, first, torch.randn(24), second, torch.randn(16)), {}))
    calls.append(("quantize_weight", quantize_weight, (torch.randn(6, 10),), {}))
    clip = bert_fast.kernels.clip_scale
    calls.append(("clip_scale", clip, ([torch.randn(3, 4), torch.randn(7)],), {"max_norm": 1.0}))
    missing = names - {name for name, *_ in calls}
    assert not missing, f"no call of {sorted(missing)}"
    return calls


def _recorder(calls: list[Call], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        calls.append((name, function, copied[0], {k: v for k, v in copied[1].items() if k != "impl"}))
        return function(*args, **kwargs)

    return record


def public_functions(case: Case, _: Any) -> None:
    """A public function with one to three arguments changed."""
    rng = case.rng
    calls = public_calls()
    name = rng.choice(sorted({call[0] for call in calls}))
    _, function, args, kwargs = rng.choice([call for call in calls if call[0] == name])
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    gradients = rng.random() < 0.4
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    changes = []
    for index in rng.sample(range(len(leaves)), min(len(leaves), rng.choice([1, 1, 2, 3]))):
        what, leaves[index] = change(leaves[index], rng)
        changes.append(f"leaf {index} {what}")
    for index, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.is_contiguous() and x.layout == torch.strided and rng.random() < 0.5:
            leaves[index] = guarded(x)
    op = next(op for op in OPS if function.__module__.startswith(f"bert_fast.kernels.{op}."))
    impls = [impl for impl, state in available_impls()[op].items() if state.ok and impl in ("cpu", "reference")]
    options = {} if name == "quantize_weight" else {"impl": rng.choice(["auto", *impls])}
    case.note(f"{name} {str(dtype)[6:]} {options.get('impl')} gradients={gradients}: {'; '.join(changes)}"[:600])
    state = torch.random.get_rng_state()
    try:
        ours = _outputs(function, leaves, spec, options, gradients)
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            return  # a size that no machine has
        require_clear(error, name)
        return
    reference = {"impl": "reference"} if options else {}
    torch.random.set_rng_state(state)
    eager = _outputs(function, leaves, spec, reference, gradients)
    torch.random.set_rng_state(state)
    truth = _outputs(function, [_precise(x) for x in leaves], spec, reference, gradients)
    for index, triple in enumerate(zip(ours, eager, truth, strict=True)):
        if fault := wrong(*triple):
            raise Broken(f"{name}: {'output' if index < len(ours) else ''} {index}: {fault}")


def _precise(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(torch.float64).requires_grad_(x.requires_grad)


def _outputs(
    function: Callable[..., Any], leaves: list[Any], spec: Any, options: dict[str, Any], gradients: bool
) -> list[Any]:
    """What a call returns, what it left in its arguments, and the gradients of floating-point arguments."""
    fresh = [_fresh(x, gradients) for x in leaves]
    args, kwargs = tree_unflatten(fresh, spec)
    outs = [x for x in tree_flatten(function(*args, **kwargs, **options))[0] if isinstance(x, Tensor)]
    results = [*outs, *(x.detach() for x in fresh if isinstance(x, Tensor) and x.device.type == "cpu")]
    results = [x.to_dense() if x.layout != torch.strided else x for x in results]
    leaves = [x for x in fresh if isinstance(x, Tensor) and x.requires_grad]
    differentiable = [x for x in outs if x.requires_grad and x.device.type == "cpu"]
    if leaves and differentiable:
        noise = [
            torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype) for x in differentiable
        ]
        found = torch.autograd.grad(differentiable, leaves, noise, allow_unused=True)
        results += [torch.zeros(()) if x is None else x for x in found]
    return results


def _fresh(x: Any, gradients: bool) -> Any:
    """`x` for one call; with gradients, and in another call's way, if it is a plain floating-point tensor."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.layout != torch.strided:
        return x
    if gradients and x.is_floating_point():
        return x.detach().requires_grad_()
    return x.clone(memory_format=torch.preserve_format) if x.is_contiguous() and not x.is_neg() else x.detach()


class _Recorder(TorchDispatchMode):
    """Collects calls of the compiled operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "bert_fast":
            signature = tuple((x.dtype, x.dim()) if isinstance(x, Tensor) else x is None for x in args)
            copies = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
            self.calls.setdefault((func.name(), signature), (func, copies))
        return func(*args, **(kwargs or {}))


@functools.cache
def operator_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of every operator of namespace bert_fast, recorded while the samples run forward and backward."""
    torch.manual_seed(0)
    recorded: dict[Any, tuple[Any, ...]] = {}
    for op in sorted(OPS):
        if not available_impls()[op].get("cpu", (False,))[0]:
            continue
        for sample in cases.load(op).samples((3, 0, 2, 17)):
            for dtype in (torch.float32, torch.bfloat16):
                recorder = _Recorder()
                inputs = sample.cast(dtype)
                if sample.gradients:
                    inputs = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
                with recorder:
                    outs = sample.call(**inputs, impl="cpu")
                    outs = [x for x in (outs if isinstance(outs, tuple) else (outs,)) if x.requires_grad]
                    if outs:
                        torch.autograd.grad(
                            [x.float().sum() for x in outs], [x for x in inputs.values() if x.requires_grad]
                        )
                with torch.no_grad(), recorder:
                    sample.call(**{n: x.detach() for n, x in inputs.items()}, impl="cpu")
                recorded |= recorder.calls
    return list(recorded.values())


def operators(case: Case, _: Any) -> None:
    """A raw operator with one to three arguments changed."""
    rng = case.rng
    calls = operator_calls()
    name = rng.choice(sorted({call[0].name() for call in calls}))
    func, args = rng.choice([call for call in calls if call[0].name() == name])
    leaves, spec = tree_flatten(args)
    layout_only = rng.random() < 0.4
    changed, changes = list(leaves), []
    for index in rng.sample(range(len(leaves)), min(len(leaves), rng.choice([1, 1, 2, 3]))):
        if isinstance(leaves[index], Tensor) or not layout_only:
            what, changed[index] = change(leaves[index], rng, layout_only=layout_only)
            changes.append(f"leaf {index} {what}")
    for index, x in enumerate(changed):
        if isinstance(x, Tensor) and x.is_contiguous() and x.layout == torch.strided and rng.random() < 0.5:
            changed[index] = guarded(x)
    case.note(f"{name}: {'; '.join(changes)}"[:600])
    try:
        results = func(*tree_unflatten(changed, spec))
    except (Exception, SystemError):
        if layout_only:
            raise
        return
    if layout_only:
        copies = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        expected = func(*tree_unflatten(copies, spec))
        for ours, truth in zip(tree_flatten(results)[0], tree_flatten(expected)[0], strict=True):
            if isinstance(ours, Tensor) and (fault := wrong(ours, truth, truth)):
                raise Broken(f"{name}: {fault}, in another layout of the same arguments")


def hostile_operators(case: Case, _: Any) -> None:
    """The calls that kernels/<op>/cases.py calls hostile: indices and lengths outside what they index."""
    for op in sorted(OPS):
        torch.manual_seed(case.rng.randrange(2**31))
        for index, call in enumerate(cases.load(op).hostile(torch.ops.bert_fast, "cpu")):
            case.note(f"{op}: hostile call {index}")
            try:
                call()
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue


def malformed(case: Case, _: Any) -> None:
    """The malformed calls of kernels/<op>/cases.py."""
    for op in sorted(OPS):
        torch.manual_seed(case.rng.randrange(2**31))
        for call in cases.load(op).malformed():
            case.note(f"{op}: {call.name}")
            try:
                call.call()
            except Exception as error:
                if not clear(error):
                    raise
            else:
                raise Broken(f"{op}: {call.name} is accepted")


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has, lowest first."""
    from bert_fast.kernels._common import extensions

    names = ["generic", "avx2", "avx512", "avx512bf16"]
    return names[: names.index(extensions.cpu_isa()) + 1]


ATTACKS = [
    Attack("kernels", "public functions", public_functions, share=5, quick=400),
    Attack("kernels", "raw operators", operators, share=4, quick=400),
    Attack("kernels", "hostile indices", hostile_operators, lambda material: [None], share=0.2, quick=1),
    Attack("kernels", "malformed calls", malformed, lambda material: [None], share=0.2, quick=1),
]
