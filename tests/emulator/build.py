"""Compile kernels for a CPU that can't run them as they are, for the tests: the CUDA kernels, and those for AVX-512.

    python tests/emulator/build.py [cuda | avx512]        builds what is out of date and prints the module's file

The file goes to build/emulator; BERT_FAST_CUDA_EMULATOR=file and BERT_FAST_AVX512_EMULATOR=file make `bert_fast` load
it. Needs a C++ compiler and torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"
TORCH_TARGET_VERSION = runpy.run_path(str(ROOT / "csrc" / "flags.py"))["TORCH_TARGET_VERSION"]
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-DPy_LIMITED_API=0x030a0000",
)  # fmt: skip


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


EMULATOR = ("tests/emulator/emulator.cpp", "tests/emulator/hopper.cpp")
# Module -> its sources, and the flags of its own. AVX2 has the fused multiply-add, so that the AVX-512 kernels round as
# they do on their own CPU; the compiler splits their vectors in two.
MODULES = {
    "_CUDA": (
        ("csrc/registration_cuda.cpp", *EMULATOR, *sources("csrc/*/cuda.cu"), *sources("csrc/*/cuda/*.cu")),
        ("-DBERT_FAST_EMULATOR",),
    ),
    "_C": (
        ("csrc/registration.cpp", *sources("csrc/*/cpu*.cpp")),
        (
            "-DBERT_FAST_EMULATED_AVX512", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
            *(("-mavx2", "-mfma") if platform.machine() in ("x86_64", "AMD64") else ()),
        ),
    ),
}  # fmt: skip


def compiler() -> str:
    """The C++ compiler that will be called.

    Raises:
        RuntimeError: there is none.
    """
    found = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++") if name and (path := shutil.which(name))), None
    )
    if found is None:
        raise RuntimeError("no C++ compiler was found (tried $CXX, c++, g++), so no kernels can be emulated")
    return found


def _compile(folder: Path, source: str, headers: bytes, flags: list[str]) -> Path:
    digest = hashlib.sha256(headers + " ".join(flags).encode() + (ROOT / source).read_bytes()).hexdigest()[:16]
    target = folder / f"{'-'.join(Path(source).with_suffix('').parts[1:])}-{digest}.o"
    if not target.exists():
        partial = target.with_suffix(".tmp")
        command = [compiler(), "-x", "c++", *flags, "-c", str(ROOT / source), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(target)
    return target


def build(name: str = "_CUDA") -> Path:
    """The file of a module of MODULES, built where its sources changed; several processes may ask at once.

    Raises:
        RuntimeError: there is no C++ compiler.
        CalledProcessError: it failed; its messages went to standard error.
    """
    from filelock import FileLock
    from torch.utils.cpp_extension import include_paths, library_paths

    files, own_flags = MODULES[name]
    includes = [
        f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests", *include_paths(), sysconfig.get_paths()["include"])
    ]
    headers = b"".join(
        path.read_bytes() for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("tests/emulator/*.h")])
    )
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            flags = [*FLAGS, *own_flags, *includes]
            objects = list(pool.map(lambda file: _compile(folder, file, headers, flags), files))
        digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
        module = folder / f"{name}-{digest}.so"
        if not module.exists():
            partial = module.with_suffix(".tmp")
            torch = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
            subprocess.run([compiler(), "-shared", *map(str, objects), *torch, "-o", str(partial)], check=True)
            partial.replace(module)
        for path in folder.glob("*.[os]*"):
            if path not in (module, *objects):
                path.unlink()
    return module


if __name__ == "__main__":
    sys.stdout.write(f"{build({'cuda': '_CUDA', 'avx512': '_C'}[sys.argv[1] if sys.argv[1:] else 'cuda'])}\n")
