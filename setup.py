"""Build bert_fast: map the ops in `kernels/` to `bert_fast.kernels.<op>`, compile what the toolchain supports.

Three extension modules, all optional:

- `bert_fast._C`     the CPU kernels, against torch's stable ABI and Python's limited API: one binary for all versions;
- `bert_fast._CUDA`  the CUDA kernels, likewise, if nvcc and a torch with CUDA are installed; no GPU is needed. They are
                     for TORCH_CUDA_ARCH_LIST or, by default, those of CUDA_ARCHITECTURES that nvcc supports;
- `bert_fast._host`  masking and packing of examples, by pybind11 with numpy, one binary per Python version.

A module that can't be built is reported in one line and in `bert_fast/_build_info.json`, which `bert-fast info` and
`bert_fast.kernels.available_impls()` read; the installation continues without it. `BERT_FAST_NATIVE=0` builds none;
`BERT_FAST_NATIVE=keep`, for an editable install, builds none either and keeps those that an earlier build left in
`bert_fast/`, possibly on another machine.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Older ones can't read pyproject.toml's licence, and their error doesn't say so. torch 2.11 allows up to 81.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"setuptools is {setuptools.__version__}; expected 77 or later (pip install -U setuptools)")

ROOT = Path(__file__).parent
INFO = ROOT / "bert_fast" / "_build_info.json"
OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))
FOLDERS = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("kernels/**/__init__.py"))
KERNELS = {".".join(("bert_fast", *folder.parts)): folder.as_posix() for folder in FOLDERS}
BUILD_FLAGS = runpy.run_path(str(ROOT / "csrc" / "build_flags.py"))
OPTIMISE = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# BERT_FAST_SANITIZE=address,undefined, for `make sanitize`; -O1 compiles several times faster.
SANITIZERS = (
    [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
    if (kinds := os.environ.get("BERT_FAST_SANITIZE"))
    else []
)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def kernels_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "bert_fast._C",
        ["csrc/registration.cpp", *sources("csrc/*/cpu*.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", BUILD_FLAGS["TORCH_TARGET_VERSION"])],
        extra_compile_args=[*OPTIMISE, "-fvisibility=hidden", *SANITIZERS],
        extra_link_args=SANITIZERS,
        py_limited_api=True,
    )


def nvcc(option: str) -> str:
    """The output of nvcc with an option.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    path = shutil.which("nvcc") if CUDA_HOME is None else str(Path(CUDA_HOME) / "bin" / "nvcc")
    if path is None or not Path(path).exists():
        raise FileNotFoundError("no nvcc was found (tried $CUDA_HOME and $PATH)")
    return subprocess.run([path, option], capture_output=True, text=True, check=True).stdout


def cuda_architectures() -> list[str]:
    """What to compile the CUDA kernels for, e.g. ["80", "90a"]."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace("+PTX", "").split()
    if requested:
        return [arch.replace(".", "") for arch in requested]
    return BUILD_FLAGS["cuda_architectures"](nvcc("--list-gpu-code"))


def cuda_facts() -> dict[str, object]:
    """What `_build_info.json` records about the CUDA kernels."""
    version = nvcc("--version")
    release = re.search(r"release ([\d.]+)", version)
    ops = [op for op in OPS if (ROOT / "csrc" / op / "cuda.cu").exists() or (ROOT / "csrc" / op / "cuda").is_dir()]
    return {
        "cuda": release.group(1) if release else version.strip(),
        "architectures": cuda_architectures(),
        "sources": {op: BUILD_FLAGS["cuda_sources_hash"](ROOT, op) for op in ops},
    }


def cuda_extension() -> Extension:
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    nvcc("--version")
    if torch.version.cuda is None:
        raise FileNotFoundError(f"torch {torch.__version__}, which it is built against, has no CUDA")
    architectures = cuda_architectures()
    gencode = BUILD_FLAGS["gencode"](architectures)
    runtime = BUILD_FLAGS["cuda_runtime"](Path("/proc/self/maps").read_text())
    if runtime is None:
        raise FileNotFoundError(f"torch {torch.__version__} has loaded no libcudart to link with")
    # Kernels for Hopper have a body in code for sm_90a alone, so a build that also has code for sm_90 can't use them.
    hopper = [("BERT_FAST_HOPPER", None)] if "90a" in architectures and "90" not in architectures else []
    extension: Extension = CUDAExtension(
        "bert_fast._CUDA",
        ["csrc/registration_cuda.cpp", *sources("csrc/*/cuda.cu", "csrc/*/cuda/*.cu")],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[
            ("TORCH_TARGET_VERSION", BUILD_FLAGS["TORCH_TARGET_VERSION"]),
            ("USE_CUDA", None),
            *hopper,
        ],
        extra_compile_args={
            "cxx": [*OPTIMISE, "-fvisibility=hidden"],
            "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", *gencode],
        },
        py_limited_api=True,
    )
    # The runtime that torch loads, by its path: where nvcc stands apart from its toolkit, -lcudart is not found.
    extension.libraries.remove("cudart")
    extension.extra_link_args.append(runtime)
    return extension


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
    """Builds each extension independently; a failure is recorded with its reason and doesn't break the installation."""

    def run(self) -> None:
        if os.environ.get("BERT_FAST_NATIVE") == "keep":
            if not (self.inplace and INFO.exists()):
                raise SystemExit(f"BERT_FAST_NATIVE=keep: expected an editable install and {INFO} of an earlier build")
            return
        report = {}
        for name, make in (("_C", kernels_extension), ("_CUDA", cuda_extension), ("_host", host_extension)):
            reason = self._build_one(make)
            facts = cuda_facts() if name == "_CUDA" and reason is None else {}
            report[name] = {"built": reason is None, "reason": reason or "", **facts}
            print(f"bert_fast.{name}: {'built' if reason is None else 'not built: ' + reason}")
        info = INFO if self.inplace else Path(self.build_lib) / "bert_fast" / INFO.name
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(report, indent=1) + "\n")

    def _build_one(self, make) -> str | None:  # type: ignore[no-untyped-def]
        if os.environ.get("BERT_FAST_NATIVE") == "0":
            return "BERT_FAST_NATIVE=0 was set at build time"
        if BUILD_FLAGS["compiler"]() is None:
            return BUILD_FLAGS["NO_COMPILER"]
        try:
            extension = make()
        except FileNotFoundError as error:
            return str(error)
        except ImportError as error:
            return f"{error}; build with --no-build-isolation in an environment that has torch and pybind11"
        try:
            self._command(extension).run()
        except Exception as error:  # any failure of the compiler or linker; the build log above has the details
            return f"the compiler failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return None

    def _command(self, extension: Extension) -> build_ext:
        self.distribution.ext_modules = [extension]  # read by build_ext.finalize_options
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
    package_data={
        "bert_fast": [
            "py.typed",
            "recipes/*.yaml",
            "serve/page.html",
            "verified/*.json",
            "golden.safetensors",
            "_build_info.json",
        ]
    },
    ext_modules=[Extension(f"bert_fast.{name}", []) for name in ("_C", "_CUDA", "_host")],
    cmdclass={"build_ext": BuildNative},
)
