"""Compile every Triton kernel ahead of time, for every GPU that is supported, on a machine without one.

    python -m benchmarks.reports.compile_report            compare with the checked-in table; exit code 1 where stale
    python -m benchmarks.reports.compile_report --sample   compile each kernel once more, for sm_90, and compare it too
    python -m benchmarks.reports.compile_report --write    compile what is new or changed and write the table

A row of `results/triton_compile.json` is one kernel in one configuration that dispatch can choose (dtypes, constexprs,
warps, stages) on one architecture: registers a thread, bytes of stack (what Triton spills), bytes of shared memory, and
the matrix instructions in the machine code. `sources` is the hash of the kernel and what it calls: rows whose hash is
still right are not compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from benchmarks.reports.compile_cases import CASES
from bert_fast.kernels._common.triton_launch import Launch, recording

TABLE = Path(__file__).parents[1] / "results" / "triton_compile.json"
ARCHITECTURES = (80, 90, 100, 120)
# Shared memory that one block may take, in bytes: CUDA C++ programming guide, compute capabilities.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# The most bytes of stack a kernel may have on an architecture. All are attention's: its tiles are chosen for Hopper,
# where 16 bits don't spill at all; where products go to HMMA, accumulators take more registers. float32's dQ spills at
# D 64 (8 bytes) and 256 on Hopper too. Which rows: kernels/attention/README.md.
KNOWN_SPILLS = {
    ("attention.bwd_one_kernel", "sm_120"): 16,
    ("attention.dkv_kernel", "sm_80"): 16,
    ("attention.dkv_kernel", "sm_100"): 56,
    ("attention.dkv_kernel", "sm_120"): 144,
    ("attention.dq_kernel", "sm_80"): 792,
    ("attention.dq_kernel", "sm_90"): 136,
    ("attention.dq_kernel", "sm_100"): 136,
    ("attention.dq_kernel", "sm_120"): 816,
    ("attention.fwd_kernel", "sm_80"): 288,
    ("attention.fwd_kernel", "sm_100"): 48,
    ("attention.fwd_kernel", "sm_120"): 240,
}
MATRIX = re.compile(r"\b(HGMMA|HMMA|IMMA|UTC\w*MMA|QGMMA)\b")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Signature, constexprs and the arguments divisible by 16, as Triton's own launcher would make them."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    aligned = []
    for param in launch.kernel.params:
        value = launch.arguments[param.name]
        specialised = not param.do_not_specialize
        if isinstance(value, Tensor):
            signature[param.name] = f"*{_TYPES[value.dtype]}"
            aligned.append(param.name)  # torch's allocations are
        elif param.is_constexpr or value is None or (specialised and value == 1 and isinstance(value, int)):
            signature[param.name] = "constexpr"
            constexprs[param.name] = value
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                aligned.append(param.name)
    return signature, constexprs, aligned


def describe(launch: Launch, architecture: int) -> dict[str, Any]:
    """What identifies a row."""
    signature, constexprs, aligned = specialise(launch)
    kinds = {name: kind + ("/16" if name in aligned and kind[0] == "i" else "") for name, kind in signature.items()}
    return {
        "kernel": f"{launch.kernel.fn.__module__.split('.')[2]}.{launch.kernel.fn.__name__}",
        "arch": f"sm_{architecture}",
        "arguments": " ".join(kind for kind in kinds.values() if kind != "constexpr"),
        "constexprs": " ".join(f"{name}={value}" for name, value in constexprs.items()),
        "warps": launch.num_warps,
        "stages": launch.num_stages,
    }


def sources(kernel: Any) -> str:
    """Hash of the kernel's source, of the functions that it calls, and of the compiler's version."""
    # Triton's key of a function has the constants of those it calls only where their keys were there before.
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, triton.JITFunction) and called.hash is None and called is not kernel:
            sources(called)
    return hashlib.sha256(f"{kernel.cache_key} {triton.__version__}".encode()).hexdigest()[:12]


@functools.cache
def launches() -> list[Launch]:
    """Every launch of every op's cases, each configuration once."""
    found: dict[str, Launch] = {}
    for cases in CASES.values():
        with recording() as recorded:
            cases()
        for launch in recorded:
            found.setdefault(json.dumps(describe(launch, 0)), launch)
    return [found[key] for key in sorted(found)]


