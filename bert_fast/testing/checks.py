"""The checks of an op's contract, for any kernel; the inputs are the samples of the op's cases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common import cases
from bert_fast.kernels._common.cases import DTYPES, Sample
from bert_fast.testing.diagnosis import describe, likely_mistake
from bert_fast.testing.runs import Tensors, layouts, poisoned_memory, run, threads, transposed
from bert_fast.testing.three_way import as_tuple, compare, max_error, sample_triples

FEW = (3, 0, 2)  # tokens of two sequences and of an empty one between them
# Of a handful of values eager PyTorch's largest error may be far below the usual one, by luck.
FEW_VALUES = (3.0, 4.0)  # factor, floor in units in the last place
SEED = 0
# Two ways through a kernel may round differently, but not by more than a long sum in another order.
LAYOUT_ULPS = 16


class Target(NamedTuple):
    """The kernel under test.

    Args:
        op, impl, device: the op's name, the implementation's and the device to run on.
        own_mask: whether the kernel draws dropout masks of its own, not those of `_common/philox.py`.
        dtypes: the dtypes that it takes.
    """

    op: str
    impl: str
    device: str
    own_mask: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES


@dataclass(frozen=True)
class Finding:
    """One way in which a kernel breaks the contract."""

    check: str
    dtype: str
    case: str
    text: str
    mistake: str | None = None

    def __str__(self) -> str:
        looks = f"\n    looks like: {self.mistake}" if self.mistake else ""
        return f"{self.check}, {self.dtype}, case {self.case!r}: {self.text}{looks}"


Check = Callable[[Target, torch.dtype], Iterator[tuple[str, str, "str | None"]]]


def samples(target: Target, lengths: cases.Lengths = None) -> list[Sample]:
    """The op's samples; those with dropout only where the kernel takes our mask."""
    torch.manual_seed(SEED)
    result = cases.load(target.op).samples(lengths)
    return [sample for sample in result if not (target.own_mask and "rng_state" in sample.inputs)]


