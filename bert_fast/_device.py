"""The device and the precision that a program computes with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def resolve_device(device: str) -> torch.device:
    """The torch device for "auto" (CUDA if available, else the CPU), "cpu", "cuda", "cuda:1"...

    Raises:
        ValueError: `device` is not a device string, or this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}; this machine has {torch.cuda.device_count()} CUDA devices usable by torch"
        )
    return resolved


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast on `device` for precision "bf16", no autocast for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
