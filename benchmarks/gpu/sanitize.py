"""compute-sanitizer over the operators in Triton and in CUDA C++.

    python -m benchmarks.gpu.sanitize [--ops attention ...] [--impls triton cuda] [--tools ...] [--jobs 28] [--record]

Tools: memcheck (out of bounds, misaligned) and racecheck (shared memory), for CUDA C++ also initcheck (memory that
nobody wrote) and synccheck (barriers). For each op, implementation and tool a process of its own runs `--run OP
--impls IMPL` under the sanitizer: the cases of `bert-fast verify`,
forward and backward, float32 and bfloat16, with and without dropout, and then the operators with cu_seqlens, ids,
labels and indices that are wrong: they may refuse them, but not touch memory that is not theirs. torch's allocator
caches nothing there, so that each tensor is an allocation whose ends the sanitizer knows. A Triton kernel of the op
that none of this launches is a failure.

Where the tool or the device is missing, the result is "not run", never "passed". Exit code 0: every op passed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner.devices import environment, machine_of
from benchmarks.runner.runner import RESULTS, write
from bert_fast.kernels import add_layer_norm, attention, clip_scale, lamb_step
from bert_fast.kernels._common import dispatch
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.testing import operators, outputs_and_gradients
from bert_fast.verification import CASES

TOOLS = {"triton": ("memcheck", "racecheck"), "cuda": ("memcheck", "racecheck", "initcheck", "synccheck")}
FOUND = 86  # exit code of the sanitizer where it found something
DTYPES = (torch.float32, torch.bfloat16)
STATE = (1234, 5678)
T, E, V = 67, 48, 31  # small and odd: no multiple of a tile


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def command(tool: str, op: str, impl: str) -> list[str]:
    path = sanitizer()
    assert path is not None
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    # Space behind each allocation, so that a step past the end of one tensor is not the start of the next.
    options += ["--padding", "256"] if tool == "memcheck" else []
    return [path, *options, sys.executable, "-m", "benchmarks.gpu.sanitize", "--run", op, "--impls", impl]


def verified_cases(op: str, impl: str, device: str) -> int:
    """The cases of `bert-fast verify`, forward and backward; returns how many ran."""
    count = 0
    for dtype in DTYPES:
        for case in CASES[op]():

            def call(run: Callable[..., Any] = case.call, **inputs: Any) -> Any:
                return run(impl=impl, **inputs)

            inputs = {name: x.to(device) for name, x in case.inputs.items()}
            floating = {name for name, x in inputs.items() if x.is_floating_point()}
            low = {name: torch.float32 if name in case.parameters else dtype for name in floating}
            if case.gradients:
                with torch.no_grad():
                    outs = call(**{name: x.to(low[name]) if name in low else x for name, x in inputs.items()})
                douts = tuple(torch.randn_like(out) for out in (outs if isinstance(outs, tuple) else (outs,)))
                outputs_and_gradients(call, inputs, low, douts)
            else:
                call(**{name: x.to(low[name]) if name in low else x for name, x in inputs.items()})
            count += 1
    return count


def wrong_ids(good: int) -> Tensor:
    """T ids of which some are below 0, some at or past `good`, some far away."""
    ids = torch.arange(T) % good
    ids[1::7], ids[2::7], ids[3::7], ids[4::7] = -1, good, 2**31 + 5, -(2**40)
    return ids


def malformed_attention(impl: str, device: str) -> list[Callable[[], Any]]:
    ops = operators(impl)
    packs = [  # of D 64 in 16 bits Hopper has kernels of its own
        (torch.randn(T, 3, 2, dim, device=device, dtype=dtype), torch.randn(T, 2, dim, device=device, dtype=dtype))
        for dim, dtype in ((32, torch.float32), (64, torch.bfloat16))
    ]
    state, lse = torch.tensor(STATE, device=device), torch.randn(2, T, device=device)
    wrong = (
        [0, 40, 20, T],  # falls
        [0, 30, 5000, T],  # past the end
        [-7, 20, T],  # before the start
        [0, T, T + 9],  # ends behind T
        [0, 2**31 - 1, -(2**31), T],
    )

    def both(ends: Tensor, longest: int) -> None:
        rest = (ends, longest, 0.2, 0.1, state)
        for qkv, dout in packs:
            ops.attention_fwd(qkv, None, *rest)
            ops.attention_bwd(dout, qkv, None, dout, lse, *rest)

    tensors = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in wrong]
    good = torch.tensor([0, 50, T], dtype=torch.int32, device=device)
    calls: list[Callable[[], Any]] = [lambda ends=ends: both(ends, 64) for ends in tensors]  # type: ignore[misc]
    return [*calls, lambda: both(good, 17), lambda: both(tensors[1], 4096)]  # longer and shorter than max_seqlen


def malformed_embedding(impl: str, device: str) -> list[Callable[[], Any]]:
    ops = operators(impl)
    word, types, position = (torch.randn(rows, E, device=device) for rows in (V, 2, 16))
    weight, dout = torch.randn(E, device=device), torch.randn(T, E, device=device)
    ids = [wrong_ids(rows).to(device) for rows in (V, 2, 16)]
    state = torch.tensor(STATE, device=device)

    def both() -> None:
        _, mean, rstd = ops.embedding_layer_norm_fwd(
            *ids, word, types, position, weight, weight, 0.1, 1e-12, 0, state, torch.float32
        )
        ops.embedding_layer_norm_bwd(dout, *ids, word, types, position, weight, mean, rstd, 0.1, 0, state)

    return [both]


def malformed_loss(impl: str, device: str) -> list[Callable[[], Any]]:
    """Through the door: on CUDA it does not read the labels, and the operator's list of settings is the op's own."""
    from bert_fast.kernels import masked_lm_loss

    shapes = ((T, E), (E, E), (E,), (E,), (E,), (V, E), (V,))
    hidden, *parameters = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    labels = wrong_ids(V).to(device)
    return [lambda: masked_lm_loss(hidden, labels, *parameters, impl=impl).loss.backward()]


def malformed_padding(impl: str, device: str) -> list[Callable[[], Any]]:
    ops = operators(impl)
    x, indices = torch.randn(T, E, device=device), wrong_ids(80).to(device)
    return [
        lambda: ops.gather_rows(torch.randn(80, E, device=device), indices),
        lambda: ops.scatter_rows(x, indices, 80),
        lambda: ops.scatter_rows(x, indices.flip(0), 3),
    ]


MALFORMED: dict[str, Callable[[str, str], list[Callable[[], Any]]]] = {
    "attention": malformed_attention,
    "embedding_layer_norm": malformed_embedding,
    "masked_lm_loss": malformed_loss,
    "padding": malformed_padding,
}


def long_attention(impl: str, device: str) -> None:
    """Sequences that take several blocks of keys, in bfloat16, where `bert-fast verify` has short ones alone."""
    ends = torch.tensor([0, 150, 150, 193, 202], dtype=torch.int32, device=device)
    for D in (32, 64, 128):
        qkv = torch.randn(202, 3, 1, D, device=device, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(3, 1, D, device=device, requires_grad=True)
        state = torch.tensor(STATE, device=device)
        attention(qkv, ends, 150, bias=bias, dropout_p=0.1, rng_state=state, impl=impl).sum().backward()


def clipped_lamb(impl: str, device: str) -> None:
    """The global norm over tensors of several chunks, on addresses that are no multiple of 16 bytes."""
    params = [torch.randn(size, device=device)[1:] for size in (70_001, 3, 34)]
    grads = [torch.randn_like(param) for param in params]
    states = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    scale = clip_scale(grads, 1.0, impl=impl).scale
    lamb_step(params, grads, *states, step=1, lr=0.01, grad_scale=scale, impl=impl)


def wide_add_layer_norm(impl: str, device: str) -> None:
    """Rows that no program holds, whose x_bias gets its gradient from a kernel of its own."""
    x, residual = (torch.randn(5, 8100, device=device, requires_grad=True) for _ in range(2))
    weight, bias, x_bias = (torch.randn(8100, device=device, requires_grad=True) for _ in range(3))
    state = torch.tensor(STATE, device=device)
    out = add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=0.1, rng_state=state, impl=impl)
    out.sum().backward()


MORE: dict[str, Callable[[str, str], None]] = {
    "add_layer_norm": wide_add_layer_norm,
    "attention": long_attention,
    "lamb": clipped_lamb,
}


def kernels_of(op: str) -> set[str]:
    """The op's kernels as "module.name"; a function that kernels call has no name that ends so."""
    found = set()
    for path in Path(dispatch.__file__).parents[1].glob(f"{op}/triton_*.py"):
        module = importlib.import_module(f"bert_fast.kernels.{op}.{path.stem}")
        found |= {f"{path.stem}.{name}" for name, value in vars(module).items() if _is_kernel(name, value, module)}
    return found


