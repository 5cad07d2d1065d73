"""Compile every CUDA source ahead of time for every supported GPU; needs nvcc and no GPU.

    python -m benchmarks.reports.cuda_report            compile what is out of date, compare; exit code 1 if it differs
    python -m benchmarks.reports.cuda_report --write    compile what is out of date and write the table

A row of `results/cuda_compile.json` is one instantiation of a kernel on one architecture, as `ptxas -v` reports it:
registers per thread, spilled bytes, bytes of stack and of static shared memory. In rows of sources for Hopper, `matrix`
counts the matrix and copy instructions of the machine code (cuobjdump, which comes with Triton). `sources` is the hash
of the file and of every header of the project that it includes: files whose hash is current are not recompiled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bert_fast._io import write_text

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "cuda_compile.json"
ARCHITECTURES = ("80", "90a", "100")
HOPPER = "hopper"  # in the names of sources whose kernels have a body only on sm_90a
TORCH_TARGET_VERSION = runpy.run_path(str(ROOT / "csrc" / "build_flags.py"))["TORCH_TARGET_VERSION"]
FLAGS = (
    "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-DBERT_FAST_HOPPER", "-Xptxas=-v",
)  # fmt: skip
# The most bytes a kernel may spill, by the beginning and the end of its name; no other kernel may spill. Rows of
# more than 4096 columns take 16 elements a thread, in float32 four packs, and 128 registers. No BERT is that wide.
KNOWN_SPILLS = {
    ("add_layer_norm_backward<float", ", 16>"): 324,
}
COMPILING = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
MATRIX = re.compile(r"\b(HGMMA|HMMA|UTMALDG|UBLKCP)\b")


def cuda_sources() -> list[Path]:
    """Every .cu of the project."""
    return sorted([*ROOT.glob("csrc/*/cuda.cu"), *ROOT.glob("csrc/*/cuda/*.cu")])


def sources_hash(source: Path) -> str:
    """Hash of a source and of the project's headers that it includes, directly or not."""
    digest, seen, waiting = hashlib.sha256(), set(), [source]
    while waiting:
        path = waiting.pop(0)
        if path in seen or not path.is_file():  # headers of torch and CUDA are not the project's
            continue
        seen.add(path)
        text = path.read_text()
        digest.update(text.encode())
        waiting += [ROOT / "csrc" / name for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE)]
    return digest.hexdigest()[:16]


def compile_source(source: Path) -> list[dict[str, Any]]:
    """Rows of one source, for every architecture.

    Raises:
        RuntimeError: nvcc failed, or serialized the matrix products of a warpgroup; the message is nvcc's.
    """
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures(source)]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.o"
        command = ["nvcc", *FLAGS, *includes, *gencode, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.relative_to(ROOT)}:\n{done.stderr}")
        if "instructions are serialized" in done.stderr:
            raise RuntimeError(f"ptxas serializes the matrix products of {source.name}:\n{done.stderr}")
        rows = parse(done.stderr)
        if HOPPER in source.name:
            counts = matrix_instructions(target)
            rows = [{**row, "matrix": counts[row["kernel"]]} for row in rows]
    return rows


def architectures(source: Path) -> tuple[str, ...]:
    """The architectures that a source is compiled for."""
    return ("90a",) if HOPPER in source.name else ARCHITECTURES


