"""Whether the Triton kernels can run here and whether a recorded run verified them. Doesn't import triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from bert_fast.kernels._common import records
from bert_fast.kernels._common.dispatch import Availability

OLDEST = (3, 6)
# Triton reads the variable when a kernel is defined, so it applies to the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str:
    """The reason why Triton kernels can't run in this process, or ""."""
    try:
        installed = importlib.util.find_spec("triton") is not None
    except ImportError:
        installed = False
    if not installed:
        return "triton is not installed: pip install 'bert_fast[triton]'"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old: expected {'.'.join(map(str, OLDEST))} or newer"
    if INTERPRETED:
        return ""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"
    # Counted through NVML: unlike after torch.cuda.is_available() the process can still fork.
    if torch.cuda.device_count() == 0:
        return "no CUDA device was found (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"
    return ""


_MISSING = _missing()


def availability(op: str) -> Availability:
    """The availability of the op's Triton kernels in this process."""
    if _MISSING:
        return Availability(False, False, _MISSING)
    if INTERPRETED:
        return Availability(True, False, "in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1): for tests")
    families, reason = records.verified(op, "triton")
    return Availability(True, bool(families), reason)
