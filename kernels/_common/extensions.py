"""Load the compiled kernels (`bert_fast._C`, `bert_fast._CUDA`) once, and record the reason where they are absent."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

# Modules that tests/emulator/build.py compiles for tests: the CUDA kernels on the CPU, the AVX-512 kernels in AVX2.
_CUDA_EMULATOR = "BERT_FAST_CUDA_EMULATOR"
_AVX512_EMULATOR = "BERT_FAST_AVX512_EMULATOR"


def build_report(module: str) -> dict[str, Any]:
    """The entry of the extension `module` in setup.py's build report; {} where there is none."""
    spec = importlib.util.find_spec("bert_fast")
    assert spec is not None
    assert spec.origin is not None
    info = Path(spec.origin).parent / "_build_info.json"
    report: dict[str, Any] = json.loads(info.read_text()).get(module, {}) if info.exists() else {}
    return report


def _load() -> str:
    """Import `bert_fast._C`, which registers its kernels. Returns "" or the reason why it can't."""
    if emulator := os.environ.get(_AVX512_EMULATOR):
        _load_emulator("bert_fast._C", emulator)
        return ""
    try:
        importlib.import_module("bert_fast._C")
    except ImportError as error:
        report = build_report("_C")
        if report and not report["built"]:
            return f"not built: {report['reason']}"
        return f"not built: {error}"
    return ""


def _load_emulator(module: str, file: str) -> None:
    """Import `file`, which tests/emulator/build.py compiled, as `module`."""
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])


def _load_cuda() -> str:
    """Import `bert_fast._CUDA`, which registers its kernels. Returns "" or the reason why it can't."""
    if CUDA_EMULATED:
        _load_emulator("bert_fast._CUDA", os.environ[_CUDA_EMULATOR])
        return ""
    report = build_report("_CUDA")
    if not report.get("built"):
        return f"not built: {report.get('reason', 'this installation is older than the CUDA kernels; build it again')}"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if torch.cuda.device_count() == 0:  # counted through NVML, so the process can still fork
        return "no CUDA device was found"
    try:
        importlib.import_module("bert_fast._CUDA")
    except ImportError as error:
        return f"can't be loaded: {error}"
    return ""


def registered(operator: str, dispatch_key: str) -> bool:
    """Whether `operator` ("bert_fast::name") has a native kernel for `dispatch_key` ("CPU", "CUDA")."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key))


def cpu_isa() -> str:
    """The instruction set of the compiled CPU kernels: generic, avx2, avx512 or avx512bf16.

    BERT_FAST_CPU_ISA lowers it. "generic" without compiled kernels.
    """
    return "generic" if MISSING else str(_extension.cpu_isa())


def has_bf16_isa() -> bool:
    """Whether this CPU has instructions that multiply bfloat16; without them torch's bfloat16 product runs at a tenth
    of float32's rate."""
    return cpu_isa() == "avx512bf16" and torch.cpu._is_avx512_bf16_supported()


def has_amx() -> bool:
    """Whether this CPU has Intel's matrix units, which oneDNN uses and our kernels don't."""
    return has_bf16_isa() and torch.cpu._is_amx_tile_supported()


def has_int8_dot() -> bool:
    """Whether the compiled CPU kernels add four products of bytes in INT32 (VNNI), which is exact for all bytes."""
    return not MISSING and bool(_extension.has_int8_dot())


def fingerprint(address: int, size: int) -> int:
    """A 64-bit hash of the `size` bytes at `address`, which must be readable memory."""
    return int(_extension.fingerprint(address, size))


def refused_tensor_map() -> str:
    """Why attention's kernels for Hopper were not launched in this process where they apply, or ""."""
    error = int(_cuda_extension.refused_tensor_map()) if _cuda_extension is not None else 0
    return f"without Hopper's kernels: the driver refuses a tensor map (cuTensorMapEncodeTiled, error {error})" * (
        error != 0
    )


MISSING = _load()
_extension: Any = sys.modules.get("bert_fast._C")
CUDA_EMULATED = bool(os.environ.get(_CUDA_EMULATOR))
CUDA_MISSING = _load_cuda()
_cuda_extension: Any = sys.modules.get("bert_fast._CUDA")
