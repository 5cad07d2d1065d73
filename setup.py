"""Build bert_fast: map the rooms under `kernels/` to `bert_fast.kernels.<room>` and compile what the toolchain allows.

Two extension modules, both optional:

- `bert_fast._C`     the kernels, against torch's stable ABI and Python's limited API (one binary for all of them);
- `bert_fast._host`  the data side (masking, packing), pybind11 with numpy, one build a Python version.

What can't be built is named in one line and in `bert_fast/_build_info.json`, where `bert-fast info` and
`bert_fast.kernels.available_impls()` read it; the install goes on without it. `BERT_FAST_NATIVE=0` builds neither.
"""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ROOMS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the binary has to load on
OPTIMISE = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter"]
SANITIZE = os.environ.get("BERT_FAST_SANITIZE")  # "address,undefined": for the sanitizer run of the native tests


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

    sanitize = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g"] if SANITIZE else []
    extension = CppExtension(
        "bert_fast._C",
        ["csrc/registration.cpp", *sources("csrc/*/*_cpu.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[*OPTIMISE, "-fvisibility=hidden", *sanitize],
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return extension


def host_extension() -> Extension:
    from pybind11.setup_helpers import Pybind11Extension

    sanitize = [f"-fsanitize={SANITIZE}", "-g"] if SANITIZE else []
    extension: Extension = Pybind11Extension(
        "bert_fast._host",
        sources("csrc/host/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*OPTIMISE, *sanitize],
        extra_link_args=sanitize,
        cxx_std=17,
    )
    return extension


class BuildNative(build_ext):
    """Build each extension on its own; a failure leaves a reason, not a broken install."""

    def run(self) -> None:
        report = {}
        for name, make in (("_C", kernels_extension), ("_host", host_extension)):
            reason = self._build_one(make)
            report[name] = {"built": reason is None, "reason": reason or ""}
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
        *(f"bert_fast.kernels.{room}" for room in ROOMS),
        *sorted(
            ".".join(path.parent.relative_to(ROOT).parts)
            for path in ROOT.glob("bert_fast/**/__init__.py")
            if path.parent.name != "kernels"
        ),
    ],
    package_dir={f"bert_fast.kernels.{room}": f"kernels/{room}" for room in ROOMS},
    package_data={"bert_fast": ["py.typed", "recipes/*.yaml", "verified/*.json", "_build_info.json"]},
    ext_modules=[Extension("bert_fast._C", []), Extension("bert_fast._host", [])],
    cmdclass={"build_ext": BuildNative},
)
