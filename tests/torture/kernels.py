"""Attacks on the ops: calls from the samples of kernels/<op>/cases.py with arguments changed, on each instruction set.

A public function raises a clear error, or returns what the reference returns in float64. A raw operator
(torch.ops.bert_fast.*), which checks no values, raises or returns; with arguments that say the same in another layout
it returns the same. Nothing crashes or hangs: half of the tensors end at a page that can't be read.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
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
from tests.torture.tensors import LAYOUTS, NUMBERS, change, change_layout, guarded, wrong

Call = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_LENGTHS = ((3, 0, 2), (1, 17, 40), (5,))
# Functions of bert_fast.kernels that compute nothing on tensors.
_OTHERS = {
    "Availability",
    "ClipScale",
    "ImplUnavailableError",
    "Int8Weight",
    "MaskedLMLoss",
    "Unpadded",
    "register",
    "unregister",
}
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
    kwargs = dict(kwargs)
    changes = []
    if rng.random() < 0.25:
        optional = [key for key in _optional(function) if key not in kwargs]
        if optional:
            key = rng.choice(optional)
            kwargs[key] = rng.choice(NUMBERS)
            changes.append(f"{key} = {kwargs[key]!r}")
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [_cast(x, dtype) for x in leaves]
    for index in rng.sample(range(len(leaves)), min(len(leaves), rng.choice([1, 1, 2, 3]))):
        what, leaves[index] = change(leaves[index], rng)
        changes.append(f"leaf {index} {what}")
    for index, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.is_contiguous() and x.layout == torch.strided and rng.random() < 0.5:
            leaves[index] = guarded(x)
    impls = [
        impl for impl, state in available_impls()[_op(function)].items() if state.ok and impl in ("cpu", "reference")
    ]
    options = {} if name == "quantize_weight" else {"impl": rng.choice(["auto", *impls])}
    gradients = rng.random() < 0.4
    case.note(f"{name} {str(dtype)[6:]} {options.get('impl')} gradients={gradients}: {'; '.join(changes)}"[:600])
    _compare(name, function, leaves, spec, options, gradients)


def _optional(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that have a default, but `impl`."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is not inspect.Parameter.empty and p.name != "impl"]


def _op(function: Callable[..., Any]) -> str:
    return next(op for op in OPS if function.__module__.startswith(f"bert_fast.kernels.{op}."))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _compare(
    name: str, function: Callable[..., Any], leaves: list[Any], spec: Any, options: dict[str, Any], gradients: bool
) -> None:
    """`Broken` unless the call raises a clear error or gives the reference's value in float64."""
    state = torch.random.get_rng_state()
    try:
        ours = _outputs(function, leaves, spec, options, gradients)
    except Exception as error:
        if not (isinstance(error, RuntimeError) and "memory" in str(error)):  # a size that no machine has
            require_clear(error, name)
        return
    reference = {"impl": "reference"} if options else {}
    torch.random.set_rng_state(state)
    eager = _outputs(function, leaves, spec, reference, gradients)
    torch.random.set_rng_state(state)
    truth = _outputs(function, [_precise(x) for x in leaves], spec, reference, gradients)
    for index, triple in enumerate(zip(ours, eager, truth, strict=True)):
        if fault := wrong(*triple):
            raise Broken(f"{name}: output {index}: {fault}")


def layouts(case: Case, parameter: Any) -> None:
    """One tensor argument of a valid call in another layout."""
    number, leaf, layout, dtype, gradients = parameter
    name, function, args, kwargs = public_calls()[number]
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [_cast(x, getattr(torch, dtype)) for x in leaves]
    leaves[leaf] = change_layout(layout, leaves[leaf])
    case.note(f"{name} {dtype} gradients={gradients}: leaf {leaf} {layout}")
    _compare(name, function, leaves, spec, {} if name == "quantize_weight" else {"impl": "auto"}, gradients)


def _layouts(material: Any) -> list[Any]:
    """Of each public function the call with the most tensors, each of them in each layout."""
    richest: dict[str, tuple[int, list[int]]] = {}
    for number, (name, _, args, kwargs) in enumerate(public_calls()):
        tensors = [i for i, x in enumerate(tree_flatten((args, kwargs))[0]) if isinstance(x, Tensor)]
        if len(tensors) >= len(richest.get(name, (0, []))[1]):
            richest[name] = number, tensors
    return [
        (number, leaf, layout, dtype, gradients)
        for number, tensors in richest.values()
        for leaf in tensors
        for layout in (*LAYOUTS, "expanded")
        for dtype in ("float32", "bfloat16")
        for gradients in (False, True)
    ]


