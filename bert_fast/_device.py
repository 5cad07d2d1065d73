"""The device and the precision that a program computes with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators of the CPU and of `device`, by the type of device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` returned; without a state of `device` its generator is left as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
