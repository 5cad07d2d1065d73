"""What `bert-fast verify` checks of each kernel beside the three-way test of its samples.

- dropout: the rate, and that rows, columns, heads and steps are independent (fixed seeds);
- extremes: attention with scores of +-1e4 and with sequences of 0, 1 and 8192 tokens, LayerNorm of constant rows;
- leaks: the memory of the process and of the GPU over many calls.

And of each op: the gradients of its definition in float64, which are the truth of the three-way test, against finite
differences. Races need compute-sanitizer: `python -m benchmarks.gpu.sanitize`.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bert_fast.kernels import add_layer_norm, attention, embedding_layer_norm
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.cases import Sample
from bert_fast.kernels._common.library import simulated
from bert_fast.testing.three_way import Comparison, max_error, three_way

# A statistic that is normal in theory exceeds 5.5 standard deviations once in 26 million right masks.
DEVIATIONS = 5.5
STEP = 1e-5
# The central difference is off by STEP^2 times a third derivative of some units, and by eps / STEP times the sum.
GRADIENT_TOLERANCE = 1e-6
WARM_UP, CALLS = 12, 48
LEAKED_BYTES = 2**22  # a leaked output of a sample is 180 kB a call, 9 MB in all; an allocator grew by 3 MB here
LONGEST = 8192


@dataclass(frozen=True)
class Check:
    """One number beside its bound: `value` at most `bound`, else it failed; `error` where it raised instead.

    Attributes:
        kind: "dropout", "gradients", "extremes", "leaks" or "model".
        subject: what was checked: an op with implementation, device and dtype, or a head of a model.
        name: what was measured of it.
    """

    kind: str
    subject: str
    name: str
    value: float
    bound: float
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and self.value <= self.bound


def guarded(kind: str, subject: str, check: Callable[[], Iterator[tuple[str, float, float]]]) -> Iterator[Check]:
    """The rows of `check`; where it raises, a failed row instead of the end of the table."""
    try:
        for name, value, bound in check():
            yield Check(kind, subject, name, value, bound)
    except Exception as error:
        yield Check(kind, subject, "", math.inf, 0.0, f"{type(error).__name__}: {error}")


def check_gradients(op: str, seed: int = 0) -> Iterator[Check]:
    """The op's samples, small, in float64: each gradient of the definition against finite differences."""
    torch.manual_seed(seed)
    for sample in cases.load(op).samples((5, 0, 1, 9)):
        if sample.gradients:
            yield from guarded("gradients", f"{op} {sample.name}", partial(gradient_errors, sample))


def gradient_errors(sample: Sample) -> Iterator[tuple[str, float, float]]:
    """Of each input: the derivative in a random direction, relative to the gradient's norm."""
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in sample.inputs.items()}

    def loss(**inputs: Tensor) -> Tensor:
        outs = sample.call(**inputs, impl="reference")
        outs = outs if isinstance(outs, tuple) else (outs,)
        return torch.stack([(out * dout).sum() for out, dout in zip(outs, douts, strict=True)]).sum()

    outs = sample.call(**sample.inputs, impl="reference")
    douts = [torch.randn_like(out) for out in (outs if isinstance(outs, tuple) else (outs,))]
    loss(**leaves).backward()
    for name, leaf in leaves.items():
        if not leaf.is_floating_point():
            continue
        assert leaf.grad is not None, f"{name} got no gradient"
        direction = torch.randn_like(leaf)
        with torch.no_grad():
            above, below = (loss(**{**leaves, name: leaf + sign * STEP * direction}) for sign in (1, -1))
            difference = float(above - below) / (2 * STEP)
            error = abs(difference - float((leaf.grad * direction).sum()))
            yield f"d{name}", error / max(float(leaf.grad.norm()), 1e-30), GRADIENT_TOLERANCE


def check_kernel(op: str, impl: str, device: str, dtypes: list[torch.dtype], seed: int = 0) -> Iterator[Check]:
    """What the op has of dropout, extremes and leaks, of one implementation."""
    subject = f"{op} {impl} {device}"
    torch.manual_seed(seed)
    if cases.load(op).mask_probe is not None:
        yield from guarded("dropout", subject, partial(dropout_statistics, op, impl, device))
    extremes = {
        "attention": attention_extremes,
        "add_layer_norm": constant_rows,
        "embedding_layer_norm": constant_embeddings,
    }
    if op in extremes:
        for dtype in dtypes:
            row = f"{subject} {str(dtype).removeprefix('torch.')}"
            yield from guarded("extremes", row, partial(extremes[op], impl, device, dtype))
    if not simulated(impl):
        yield from guarded("leaks", subject, partial(leaks, op, impl, device, dtypes[0]))