def _is_kernel(name: str, value: Any, module: Any) -> bool:
    return name.endswith("kernel") and getattr(getattr(value, "fn", None), "__module__", "") == module.__name__


@contextmanager
def launches() -> Iterator[set[str]]:
    """The kernels that are launched within the block, as "module.name"."""
    from triton.runtime.jit import KernelInterface

    found: set[str] = set()
    before = KernelInterface.__getitem__

    def noted(kernel: Any, grid: Any) -> Any:
        found.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")
        return before(kernel, grid)

    KernelInterface.__getitem__ = noted
    try:
        yield found
    finally:
        KernelInterface.__getitem__ = before


def run_op(op: str, impl: str, device: str) -> int:
    """What runs under the sanitizer: a line says how far it came."""
    torch.manual_seed(0)
    slot = OPS[op].impls[impl]
    if not slot.availability.ok:
        print(f"{op}: not run: {slot.availability.reason}")
        return 0
    kernels = kernels_of(op) if impl == "triton" else set()
    with launches() if kernels else nullcontext(set()) as launched:
        ran = verified_cases(op, impl, device)
        if op in MORE:
            MORE[op](impl, device)
        malformed, refused = run_malformed(op, impl, device)
    missing = sorted(kernels - launched)
    if missing:
        print(f"{op}: never launched: {', '.join(missing)}")
        return 1
    said = f"{ran} cases, {malformed} malformed calls of which {refused} refused, {len(kernels)} Triton kernels"
    print(f"{op}: done: {said}")
    return 0


