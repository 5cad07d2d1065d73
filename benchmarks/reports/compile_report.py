"""Compile every Triton kernel ahead of time for every supported GPU; needs no GPU.

    python -m benchmarks.reports.compile_report            compare with the checked-in table; exit code 1 if it is stale
    python -m benchmarks.reports.compile_report --sample   also recompile each kernel once, for sm_90, and compare it
    python -m benchmarks.reports.compile_report --write    compile what is new or changed and write the table
    python -m benchmarks.reports.compile_report --ones     whether each kernel compiles where its integers are 1

A row of `results/triton_compile.json` is one kernel in one configuration that dispatch can choose (dtypes, constexprs,
warps, stages, the most registers where a launch limits them) on one architecture: registers per thread, bytes of stack
(Triton's spills), bytes of shared memory, and the matrix instructions in the machine code. `sources` is the hash of the
kernel and of the functions it calls: rows whose hash is current are not recompiled. The configurations are the
`launches` of `kernels/<op>/cases.py`.
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
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, CompilationError

from bert_fast._io import write_text
from bert_fast.kernels import available_impls
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.triton_launch import Launch, recording

TABLE = Path(__file__).parents[1] / "results" / "triton_compile.json"
ARCHITECTURES = (80, 90, 100, 120)
# Shared memory available to one block, in bytes: CUDA C++ programming guide, compute capabilities.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# The most bytes of stack a kernel may have on an architecture. All are attention's: which rows, and why, is in
# kernels/attention/README.md, "Tiles".
KNOWN_SPILLS = {
    ("attention.bwd_one_kernel", "sm_80"): 16,
    ("attention.bwd_one_kernel", "sm_120"): 24,
    ("attention.dkv_kernel", "sm_80"): 8,
    ("attention.dq_kernel", "sm_90"): 120,
    ("attention.dq_kernel", "sm_100"): 120,
    ("attention.dq_kernel", "sm_120"): 136,
    ("attention.fwd_kernel", "sm_80"): 104,
    ("attention.fwd_kernel", "sm_100"): 8,
    ("attention.fwd_kernel", "sm_120"): 272,
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
    """Signature, constexprs and the arguments divisible by 16, as Triton's launcher derives them."""
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
    """The fields that identify a row."""
    signature, constexprs, aligned = specialise(launch)
    kinds = {name: kind + ("/16" if name in aligned and kind[0] == "i" else "") for name, kind in signature.items()}
    return {
        "kernel": f"{launch.kernel.fn.__module__.split('.')[2]}.{launch.kernel.fn.__name__}",
        "arch": f"sm_{architecture}",
        "arguments": " ".join(kind for kind in kinds.values() if kind != "constexpr"),
        "constexprs": " ".join(f"{name}={value}" for name, value in constexprs.items()),
        "warps": launch.num_warps,
        "stages": launch.num_stages,
    } | ({} if launch.maxnreg is None else {"maxnreg": launch.maxnreg})


def sources(kernel: Any) -> str:
    """Hash of the kernel's source, of the functions that it calls, and of the compiler's version."""
    # Triton's key of a function includes the constants of its callees only if their keys exist already.
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, triton.JITFunction) and called.hash is None and called is not kernel:
            sources(called)
    return hashlib.sha256(f"{kernel.cache_key} {triton.__version__}".encode()).hexdigest()[:12]


@functools.cache
def launches(architecture: int = 90) -> list[Launch]:
    """Every launch of every op's cases on an architecture, each configuration once."""
    by_configuration: dict[str, Launch] = {}
    for op in available_impls():
        with recording(architecture) as recorded:
            cases.load(op).launches()
        for launch in recorded:
            by_configuration.setdefault(json.dumps(describe(launch, 0)), launch)
    return [by_configuration[key] for key in sorted(by_configuration)]


def source_of(launch: Launch) -> ASTSource:
    """What Triton compiles for a launch."""
    signature, constexprs, aligned = specialise(launch)
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(launch.kernel, signature, {(names.index(n),): v for n, v in constexprs.items()}, attributes)


def options_of(launch: Launch) -> dict[str, Any]:
    """The options of a launch for Triton's compiler."""
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.maxnreg}


def integers(launch: Launch) -> list[str]:
    """The arguments that Triton passes as a constant where they are 1."""
    names = [p.name for p in launch.kernel.params if not (p.is_constexpr or p.do_not_specialize)]
    return [name for name in names if isinstance(launch.arguments[name], int)]


def with_ones() -> Iterator[tuple[Launch, list[str]]]:
    """Each launch with all of its integers 1 and, once a kernel, with each of them alone; and their names.

    A constant has no methods, such as `to`: a kernel can compile for every size but 1, which Triton's interpreter
    does not show.
    """
    seen = set()
    for launch in launches():
        names = integers(launch)
        alone = [] if launch.kernel in seen else [[name] for name in names]
        seen.add(launch.kernel)
        for ones in [names, *alone] if names else []:
            yield replace(launch, arguments={**launch.arguments, **dict.fromkeys(ones, 1)}), ones