def compiled(launch: Launch, architecture: int) -> dict[str, Any]:
    """Compile one configuration and read the machine code's resources."""
    signature, constexprs, aligned = specialise(launch)
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(launch.kernel, signature, {(names.index(n),): v for n, v in constexprs.items()}, attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = CUDABackend(target).parse_options({"num_warps": launch.num_warps, "num_stages": launch.num_stages})
    result = triton.compile(source, target=target, options=options.__dict__)
    usage = cuobjdump("--dump-resource-usage", result.asm["cubin"])
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    # Disassembling takes longer than compiling. Without such an instruction in the PTX the machine code has none.
    code = cuobjdump("--dump-sass", result.asm["cubin"]) if "mma" in result.asm["ptx"] else ""
    return {
        "registers": registers,
        "stack": stack,
        "shared": result.metadata.shared,
        "matrix": " ".join(sorted(set(MATRIX.findall(code)))),
    }


def cuobjdump(option: str, cubin: bytes) -> str:
    """What cuobjdump, which comes with Triton, prints about a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _row(index_and_architecture: tuple[int, int]) -> dict[str, Any]:
    index, architecture = index_and_architecture
    launch = launches()[index]  # kernels don't pickle; each process records them for itself
    return describe(launch, architecture) | {"sources": sources(launch.kernel)} | compiled(launch, architecture)


def key(row: dict[str, Any]) -> str:
    names = ("kernel", "arch", "arguments", "constexprs", "warps", "stages", "sources")
    return json.dumps([row[name] for name in names])


def wanted() -> dict[str, tuple[int, int]]:
    """The key of every row that the table must have, and which launch and architecture it is."""
    return {
        key(describe(launch, architecture) | {"sources": sources(launch.kernel)}): (index, architecture)
        for index, launch in enumerate(launches())
        for architecture in ARCHITECTURES
    }


def read() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return rows


def write(rows: Iterable[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    TABLE.write_text(f"[\n{lines}\n]\n")


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: a spill beyond what is known, or more shared memory than a block may have."""
    name = f"{row['kernel']} {row['arch']} ({row['arguments']}; {row['constexprs']})"
    limit, known = SHARED_LIMIT[int(row["arch"][3:])], KNOWN_SPILLS.get((row["kernel"], row["arch"]), 0)
    found = [f"{name}: {row['stack']} bytes of stack, {known} are known"] if row["stack"] > known else []
    return found + ([f"{name}: {row['shared']} of {limit} bytes of shared memory"] if row["shared"] > limit else [])


def compile_all(where: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The rows of launches by index and architecture as they are compiled, a process a core."""
    # Not forked: a copy of a process that holds the compiler's threads can wait for them for ever.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        yield from pool.map(_row, where)


def differences(rows: dict[str, tuple[int, int]], table: dict[str, dict[str, Any]]) -> list[str]:
    """Compile the first row of each kernel on sm_90 anew: which of the table's figures are other ones."""
    sample: dict[str, tuple[int, int]] = {}
    for name, where in rows.items():
        if where[1] == 90:
            sample.setdefault(table[name]["kernel"], where)
    found = []
    for row in compile_all(list(sample.values())):
        if (old := table[key(row)]) != row:
            found.append(f"{row['kernel']} {row['arch']}: the table says {old}, compiled now {row}")
    return found


def main() -> int:
    table = {key(row): row for row in read()}
    rows = wanted()
    missing = [where for name, where in rows.items() if name not in table]
    if "--write" in sys.argv[1:]:
        try:
            for row in compile_all(missing):
                table[key(row)] = row
        finally:
            write(table[name] for name in rows if name in table)  # what an interrupted run compiled is kept
        print(f"{TABLE.name}: {len(rows)} rows, {len(missing)} of them compiled now")
    elif missing or len(table) > len(rows):
        old = len(set(table) - set(rows))
        print(f"{TABLE.name} is stale: {len(missing)} rows are missing, {old} are of old sources or never launched")
        print("python -m benchmarks.reports.compile_report --write")
        return 1
    wrong = [fault for name in rows for fault in faults(table[name])]
    if "--sample" in sys.argv[1:]:
        wrong += differences(rows, table)
    spilling = sum(table[name]["stack"] > 0 for name in rows)
    print("\n".join(wrong) or f"{len(rows)} rows: {spilling} spill as is known, no shared-memory overflow")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
