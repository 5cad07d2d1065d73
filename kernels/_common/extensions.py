"""Load the compiled kernels (`bert_fast._C`, `bert_fast._CUDA`) once, and keep the reason where they are absent."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

# Files that tests/emulator/build.py made, for tests: the CUDA kernels, on machines without a GPU; the AVX-512 kernels.
_CUDA_EMULATOR = "BERT_FAST_CUDA_EMULATOR"
_AVX512_EMULATOR = "BERT_FAST_AVX512_EMULATOR"


def build_report(module: str) -> dict[str, Any]:
    """What setup.py noted of the extension `module`, {} where it noted nothing."""
    spec = importlib.util.find_spec("bert_fast")
    assert spec is not None
    assert spec.origin is not None
    info = Path(spec.origin).parent / "_build_info.json"
    report: dict[str, Any] = json.loads(info.read_text()).get(module, {}) if info.exists() else {}
    return report


def _load() -> str:
    """Import the extension, which registers its operators. Returns "" or the reason why there are none."""
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
    """Import kernels that tests/emulator/build.py compiled in the place of `module`."""
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])


def _load_cuda() -> str:
    """Import the CUDA kernels. Returns "" or the reason why there are none."""
    if CUDA_EMULATED:
        _load_emulator("bert_fast._CUDA", os.environ[_CUDA_EMULATOR])
        return ""
    report = build_report("_CUDA")
    if not report.get("built"):
        return f"not built: {report.get('reason', 'this installation is older than the CUDA kernels; build it again')}"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if torch.cuda.device_count() == 0:  # through NVML: leaves the process free to fork
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
    """The instruction set that the compiled CPU kernels use: generic, avx2, avx512 or avx512bf16.

    BERT_FAST_CPU_ISA lowers it. "generic" where there are no compiled kernels.
    """
    return "generic" if MISSING else str(_extension.cpu_isa())


def bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in units of its own: elsewhere torch's products take ten times float32's."""
    return cpu_isa() == "avx512bf16" and torch.cpu._is_avx512_bf16_supported()


def fingerprint(address: int, size: int) -> int:
    """A hash of 64 words spread over `size` bytes at `address`, which have to be there."""
    return int(_extension.fingerprint(address, size))


MISSING = _load()
_extension: Any = sys.modules.get("bert_fast._C")
CUDA_EMULATED = bool(os.environ.get(_CUDA_EMULATOR))
CUDA_MISSING = _load_cuda()
