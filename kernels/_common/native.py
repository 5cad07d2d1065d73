"""Load the compiled kernels (`bert_fast._C`) once, and keep the reason where they are absent."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch


def _load() -> str:
    """Import the extension, which registers its operators. Returns "" or the reason why there are none."""
    try:
        importlib.import_module("bert_fast._C")
    except ImportError as error:
        spec = importlib.util.find_spec("bert_fast")
        assert spec is not None
        assert spec.origin is not None
        info = Path(spec.origin).parent / "_build_info.json"
        if info.exists():
            report = json.loads(info.read_text())["_C"]
            if not report["built"]:
                return f"not built: {report['reason']}"
        return f"not built: {error}"
    return ""


MISSING = _load()


def registered(operator: str, dispatch_key: str) -> bool:
    """Whether `operator` ("bert_fast::name") has a native kernel for `dispatch_key` ("CPU", "CUDA")."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key))