def refusal(launch: Launch, architecture: int = 90) -> str:
    """Why Triton's front end refuses a launch, or ""; takes a hundredth of a compilation."""
    backend = CUDABackend(GPUTarget("cuda", architecture, 32))
    options = backend.parse_options(options_of(launch))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    try:
        source_of(launch).make_ir(backend.target, options, functions, modules, context)
    except CompilationError as error:
        return " ".join(str(error).split())
    return ""


def refused_ones() -> list[str]:
    """A message for each launch of `with_ones` that does not compile."""
    return [
        f"{describe(launch, 90)['kernel']} with {', '.join(ones)} = 1: {why}"
        for launch, ones in with_ones()
        if (why := refusal(launch))
    ]


def compiled(launch: Launch, architecture: int) -> dict[str, Any]:
    """The resources that the machine code of one configuration uses."""
    source = source_of(launch)
    target = GPUTarget("cuda", architecture, 32)
    options = CUDABackend(target).parse_options(options_of(launch))
    result = triton.compile(source, target=target, options=options.__dict__)
    usage = cuobjdump("--dump-resource-usage", result.asm["cubin"])
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    # Disassembling takes longer than compiling, and without such an instruction in the PTX there is none to find.
    code = cuobjdump("--dump-sass", result.asm["cubin"]) if "mma" in result.asm["ptx"] else ""
    return {
        "registers": registers,
        "stack": stack,
        "shared": result.metadata.shared,
        "matrix": " ".join(sorted(set(MATRIX.findall(code)))),
    }


def cuobjdump(option: str, cubin: bytes) -> str:
    """The output of cuobjdump, which comes with Triton, for a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _row(index_and_architecture: tuple[int, int]) -> dict[str, Any]:
    index, architecture = index_and_architecture
    launch = launches(architecture)[index]  # kernels cannot be pickled: each process records its own
    return describe(launch, architecture) | {"sources": sources(launch.kernel)} | compiled(launch, architecture)


def key(row: dict[str, Any]) -> str:
    names = ("kernel", "arch", "arguments", "constexprs", "warps", "stages", "maxnreg", "sources")
    return json.dumps([row.get(name) for name in names])


def required() -> dict[str, tuple[int, int]]:
    """The key of every row that the table must have, with the index of its launch and its architecture."""
    return {
        key(describe(launch, architecture) | {"sources": sources(launch.kernel)}): (index, architecture)
        for architecture in ARCHITECTURES
        for index, launch in enumerate(launches(architecture))
    }


def read() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else []
    return rows


def write(rows: Iterable[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_text(TABLE, f"[\n{lines}\n]\n")


def faults(row: dict[str, Any]) -> list[str]:
    """A spill above the known bound, or more shared memory than a block has."""
    name = f"{row['kernel']} {row['arch']} ({row['arguments']}; {row['constexprs']})"
    limit, known = SHARED_LIMIT[int(row["arch"][3:])], KNOWN_SPILLS.get((row["kernel"], row["arch"]), 0)
    spill = [f"{name}: {row['stack']} bytes of stack, at most {known} expected"] if row["stack"] > known else []
    return spill + ([f"{name}: {row['shared']} of {limit} bytes of shared memory"] if row["shared"] > limit else [])


def compile_all(launches_and_architectures: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Yield rows as they are compiled, in one process per core."""
    # Not forked: a fork of a process with the compiler's threads can deadlock.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        yield from pool.map(_row, launches_and_architectures)


def differences(rows: dict[str, tuple[int, int]], table: dict[str, dict[str, Any]]) -> list[str]:
    """Recompile the first row of each kernel on sm_90; one message for each that differs from the table."""
    sample: dict[str, tuple[int, int]] = {}
    for name, (index, architecture) in rows.items():
        if architecture == 90:
            sample.setdefault(table[name]["kernel"], (index, architecture))
    return [
        f"{row['kernel']} {row['arch']}: the table has {table[key(row)]}, compiled now {row}"
        for row in compile_all(list(sample.values()))
        if table[key(row)] != row
    ]


def main() -> int:
    if "--ones" in sys.argv[1:]:
        messages = refused_ones()
        print("\n".join(messages) or f"{len(list(with_ones()))} launches compile with integers that are 1")
        return int(bool(messages))
    table = {key(row): row for row in read()}
    rows = required()
    missing = [where for name, where in rows.items() if name not in table]
    if "--write" in sys.argv[1:]:
        try:
            for row in compile_all(missing):
                table[key(row)] = row
        finally:
            write(table[name] for name in rows if name in table)  # keep what an interrupted run compiled
        print(f"{TABLE.name}: {len(rows)} rows, {len(missing)} of them compiled now")
    elif missing or len(table) > len(rows):
        outdated = len(set(table) - set(rows))
        print(f"{TABLE.name} is stale: {len(missing)} rows are missing, {outdated} are of old or unused sources")
        print("python -m benchmarks.reports.compile_report --write")
        return 1
    wrong = [fault for name in rows for fault in faults(table[name])]
    if "--sample" in sys.argv[1:]:
        wrong += differences(rows, table)
    spilling = sum(table[name]["stack"] > 0 for name in rows)
    print("\n".join(wrong) or f"{len(rows)} rows: {spilling} spill within their bounds, no shared-memory overflow")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