def dropout_statistics(op: str, impl: str, device: str) -> Iterator[tuple[str, float, float]]:
    """Standard deviations of the rate and of the agreement of neighbouring rows, columns, heads, and of two steps."""
    probe = cases.load(op).mask_probe
    assert probe is not None
    states = (torch.tensor([11, 7]), torch.tensor([11, 8]))  # two steps of one seed
    first, second = (
        probe.kept(probe.call(impl=impl, rng_state=state.to(device), device=device)).cpu() for state in states
    )
    yield from mask_statistics(first, second, probe.dropout_p)


def mask_statistics(first: Tensor, second: Tensor, dropout_p: float) -> Iterator[tuple[str, float, float]]:
    """Of two masks (rows, ..., columns) of two steps: standard deviations, each with `DEVIATIONS` as its bound."""
    kept = torch.stack([first, second]).double()
    p = round(dropout_p * 256) / 256
    yield "rate", abs(float(kept.mean()) - (1 - p)) / math.sqrt(p * (1 - p) / kept.numel()), DEVIATIONS
    yield "rows", correlation(kept[:, 1:], kept[:, :-1], p), DEVIATIONS
    yield "columns", correlation(kept[..., 1:], kept[..., :-1], p), DEVIATIONS
    if kept.dim() > 3:
        yield "heads", correlation(kept[:, :, 1:], kept[:, :, :-1], p), DEVIATIONS
    yield "steps", correlation(kept[0], kept[1], p), DEVIATIONS


def correlation(x: Tensor, y: Tensor, dropout_p: float) -> float:
    """Standard deviations by which the correlation of two masks, of 0 and 1, is from 0: it has variance 1 / n."""
    mean, variance = 1 - dropout_p, dropout_p * (1 - dropout_p)
    return abs(float(((x - mean) * (y - mean)).mean())) / variance * math.sqrt(x.numel())


