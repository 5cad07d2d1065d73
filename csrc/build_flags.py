"""The compiler and the targets of the native code; read by `runpy.run_path`: setup.py can't import the package."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sysconfig
from pathlib import Path

TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the binaries have to load on
CUDA_ARCHITECTURES = ("80", "90a", "100")
NO_COMPILER = "no C++ compiler was found (tried $CXX, c++, g++, clang++)"


def compiler() -> str | None:
    """The path of the C++ compiler, or None."""
    for command in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        if command and (path := shutil.which(command.split(" ")[0])):
            return path
    return None


def cuda_architectures(gpu_code: str) -> list[str]:
    """Those of CUDA_ARCHITECTURES that nvcc supports, from the output of `nvcc --list-gpu-code`.

    It lists sm_90 and never sm_90a, the variant of the same GPU with its own instructions (wgmma, setmaxnreg).
    """
    supported = gpu_code.split()
    return [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch.removesuffix('a')}" in supported]


def cuda_sources_hash(root: Path, op: str) -> str:
    """A hash of an op's CUDA sources and of the shared headers, which identifies what a verification record is for."""
    digest = hashlib.sha256()
    for path in sorted(
        [
            *root.glob(f"csrc/{op}/cuda*.*"),
            *root.glob(f"csrc/{op}/cuda/*"),
            *root.glob(f"csrc/{op}/checks.h"),
            *root.glob("csrc/common/cuda*.h"),
            *(root / "csrc" / "common" / name for name in ("dropout.h", "tensor.h")),
        ]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def gencode(architectures: list[str]) -> list[str]:
    """nvcc's options for code of each architecture, and PTX of the newest one, for GPUs that are newer.

    An architecture with a suffix ("90a") has instructions that no other GPU has, so its PTX would run nowhere else.
    """
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    newest = max((int(arch) for arch in architectures if arch.isdigit()), default=None)
    return flags if newest is None else [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_runtime(maps: str) -> str | None:
    """The path of the CUDA runtime library that this process has loaded, from its /proc/self/maps, or None."""
    found = re.search(r"/.*/libcudart\.so\S*$", maps, re.MULTILINE)
    return found.group() if found else None
