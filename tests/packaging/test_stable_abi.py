"""The compiled modules use nothing of torch but C functions that torch 2.11, the oldest supported, has."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import bert_fast

# What the modules take from torch; each was found in the libraries of torch 2.11.0 (its wheel for macOS, the smallest),
# aoti_torch_get_current_cuda_stream, which builds with CUDA have, in its headers. Look a new one up there before it
# comes in here.
KNOWN = Path(__file__).with_name("torch_2_11_functions.txt")
MODULES = {
    "CPU kernels": sorted(Path(bert_fast.__file__).parent.glob("_C.*")),
    "emulated CUDA kernels": [Path(file) for file in [os.environ.get("BERT_FAST_CUDA_EMULATOR")] if file],
}


def undefined(module: Path) -> list[str]:
    """Names that the module expects others to define, without versions."""
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", str(module)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split()[-1].split("@")[0] for line in done.splitlines()]


@pytest.mark.parametrize("kind", MODULES)
def test_only_functions_that_the_oldest_torch_has(kind: str) -> None:
    known = set(KNOWN.read_text().split())
    for module in MODULES[kind]:
        names = undefined(module)
        assert [name for name in names if "torch" in name], "no module of torch's; nm reads something else"
        assert not {name for name in names if "torch" in name} - known
        mangled = [name for name in names if name.startswith("_Z") and ("3c10" in name or "2at" in name)]
        assert not mangled, "C++ of torch, whose names change from one release to the next"