def matrix_instructions(target: Path) -> dict[str, dict[str, int]]:
    """For each kernel in an object file, the number of instructions in MATRIX of its machine code.

    Raises:
        RuntimeError: cuobjdump is missing or failed.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "--dump-sass", target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed on {target.name}: {done.stderr}")
    parts = re.split(r"^\s*Function : (\w+)$", done.stdout, flags=re.MULTILINE)
    names = demangled(parts[1::2])
    return {
        name: dict(sorted(Counter(MATRIX.findall(code)).items())) for name, code in zip(names, parts[2::2], strict=True)
    }


def parse(report: str) -> list[dict[str, Any]]:
    """Rows of the output of `ptxas -v`; device functions that were not inlined are in no row."""
    starts = list(COMPILING.finditer(report))
    names = demangled([start.group(1) for start in starts])
    rows = []
    for number, (name, start) in enumerate(zip(names, starts, strict=True)):
        end = starts[number + 1].start() if number + 1 < len(starts) else len(report)
        block = report[start.end() : end]
        spills, used, shared = SPILLS.search(block), USED.search(block), SHARED.search(block)
        if spills is None or used is None:
            raise RuntimeError(f"no registers for {name} in the output of ptxas, whose format has changed:\n{block}")
        rows.append(
            {
                "kernel": name,
                "arch": f"sm_{start.group(2)}",
                "registers": int(used.group(1)),
                "stack": int(spills.group(1)),
                "spilled": int(spills.group(2)) + int(spills.group(3)),
                "shared": int(shared.group(1)) if shared else 0,
            }
        )
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def demangled(names: list[str]) -> list[str]:
    """Demangled names without return type, arguments and namespaces."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    results = []
    for line in done.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|bert_fast::|c10::", "", line).removeprefix("void ")
        depth = 0
        for place, character in enumerate(name):
            depth += {"<": 1, ">": -1}.get(character, 0)
            if character == "(" and depth == 0:
                name = name[:place]
                break
        results.append(re.sub(r"\((?:int|bool)\)", "", name))
    return results


def read() -> dict[str, Any]:
    """The checked-in table: {"nvcc": its release, "files": {source: {"sources": hash, "rows": [...]}}}."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": "", "files": {}}
    return table


def stale(table: dict[str, Any]) -> list[Path]:
    """The sources whose rows are missing or of an older version."""
    files = table["files"]
    return [
        path
        for path in cuda_sources()
        if files.get(str(path.relative_to(ROOT)), {}).get("sources") != sources_hash(path)
    ]


def release() -> str:
    """The release of nvcc, e.g. "13.0".

    Raises:
        RuntimeError: there is no nvcc.
    """
    if shutil.which("nvcc") is None:
        raise RuntimeError("nvcc is not on $PATH; it is needed to compile the CUDA kernels")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", version)
    return match.group(1) if match else version.strip()


def allowed(kernel: str) -> int:
    """The most bytes that `kernel` may spill."""
    bounds = [
        bound for (first, last), bound in KNOWN_SPILLS.items() if kernel.startswith(first) and kernel.endswith(last)
    ]
    return max(bounds, default=0)


def problems(table: dict[str, Any]) -> list[str]:
    """One message per row that spills more than allowed."""
    return [
        f"{row['kernel']} on {row['arch']} spills {row['spilled']} bytes; expected at most {allowed(row['kernel'])}"
        for entry in table["files"].values()
        for row in entry["rows"]
        if row["spilled"] > allowed(row["kernel"])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--all", action="store_true", help="compile every source, also those with current rows")
    options = parser.parse_args()
    before, nvcc = read(), release()
    outdated = cuda_sources() if options.all else stale(before)
    known = {str(path.relative_to(ROOT)) for path in cuda_sources()}
    files = {name: entry for name, entry in before["files"].items() if name in known}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_source, outdated))
    for path, rows in zip(outdated, compiled, strict=True):
        files[str(path.relative_to(ROOT))] = {"sources": sources_hash(path), "rows": rows}
        print(f"{path.relative_to(ROOT)}: {len(rows)} rows for {', '.join(architectures(path))}")
    table = {"nvcc": nvcc if outdated else before["nvcc"], "files": dict(sorted(files.items()))}
    wrong = problems(table)
    if options.write:
        text = json.dumps(table, indent=None, separators=(",", ":"))
        write_text(TABLE, text.replace('{"kernel"', '\n{"kernel"') + "\n")
    elif nvcc == before["nvcc"] and files != before["files"]:
        wrong.append("the table differs from nvcc's output: python -m benchmarks.reports.cuda_report --write")
    rows = [row for entry in files.values() for row in entry["rows"]]
    spilling = sum(bool(row["spilled"]) for row in rows)
    print("\n".join(wrong) or f"{len(rows)} rows: {spilling} spill within their bounds, the others do not spill")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
