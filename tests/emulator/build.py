"""Build kernels for a CPU that can't run them natively, for the tests: the CUDA kernels, and those for AVX-512.

    python tests/emulator/build.py [cuda | avx512]        rebuilds what is out of date and prints the path of the module

BERT_FAST_CUDA_EMULATOR=path or BERT_FAST_AVX512_EMULATOR=path makes `bert_fast` load the module. Needs a C++ compiler
and torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"
BUILD_FLAGS = runpy.run_path(str(ROOT / "csrc" / "build_flags.py"))
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", f"-DTORCH_TARGET_VERSION={BUILD_FLAGS['TORCH_TARGET_VERSION']}",
    "-DPy_LIMITED_API=0x030a0000",
)  # fmt: skip


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


EMULATOR = ("tests/emulator/emulator.cpp", "tests/emulator/hopper.cpp")
# Module -> its sources and additional flags. With AVX2's fused multiply-add the AVX-512 kernels round as they do on
# their native CPU; the compiler splits their vectors in two.
MODULES = {
    "_CUDA": (
        ("csrc/registration_cuda.cpp", *EMULATOR, *sources("csrc/*/cuda.cu"), *sources("csrc/*/cuda/*.cu")),
        ("-DBERT_FAST_EMULATOR", "-DBERT_FAST_HOPPER"),
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
    """The path of the C++ compiler.

    Raises:
        RuntimeError: there is none.
    """
    path: str | None = BUILD_FLAGS["compiler"]()
    if path is None:
        raise RuntimeError(f"{BUILD_FLAGS['NO_COMPILER']}; the emulated kernels can't be built")
    return path


def includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests", *include_paths(), sysconfig.get_paths()["include"])]


def build_program(name: str, files: tuple[str, ...], target: Path) -> None:
    """Compile a test program from `files` with the flags of the module `name`."""
    flags = [flag for flag in (*FLAGS, *MODULES[name][1]) if flag != "-Werror"]
    paths = [str(ROOT / file) for file in files]
    subprocess.run([compiler(), *flags, *includes(), *paths, "-o", str(target)], check=True)


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
    """The path of a module of MODULES, rebuilt if its sources have changed; safe to call from concurrent processes.

    Raises:
        RuntimeError: there is no C++ compiler.
        CalledProcessError: it failed, with messages on standard error.
    """
    from filelock import FileLock
    from torch.utils.cpp_extension import library_paths

    files, module_flags = MODULES[name]
    headers = b"".join(
        path.read_bytes() for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("tests/emulator/*.h")])
    )
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            flags = [*FLAGS, *module_flags, *includes()]
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
