"""The compiled modules use only C functions of torch that torch 2.11, the oldest supported version, has."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import bert_fast

# The functions of torch that the modules use; each is exported by the libraries of torch 2.11.0 (the wheel for macOS,
# the smallest), or declared in its headers (aoti_torch_get_current_cuda_stream, of builds with CUDA). Check a new one
# there before adding it.
KNOWN = Path(__file__).with_name("torch_2_11_functions.txt")
MODULES = {
    "CPU kernels": sorted(Path(bert_fast.__file__).parent.glob("_C.*")),
    "emulated CUDA kernels": [Path(file) for file in [os.environ.get("BERT_FAST_CUDA_EMULATOR")] if file],
}


def undefined(module: Path) -> list[str]:
    """The undefined symbols of the module, without versions."""
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", str(module)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split()[-1].split("@")[0] for line in done.splitlines()]


@pytest.mark.parametrize("kind", MODULES)
def test_only_functions_of_the_oldest_torch_are_used(kind: str) -> None:
    known = set(KNOWN.read_text().split())
    for module in MODULES[kind]:
        names = undefined(module)
        assert [name for name in names if "torch" in name], "no symbol of torch in the output of nm"
        assert not {name for name in names if "torch" in name} - known
        mangled = [name for name in names if name.startswith("_Z") and ("3c10" in name or "2at" in name)]
        assert not mangled, "C++ symbols of torch, which change between releases"
