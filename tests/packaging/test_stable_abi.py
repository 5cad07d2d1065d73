"""The compiled modules import only C functions of torch that torch 2.11, the oldest supported, exports."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import bert_fast

# The functions that the modules import from torch, all exported by the libraries of torch 2.11.0: checked in its wheel
# for macOS or Linux and, for aoti_torch_get_current_cuda_stream, which only builds with CUDA have, in its headers.
# Check a new one there before adding it.
ALLOWED = Path(__file__).with_name("torch_2_11_functions.txt")
MODULES = {
    "CPU kernels": sorted(Path(bert_fast.__file__).parent.glob("_C.*")),
    "emulated CUDA kernels": [Path(file) for file in [os.environ.get("BERT_FAST_CUDA_EMULATOR")] if file],
}


def undefined(module: Path) -> list[str]:
    """The undefined symbols of the module, without versions."""
    command = ["nm", "-D", "--undefined-only", str(module)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1].split("@")[0] for line in symbols.splitlines()]


@pytest.mark.parametrize("kind", MODULES)
def test_only_functions_that_the_oldest_torch_exports(kind: str) -> None:
    allowed = set(ALLOWED.read_text().split())
    for module in MODULES[kind]:
        names = undefined(module)
        assert [name for name in names if "torch" in name], "no symbol of torch: nm lists something else"
        assert not {name for name in names if "torch" in name} - allowed
        mangled = [name for name in names if name.startswith("_Z") and ("3c10" in name or "2at" in name)]
        assert not mangled, "C++ symbols of torch, which change between releases"