def run_malformed(op: str, impl: str, device: str) -> tuple[int, int]:
    """How many malformed calls ran, and how many of them were refused."""
    calls = MALFORMED[op](impl, device) if op in MALFORMED else []
    refused = 0
    for call in calls:
        try:
            call()
        except (ValueError, IndexError, RuntimeError) as error:
            if "CUDA error" in str(error):
                raise
            refused += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return len(calls), refused


def judge(tool: str, op: str, impl: str, code: int, output: str, seconds: float) -> dict[str, Any]:
    """One entry of the report. Passed: the script came to its end, and the sanitizer's summary has no error."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    done = re.search(rf"^{op}: (done|not run): (.*)$", output, re.MULTILINE)
    entry: dict[str, Any] = {"op": op, "impl": impl, "tool": tool, "seconds": round(seconds, 1), "exit_code": code}
    if done and done[1] == "not run":
        return entry | {"result": "not run", "reason": done[2]}
    if re.search(r"Device not supported|Unable to find|No such file|not supported on this", output) and not done:
        return entry | {"result": "not run", "reason": _last_line(output)}
    if code == 0 and done and summary and int(summary[-1]) == 0:
        return entry | {"result": "passed", "reason": done[2]}
    never = re.search(rf"^{op}: (never launched: .*)$", output, re.MULTILINE)
    return entry | {
        "result": "failed",
        "reason": never[1] if never else f"{summary[-1]} errors" if summary else "no summary: " + _last_line(output),
        "output": output[-6000:],
    }


def _last_line(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def sanitize(tool: str, op: str, impl: str, limit: float) -> dict[str, Any]:
    """Run an implementation of an op under a tool, at most `limit` seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command(tool, op, impl),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seconds = round(time.perf_counter() - begin, 1)
        return {
            "op": op, "impl": impl, "tool": tool, "seconds": seconds, "exit_code": None,
            "result": "not run", "reason": f"cut after {limit:.0f} s",
        }  # fmt: skip
    return judge(tool, op, impl, process.returncode, output, time.perf_counter() - begin)


def missing() -> str:
    """Why nothing can be run here, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if sanitizer() is None:
        return "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin: it comes with the CUDA toolkit"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="compute-sanitizer over the Triton and CUDA kernels")
    parser.add_argument("--ops", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--impls", nargs="+", choices=sorted(TOOLS), default=sorted(TOOLS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS["cuda"], default=list(TOOLS["cuda"]))
    parser.add_argument("--jobs", type=int, default=28, help="processes at a time")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one op under one tool")
    parser.add_argument("--record", action="store_true", help="write results/<device>/sanitizer.json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--run", choices=sorted(CASES), help="what runs under the sanitizer: one op and impl, here")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="of --run; cpu under TRITON_INTERPRET=1"
    )
    options = parser.parse_args()
    if options.run:
        return run_op(options.run, options.impls[0], options.device)
    runs = [
        (tool, op, impl)
        for impl in options.impls
        for tool in TOOLS[impl]
        for op in options.ops
        if tool in options.tools and impl != "reference" and impl in OPS[op].impls
    ]
    reason = missing()
    if reason:
        entries = [
            {"op": op, "impl": impl, "tool": tool, "result": "not run", "reason": reason} for tool, op, impl in runs
        ]
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            entries = list(pool.map(lambda run: sanitize(*run, options.limit), runs))
    for entry in entries:
        print(f"{entry['op']:<21} {entry['impl']:<7} {entry['tool']:<10} {entry['result']:<8} {entry['reason']}")
        if entry["result"] == "failed":
            print("    " + "\n    ".join(entry["output"].splitlines()[-25:]))
    if options.record:
        about = environment(machine_of(None))
        print(f"written: {write({'environment': about, 'results': entries}, 'sanitizer', options.results)}")
    return 0 if all(entry["result"] == "passed" for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