def check_accuracy(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """Outputs and gradients take the three-way test; memory that is not written is NaN."""
    for number, sample in enumerate(samples(target)):
        with poisoned_memory():
            torch.manual_seed(SEED + number)
            results = sample_triples(sample, target.impl, target.device, dtype)
        failed = [name for name, (_, comparison) in results.items() if not comparison.ok]
        if failed:
            arguments = (target.op, sample, target.device, dtype, results, SEED + number)
            mistake = likely_mistake(*arguments)
            if mistake is None and failed[0].startswith("out"):  # and another one in the backward pass
                mistake = likely_mistake(*arguments, gradients=False)
            yield sample.name, "\n    ".join(describe(name, *results[name], sample) for name in failed[:4]), mistake


def check_dropout(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """The mask to the bit, of our definition; else its rate, that it follows rng_state, and the expectation."""
    probe = cases.load(target.op).mask_probe
    if probe is None:
        return
    state = torch.tensor([1234 + (987 << 32), 5678], device=target.device)  # all 64 bits of the seed count
    out = probe.call(target.impl, state, target.device)
    kept = probe.kept(out)
    if not target.own_mask:
        expected = probe.kept(probe.call("reference", state, target.device))
        if not torch.equal(kept, expected):
            yield "mask", _mask_difference(kept, expected), _mask_mistake(target, kept, state)
        return
    if not torch.equal(probe.kept(probe.call(target.impl, state, target.device)), kept):
        yield "mask", "the same rng_state gives another mask", None
    if torch.equal(probe.kept(probe.call(target.impl, state + 1, target.device)), kept):
        yield "mask", "another rng_state gives the same mask", None
    share, count = float((~kept).double().mean()), kept.numel()
    # Five standard deviations of a binomial distribution, and half of the step of 1/256 that a kernel may round p to.
    allowed = 5 * (probe.dropout_p * (1 - probe.dropout_p) / count) ** 0.5 + 1 / 512
    if abs(share - probe.dropout_p) > allowed:
        yield "mask", f"{share:.4f} of the elements are dropped; expected {probe.dropout_p} +- {allowed:.4f}", None
    if probe.expected is not None and not abs(float(out.double().mean()) - probe.expected) <= 4 * allowed:
        mean = float(out.double().mean())
        yield "mask", f"the mean of the output is {mean:.4f}; expected {probe.expected}, the kept ones scaled", None


def _mask_difference(kept: Tensor, expected: Tensor) -> str:
    wrong = kept != expected
    first = [int(i) for i in wrong.nonzero()[0]]
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements of the dropout mask differ from the definition in "
        f"bert_fast/kernels/_common/philox.py, the first at {first}; {float((~kept).double().mean()):.4f} of them are "
        f"dropped, expected {float((~expected).double().mean()):.4f}"
    )


def _mask_mistake(target: Target, kept: Tensor, state: Tensor) -> str | None:
    probe = cases.load(target.op).mask_probe
    assert probe is not None
    exchanged, without_offset = state.flip(0), state * state.new_tensor([1, 0])
    low = state & state.new_tensor([2**32 - 1, -1])
    others = (
        ("seed and offset are exchanged", exchanged),
        ("the offset is not used", without_offset),
        ("the upper 32 bits of the seed are not used", low),
    )
    for name, other in others:
        if torch.equal(kept, probe.kept(probe.call("reference", other, target.device))):
            return name
    return "dropout is left out" if bool(kept.all()) else None


def check_determinism(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """The same bits again."""
    for sample in samples(target):
        inputs = sample.cast(dtype, target.device)
        first, second = (run(sample, target.impl, inputs) for _ in range(2))
        if difference := _different_bits(second, first):
            yield sample.name, f"{difference} when it is computed again", None


def check_threads(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """The same bits on other numbers of threads, on the CPU. PyTorch's own reductions over rows don't keep this."""
    for sample in samples(target) if target.device == "cpu" else ():
        inputs = sample.cast(dtype, target.device)
        with threads(1):
            expected = run(sample, target.impl, inputs)
        for count in (2, 3):
            with threads(count):
                if difference := _different_bits(run(sample, target.impl, inputs), expected):
                    yield sample.name, f"{difference} with {count} threads, compared with one", None
                    break


def _different_bits(results: Tensors, expected: Tensors) -> str:
    """Which results have other bits, and by how much; "" where none has."""
    different = [name for name in expected if not torch.equal(results[name], expected[name])]
    if not different:
        return ""
    name = different[0]
    return f"{', '.join(different)} has other bits ({name} by {max_error(results[name], expected[name]):.3g})"


def check_layouts(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """Strided, transposed, expanded and unaligned views of each argument give what contiguous tensors give."""
    sample = max(reversed(samples(target, FEW)), key=lambda sample: len(sample.inputs))
    inputs = sample.cast(dtype, target.device)
    for argument, x in inputs.items():
        for layout, view, dense in layouts(x):
            case = f"{argument}: {layout}"
            try:
                expected, results = (run(sample, target.impl, {**inputs, argument: value}) for value in (dense, view))
            except Exception as refusal:
                yield case, f"raised {type(refusal).__name__}: {refusal}", None
                continue
            different = [name for name in expected if _beyond_rounding(results[name], expected[name])]
            if different:
                # A degenerate input, such as equal rows, may have a result that is all rounding: so does the reference.
                exact = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
                exact[argument] = dense.double() if dense.is_floating_point() else dense
                truth = run(sample, "reference", exact)
            for name in different:
                error = max_error(results[name], truth[name])
                if error > 2 * max_error(expected[name], truth[name]) or error != error:
                    yield case, f"{name} has an error of {error:.3g}, which a contiguous {argument} does not have", None
                    break


def _beyond_rounding(x: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return False
    return max_error(x, expected) > LAYOUT_ULPS * torch.finfo(expected.dtype).eps * float(expected.abs().max())


def check_edges(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """A batch without tokens gives empty outputs and zero gradients; sequences of 3, 0 and 2 tokens, and of one."""
    for sample in samples(target, (0, 0)):
        results = run(sample, target.impl, sample.cast(dtype, target.device))
        for name, value in results.items():
            if value.isnan().any() or value.any():
                yield f"{sample.name}, no tokens", f"{name} is not zero in a batch without tokens", None
    for lengths in (FEW, (1,)):
        for sample in samples(target, lengths):
            torch.manual_seed(SEED)
            rows = sample_triples(sample, target.impl, target.device, dtype, *FEW_VALUES)
            for name, (triple, comparison) in rows.items():
                if not comparison.ok:
                    yield f"{sample.name}, lengths {lengths}", describe(name, triple, comparison, sample), None


def check_nan(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """A NaN in one row reaches what depends on it and nothing else."""
    for sample in samples(target):
        inputs = sample.cast(dtype, target.device)
        # The first floating-point argument has the rows of tokens, or of a table that they read.
        argument = next(name for name, x in inputs.items() if x.is_floating_point())
        x = inputs[argument]
        for row in sorted({0, x.shape[0] // 2, x.shape[0] - 1}):
            poisoned = {**inputs, argument: x.index_fill(0, torch.tensor([row], device=x.device), torch.nan)}
            results, expected = (run(sample, impl, poisoned) for impl in (target.impl, "reference"))
            for name, value in expected.items():
                extra = results[name].isnan() & ~value.isnan()
                missing = value.isnan() & ~results[name].isnan() if name.startswith("out") else extra & False
                where = f"a NaN in row {row} of {argument}"
                if extra.any():
                    index = [int(i) for i in extra.nonzero()[0]] if extra.dim() else []
                    yield sample.name, f"{where} reaches {int(extra.sum())} more elements of {name}: {index}", None
                elif missing.any():
                    yield sample.name, f"{where} does not reach {name}, which depends on it", None


def check_inputs(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """No input is written to."""
    for sample in samples(target, FEW):
        inputs = sample.cast(dtype, target.device)
        before: Tensors = {name: x.clone() for name, x in inputs.items()}
        run(sample, target.impl, inputs)
        for name, x in inputs.items():
            if not torch.equal(x, before[name]):
                yield sample.name, f"the kernel writes to its input {name}", None


def check_calls(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """A call neither remembers an earlier one nor changes its results, its gradients or its number of threads."""
    for sample in samples(target, FEW):
        inputs = sample.cast(dtype, target.device)
        count = torch.get_num_threads()
        generator = torch.get_rng_state()
        first = run(sample, target.impl, inputs)
        if not torch.equal(torch.get_rng_state(), generator):  # samples with dropout have an rng_state
            torch.set_rng_state(generator)
            yield sample.name, "the kernel seeds or advances PyTorch's random generator", None
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
            yield sample.name, "the kernel changes the number of threads", None
        with torch.no_grad():
            kept = as_tuple(sample.call(impl=target.impl, **inputs))
        copies = [out.clone() for out in kept]
        for x in inputs.values():
            if x.is_floating_point():
                x.mul_(0.5)
        with torch.no_grad():
            again = as_tuple(sample.call(impl=target.impl, **inputs))
            fresh = {name: x.clone() for name, x in inputs.items()}
            expected = as_tuple(sample.call(impl=target.impl, **fresh))
        if any(not torch.equal(out, copy) for out, copy in zip(kept, copies, strict=True)):
            yield sample.name, "a later call overwrites the output of an earlier one (memory that is used again)", None
        elif any(map(_beyond_rounding, again, expected)):
            yield sample.name, "inputs changed in place give the result of their old values (a cache)", None
        if sample.gradients and first:
            yield from ((sample.name, text, None) for text in _backward_calls(sample, target.impl, fresh))


def _backward_calls(sample: Sample, impl: str, inputs: Tensors) -> Iterator[str]:
    """What is wrong with the gradients of a second backward pass and of an expanded gradient of the output."""
    leaves = {name: x.detach().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    out = as_tuple(sample.call(impl=impl, **leaves))[0]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    row = torch.linspace(-1, 1, max(out.shape[-1], 1) if out.dim() else 1, device=out.device).to(out.dtype)
    views = {"expanded": (row if out.dim() else row[0]).expand(out.shape)}
    if out.dim() > 1:
        views["transposed"] = transposed(views["expanded"].contiguous())
    dense = views["expanded"].contiguous().clone()
    before = dense.clone()
    expected = torch.autograd.grad(out, list(wanted.values()), dense, retain_graph=True)
    if not torch.equal(dense, before):
        yield "the backward pass writes to the gradient of the output"
    for what, dout in {"contiguous gradient of the output, given again,": before, **views}.items():
        gradients = torch.autograd.grad(out, list(wanted.values()), dout, retain_graph=True)
        wrong = [name for name, *pair in zip(wanted, gradients, expected, strict=True) if _beyond_rounding(*pair)]
        if wrong:
            what = what if what.startswith("contiguous") else f"{what} gradient of the output"
            yield f"d{', d'.join(wrong)}: the {what} has other gradients than a contiguous one the first time"


def check_autocast(target: Target, dtype: torch.dtype) -> Iterator[tuple[str, str, str | None]]:
    """Under bfloat16 autocast: the reference's dtypes, and its error with a factor of 3."""
    if dtype != torch.float32 or torch.bfloat16 not in target.dtypes:
        return
    for sample in samples(target, FEW):
        inputs = sample.cast(torch.float32, target.device)
        with torch.autocast(target.device, torch.bfloat16):
            results, expected = (run(sample, impl, inputs) for impl in (target.impl, "reference"))
        exact = run(sample, "reference", sample.cast(torch.float64, target.device))
        for name, value in expected.items():
            if results[name].dtype != value.dtype:
                yield sample.name, f"{name} is {results[name].dtype} under autocast; expected {value.dtype}", None
            else:
                row = compare(name, results[name], value.bfloat16(), exact[name], 3.0)
                if not row.ok:
                    yield sample.name, f"{name} under autocast: error {row.ours:.3g} > {row.bound:.3g}", None


CHECKS: dict[str, Check] = {
    "accuracy": check_accuracy,
    "dropout": check_dropout,
    "determinism": check_determinism,
    "threads": check_threads,
    "layouts": check_layouts,
    "edges": check_edges,
    "nan": check_nan,
    "inputs": check_inputs,
    "calls": check_calls,
    "autocast": check_autocast,
}
# Of what is built on PyTorch's operators nobody can promise the bits on other numbers of threads.
DEFAULT_CHECKS = tuple(name for name in CHECKS if name != "threads")


def run_check(name: str, target: Target, dtype: torch.dtype) -> list[Finding]:
    """The findings of one check; an exception of the kernel is one."""
    findings: list[Finding] = []
    label = str(dtype).removeprefix("torch.")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        try:
            findings.extend(Finding(name, label, *found) for found in CHECKS[name](target, dtype))
        except Exception as error:
            findings.append(Finding(name, label, "all", f"raised {type(error).__name__}: {error}"))
    return findings
