"""Compile the CUDA kernels for the CPU, for the tests of machines without a GPU.

    python csrc/emulator/build.py        builds what is out of date and prints the module's file

The file goes to build/emulator; BERT_FAST_CUDA_EMULATOR=file makes `bert_fast` load it. Needs a C++ compiler and torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*_cuda*.cu"))
SOURCES = ("csrc/registration_cuda.cpp", "csrc/emulator/emulator.cpp", *KERNELS)
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DBERT_FAST_EMULATOR", "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DPy_LIMITED_API=0x030a0000",
)  # fmt: skip


def compiler() -> str:
    """The C++ compiler that will be called.

    Raises:
        RuntimeError: there is none.
    """
    found = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++") if name and (path := shutil.which(name))), None
    )
    if found is None:
        raise RuntimeError("no C++ compiler was found (tried $CXX, c++, g++), so the CUDA kernels can't be emulated")
    return found


def _compile(source: str, headers: bytes, includes: list[str]) -> Path:
    digest = hashlib.sha256(headers + (ROOT / source).read_bytes()).hexdigest()[:16]
    target = FOLDER / f"{Path(source).stem}-{digest}.o"
    if not target.exists():
        partial = target.with_suffix(".tmp")
        command = [compiler(), "-x", "c++", *FLAGS, *includes, "-c", str(ROOT / source), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(target)
    return target


def build() -> Path:
    """The module's file, built where it is missing or its sources changed; several processes may ask at once.

    Raises:
        RuntimeError: there is no C++ compiler.
        CalledProcessError: it failed; its messages went to standard error.
    """
    from filelock import FileLock
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths(), sysconfig.get_paths()["include"])]
    headers = b"".join(path.read_bytes() for path in sorted(ROOT.glob("csrc/**/*.h")))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / ".lock"):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(source, headers, includes), SOURCES))
        digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
        module = FOLDER / f"_CUDA-{digest}.so"
        if not module.exists():
            partial = module.with_suffix(".tmp")
            torch = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
            subprocess.run([compiler(), "-shared", *map(str, objects), *torch, "-o", str(partial)], check=True)
            partial.replace(module)
        for path in FOLDER.glob("*.[os]*"):
            if path not in (module, *objects):
                path.unlink()
    return module


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