def derivatives(case: Case, _: Any) -> None:
    """Second derivatives, forward mode and torch.func: an error, or the reference's value in float64; never a zero."""
    rng = case.rng
    calls = [call for call in public_calls() if call[0] in _DIFFERENTIABLE]
    name = rng.choice(_DIFFERENTIABLE)
    _, function, args, kwargs = rng.choice([call for call in calls if call[0] == name])
    dtype = rng.choice([torch.float32, torch.bfloat16])
    leaves, spec = tree_flatten((args, kwargs))
    at = [index for index, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    at = rng.sample(at, rng.randint(1, len(at)))
    mode = rng.choice(list(_MODES))
    case.note(f"{name} {str(dtype)[6:]}: {mode} of leaves {at}")

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        cast = [_cast(_cast(x, case_dtype), dtype) for x in leaves]

        def f(*tensors: Tensor) -> Tensor:
            filled = list(cast)
            for index, x in zip(at, tensors, strict=True):
                filled[index] = x
            new_args, new_kwargs = tree_unflatten(filled, spec)
            outs = tree_flatten(function(*new_args, **new_kwargs, impl=impl))[0]
            out = next(x for x in outs if isinstance(x, Tensor) and x.is_floating_point())
            return (out * torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)).sum()

        return [x.detach() for x in _MODES[mode](f, tuple(cast[index] for index in at))]

    case_dtype = dtype
    state = torch.random.get_rng_state()
    try:
        ours = run("auto", dtype)
    except (RuntimeError, ValueError, TypeError) as error:  # NotImplementedError is one
        if not str(error):
            raise Broken(f"{name}: {mode}: an error without a message") from error
        return
    torch.random.set_rng_state(state)
    eager = run("reference", dtype)
    torch.random.set_rng_state(state)
    for x, y, z in zip(ours, eager, run("reference", torch.float64), strict=True):
        if fault := wrong(x, y, z):
            raise Broken(f"{name}: {mode}: {fault}")


def _second(f: Callable[..., Tensor], xs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    xs = tuple(x.detach().requires_grad_() for x in xs)
    first = torch.autograd.grad(f(*xs), xs, create_graph=True)
    total = sum(x.float().square().sum() if x.dtype != torch.float64 else x.square().sum() for x in first)
    assert isinstance(total, Tensor)
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    second = torch.autograd.grad(total, xs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(xs, second, strict=True)]


def _forward(f: Callable[..., Tensor], xs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) for x in xs]
        tangent = torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent
    return [xs[0].new_zeros(()) if tangent is None else tangent]


def _jvp(f: Callable[..., Tensor], xs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    return list(torch.func.jvp(f, xs, tuple(torch.ones_like(x) for x in xs)))


def _func_grad(f: Callable[..., Tensor], xs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    return list(torch.func.grad(f, tuple(range(len(xs))))(*xs))


def _hessian_vector(f: Callable[..., Tensor], xs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    gradient = torch.func.grad(f, tuple(range(len(xs))))
    return list(torch.func.jvp(gradient, xs, tuple(torch.ones_like(x) for x in xs))[1])


_MODES: dict[str, Callable[..., Sequence[Tensor]]] = {
    "second derivative": _second,
    "forward mode": _forward,
    "torch.func.jvp": _jvp,
    "torch.func.grad": _func_grad,
    "Hessian-vector product": _hessian_vector,
}
_DIFFERENTIABLE = (
    "attention",
    "add_layer_norm",
    "bias_gelu",
    "embedding_layer_norm",
    "linear",
    "masked_lm_loss",
    "pad",
)


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


def _recorded(material: Any) -> None:
    """Endless cases; records the calls here, so that the forks need not."""
    public_calls()
    operator_calls()


def _once(material: Any) -> list[None]:
    return [None]


ATTACKS = [
    Attack("kernels", "public functions", public_functions, _recorded, share=5, quick=300),
    Attack("kernels", "layouts", layouts, _layouts, share=2, quick=150),
    Attack("kernels", "derivatives", derivatives, _recorded, share=1, quick=40),
    Attack("kernels", "raw operators", operators, _recorded, share=4, quick=300),
    Attack("kernels", "hostile indices", hostile_operators, _once, share=0.2, quick=1),
    Attack("kernels", "malformed calls", malformed, _once, share=0.2, quick=1),
]
