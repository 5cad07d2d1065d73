"""Build bert_fast: map the ops under `kernels/` to `bert_fast.kernels.<op>` and compile what the toolchain allows.

Three extension modules, all optional:

- `bert_fast._C`     the CPU kernels, against torch's stable ABI and Python's limited API (one binary for all of them);
- `bert_fast._CUDA`  the CUDA kernels, likewise, where nvcc and a torch with CUDA are there; a GPU need not be. For
                     every architecture of CUDA_ARCHITECTURES that nvcc knows, or for TORCH_CUDA_ARCH_LIST;
- `bert_fast._host`  the data side (masking, packing), pybind11 with numpy, one build a Python version.

What can't be built is named in one line and in `bert_fast/_build_info.json`, where `bert-fast info` and
`bert_fast.kernels.available_impls()` read it; the install goes on without it. `BERT_FAST_NATIVE=0` builds none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))
FOLDERS = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("kernels/**/__init__.py"))
KERNELS = {".".join(("bert_fast", *folder.parts)): folder.as_posix() for folder in FOLDERS}
TORCH_TARGET_VERSION = runpy.run_path(str(ROOT / "csrc" / "flags.py"))["TORCH_TARGET_VERSION"]
OPTIMISE = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter"]
CUDA_ARCHITECTURES = ("80", "90a", "100")
# BERT_FAST_SANITIZE=address,undefined, for `make sanitize`; -O1, with which that compiles several times faster.
SANITIZERS = (
    [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
    if (kinds := os.environ.get("BERT_FAST_SANITIZE"))
    else []
)


def compiler() -> str | None:
    """The C++ compiler that will be called, or None."""
    for candidate in (
        os.environ.get("CXX"),
        (sysconfig.get_config_var("CXX") or "").split(" ")[0],
        "c++",
        "g++",
        "clang++",
    ):
        if candidate and (path := shutil.which(candidate.split(" ")[0])):
            return path
    return None


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def kernels_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    extension = CppExtension(
        "bert_fast._C",
        ["csrc/registration.cpp", *sources("csrc/*/cpu*.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[*OPTIMISE, "-fvisibility=hidden", *SANITIZERS],
        extra_link_args=SANITIZERS,
        py_limited_api=True,
    )
    return extension


def cuda_architectures(nvcc: str) -> list[str]:
    """What to compile the CUDA kernels for, e.g. ["80", "90a"]."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace("+PTX", "").split()
    if wanted:
        return [arch.replace(".", "") for arch in wanted]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]


def cuda_sources_hash(op: str) -> str:
    """Hash of the CUDA sources of an op, its own and the shared: what a record of a verified run is of."""
    digest = hashlib.sha256()
    for path in sorted(
        [*ROOT.glob(f"csrc/{op}/cuda*.*"), *ROOT.glob(f"csrc/{op}/cuda/*"), *ROOT.glob("csrc/common/cuda*.h")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cuda_facts() -> dict[str, object]:
    """What the build notes of the CUDA kernels beside whether they are there."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = str(Path(CUDA_HOME) / "bin" / "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    ops = [op for op in OPS if (ROOT / "csrc" / op / "cuda.cu").exists() or (ROOT / "csrc" / op / "cuda").is_dir()]
    return {
        "cuda": found.group(1) if found else said.strip(),
        "architectures": cuda_architectures(nvcc),
        "sources": {op: cuda_sources_hash(op) for op in ops},
    }


def cuda_extension() -> Extension:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    nvcc = shutil.which("nvcc") if CUDA_HOME is None else str(Path(CUDA_HOME) / "bin" / "nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise FileNotFoundError("no nvcc was found (tried $CUDA_HOME and $PATH)")
    if torch.version.cuda is None:
        raise FileNotFoundError(f"torch {torch.__version__}, which it is built against, has no CUDA")
    architectures = cuda_architectures(nvcc)
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    # The instructions of Hopper alone are in code for sm_90a: in any other the kernels that use them are empty.
    hopper = [("BERT_FAST_HOPPER", None)] if "90a" in architectures and "90" not in architectures else []
    return CUDAExtension(
        "bert_fast._CUDA",
        ["csrc/registration_cuda.cpp", *sources("csrc/*/cuda.cu", "csrc/*/cuda/*.cu")],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None), *hopper],
        extra_compile_args={
            "cxx": [*OPTIMISE, "-fvisibility=hidden"],
            "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", *gencode],
        },
        py_limited_api=True,
    )


def host_extension() -> Extension:
    from pybind11.setup_helpers import Pybind11Extension

    extension: Extension = Pybind11Extension(
        "bert_fast._host",
        sources("csrc/host/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*OPTIMISE, *SANITIZERS],
        extra_link_args=SANITIZERS,
        cxx_std=17,
    )
    return extension


class BuildNative(build_ext):
    """Build each extension on its own; a failure leaves a reason, not a broken install."""

    def run(self) -> None:
        report = {}
        for name, make in (("_C", kernels_extension), ("_CUDA", cuda_extension), ("_host", host_extension)):
            reason = self._build_one(make)
            facts = cuda_facts() if name == "_CUDA" and reason is None else {}
            report[name] = {"built": reason is None, "reason": reason or "", **facts}
            print(f"bert_fast.{name}: {'built' if reason is None else 'not built: ' + reason}")
        info = ROOT / "bert_fast" if self.inplace else Path(self.build_lib) / "bert_fast"
        info.mkdir(parents=True, exist_ok=True)
        (info / "_build_info.json").write_text(json.dumps(report, indent=1) + "\n")

    def _build_one(self, make) -> str | None:  # type: ignore[no-untyped-def]
        if os.environ.get("BERT_FAST_NATIVE") == "0":
            return "BERT_FAST_NATIVE=0 was set at build time"
        if compiler() is None:
            return "no C++ compiler was found (tried $CXX, c++, g++, clang++)"
        try:
            extension = make()
        except FileNotFoundError as error:
            return str(error)
        except ImportError as error:
            return f"{error}; build with --no-build-isolation in an environment that has torch and pybind11"
        try:
            self._command(extension).run()
        except Exception as error:  # every compiler and linker failure ends here; the build log above has the details
            return f"the compiler failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return None

    def _command(self, extension: Extension) -> build_ext:
        self.distribution.ext_modules = [extension]  # what a build_ext command takes up when it is finalized
        if extension.py_limited_api:
            from torch.utils.cpp_extension import BuildExtension

            command = BuildExtension(self.distribution)
        else:
            command = build_ext(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "force", "debug", "parallel", "editable_mode"):
            setattr(command, option, getattr(self, option))
        command.ensure_finalized()
        return command


setup(
    packages=[
        "bert_fast.kernels",
        *KERNELS,
        *sorted(
            ".".join(path.parent.relative_to(ROOT).parts)
            for path in ROOT.glob("bert_fast/**/__init__.py")
            if path.parent.name != "kernels"
        ),
    ],
    package_dir=KERNELS,
    package_data={"bert_fast": ["py.typed", "recipes/*.yaml", "verified/*.json", "_build_info.json"]},
    ext_modules=[Extension(f"bert_fast.{name}", []) for name in ("_C", "_CUDA", "_host")],
    cmdclass={"build_ext": BuildNative},
)