def attention_extremes(impl: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Scores of +-1e4, and sequences of 0, 1 and `LONGEST` tokens."""
    heads, dim = 2, 32
    large = torch.randn(50, 3, heads, dim, dtype=torch.float64)
    large[:, :2] = 0.0
    large[:, :2, :, 0] = 100.0 * torch.randn(50, 2, heads).sign()
    ends = torch.tensor([0, 1, 1, 34, 50], dtype=torch.int32, device=device)
    call = partial(attention, cu_seqlens=ends, max_seqlen=33, softmax_scale=1.0)
    rows = three_way(
        partial(call, impl=impl),
        partial(call, impl="reference"),
        {"qkv": large.to(device)},
        dtype,
        (torch.randn(50, heads, dim, device=device),),
        floor_ulps=4.0,  # dQ and dK are sums of terms 100 times as large that cancel
    )
    yield _worst("scores of +-1e4", rows)
    length = 130 if simulated(impl) else LONGEST
    places = torch.linspace(0, length - 1, 64, device=device).long()
    # Beside a sequence of 8192 the definition pads the others to its length: it takes it alone.
    together = impl != "reference"
    ends = torch.tensor([0, 0, 1, length + 1, length + 1] if together else [0, length], device=device).int()
    start = int(together)

    def ours(qkv: Tensor) -> Tensor:
        out = attention(torch.cat([qkv[:1], qkv]) if together else qkv, ends, length, impl=impl)
        if together:
            assert torch.equal(out[0], qkv[0, 2]), "the output of one token alone is not its value"
        return out[places + start]

    rows = three_way(
        ours,
        partial(_rows_of_attention, places=places),
        {"qkv": torch.randn(length, 3, 1, 16, dtype=torch.float64, device=device)},
        dtype,
        (torch.randn(64, 1, 16, device=device),),
        floor_ulps=(length / 24) ** 0.5,  # of the sums over all keys, as in `Sample.float32_ulps`
    )
    yield _worst(f"lengths 0, 1, {length}" if together else f"length {length}", rows)


def _rows_of_attention(qkv: Tensor, places: Tensor) -> Tensor:
    """The outputs of some tokens of one sequence: (R, N, D), without the scores of the others."""
    query, key, value = qkv.permute(1, 2, 0, 3).unbind(0)
    scores = query[:, places] @ key.transpose(1, 2) / qkv.shape[-1] ** 0.5
    return (scores.softmax(-1) @ value).transpose(0, 1)


def constant_rows(impl: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """LayerNorm of rows of one value is the bias; its gradients are finite."""
    width = 128
    x = torch.tensor([0.0, 1.0, -3.0, 0.5, 1000.0]).unsqueeze(1).repeat(1, width)
    tensors = [x, torch.zeros_like(x), 1 + 0.1 * torch.randn(width), torch.randn(width)]
    call = partial(add_layer_norm, eps=1e-5, impl=impl)
    yield from _is_bias(call, [t.to(device, dtype) for t in tensors])


def constant_embeddings(impl: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """The same of tables whose rows have one value each."""
    width, ids = 128, torch.arange(5, device=device)
    tables = [torch.tensor(values).unsqueeze(1).repeat(1, width) for values in ([0.0, 1, -3, 0.5, 100], [2.0], [1.0])]
    tensors = [*tables, 1 + 0.1 * torch.randn(width), torch.randn(width)]
    call = partial(embedding_layer_norm, ids, 0 * ids, 0 * ids, eps=1e-5, impl=impl)
    yield from _is_bias(call, [t.to(device, dtype) for t in tensors])


def _is_bias(call: Callable[..., Tensor], tensors: list[Tensor]) -> Iterator[tuple[str, float, float]]:
    leaves = [x.requires_grad_() for x in tensors]
    out, bias = call(*leaves), leaves[-1]
    out.backward(torch.randn_like(out))
    ulp = torch.finfo(out.dtype).eps * float(bias.detach().abs().max())
    yield "constant rows", max_error(out, bias.expand_as(out)), ulp
    yield "constant rows, gradients", sum(0.0 if _finite(x.grad) else math.inf for x in leaves), 0.0


def _finite(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all())


def _worst(name: str, comparisons: list[Comparison]) -> tuple[str, float, float]:
    worst = max(comparisons, key=lambda c: c.ours / c.bound if c.bound else c.ours and math.inf)
    return f"{name}, {worst.name}", worst.ours, worst.bound


def leaks(op: str, impl: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Bytes by which `CALLS` forward and backward passes raise the memory of the process, and of the GPU.

    The least of three measurements: an allocator grows once, a leak with every call. Where the system has no
    /proc/self/statm, the process's is not measured.
    """
    sample = next(iter(cases.load(op).samples()))
    inputs = sample.cast(dtype, device)
    if sample.gradients:
        inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}

    def calls(count: int) -> None:
        for _ in range(count):
            outs = sample.call(**inputs, impl=impl)
            if sample.gradients:
                outs = outs if isinstance(outs, tuple) else (outs,)
                torch.stack([out.float().sum() for out in outs]).sum().backward()
                for x in inputs.values():
                    x.grad = None

    yield from growth(partial(calls, WARM_UP), partial(calls, CALLS), device)


def growth(warm_up: Callable[[], None], calls: Callable[[], None], device: str) -> Iterator[tuple[str, float, float]]:
    """The rows of `leaks` for any calls."""
    warm_up()
    grown: dict[str, float] = {}
    for _ in range(3):
        before = _memory(device)
        calls()
        after = _memory(device)
        grown = {name: min(grown.get(name, math.inf), after[name] - before[name]) for name in after}
        if all(value <= LEAKED_BYTES for value in grown.values()) and grown.get("bytes of the GPU", 0.0) <= 0:
            break
    for name, value in grown.items():
        yield name, max(value, 0.0), 0.0 if name == "bytes of the GPU" else LEAKED_BYTES


def _memory(device: str) -> dict[str, float]:
    gc.collect()
    sizes: dict[str, float] = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        sizes["bytes of the process"] = float(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    if device == "cuda":
        torch.cuda.synchronize()
        sizes["bytes of the GPU"] = float(torch.cuda.memory_allocated())
    return sizes


def check_kernels(parts: Sequence[tuple[str, str, str, torch.dtype]], seed: int = 0) -> Iterator[Check]:
    """The checks of this module for `bert_fast.verification.parts`: each op's gradients, then each implementation."""
    kernels: dict[tuple[str, str, str], list[torch.dtype]] = {}
    for op, impl, device, dtype in parts:
        kernels.setdefault((op, impl, device), []).append(dtype)
    with torch.random.fork_rng(devices=[]):
        for op in dict.fromkeys(op for op, _, _ in kernels):
            yield from check_gradients(op, seed)
        for (op, impl, device), dtypes in kernels.items():
            # The definition is the yardstick, not what is checked: one dtype shows that the checks pass on it.
            tested = dtypes[:1] if (impl, device) == ("reference", "cpu") else dtypes
            yield from check_kernel(op, impl, device, tested, seed)
