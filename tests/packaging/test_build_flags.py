"""csrc/build_flags.py: the choice of the compiler and of the GPU architectures."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest

FLAGS = runpy.run_path(str(Path(__file__).resolve().parents[2] / "csrc" / "build_flags.py"))

# `nvcc --list-gpu-code` of CUDA 13.0 and of CUDA 12.0.
CUDA_13_0 = "sm_75\nsm_80\nsm_86\nsm_87\nsm_88\nsm_89\nsm_90\nsm_100\nsm_110\nsm_103\nsm_120\nsm_121\n"
CUDA_12_0 = "sm_50\nsm_52\nsm_53\nsm_60\nsm_61\nsm_62\nsm_70\nsm_72\nsm_75\nsm_80\nsm_86\nsm_87\nsm_89\nsm_90\n"


@pytest.mark.parametrize(
    ("gpu_code", "architectures"),
    [(CUDA_13_0, ["80", "90a", "100"]), (CUDA_12_0, ["80", "90a"]), ("sm_80\nsm_86\n", ["80"])],
    ids=["13.0", "12.0", "ampere"],
)
def test_hopper_is_compiled_for_sm_90a_which_nvcc_lists_as_sm_90(gpu_code: str, architectures: list[str]) -> None:
    assert FLAGS["cuda_architectures"](gpu_code) == architectures


@pytest.mark.parametrize(
    ("architectures", "ptx"),
    [(["80", "90a", "100"], "100"), (["80", "90a"], "80"), (["90a"], None), (["100", "80"], "100")],
)
def test_ptx_of_the_newest_architecture_is_embedded(architectures: list[str], ptx: str | None) -> None:
    flags = FLAGS["gencode"](architectures)
    assert flags[: len(architectures)] == [f"-gencode=arch=compute_{x},code=sm_{x}" for x in architectures]
    assert flags[len(architectures) :] == ([f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else [])


def test_cuda_runtime_is_the_one_that_is_loaded() -> None:
    line = "7f00-7f01 r--p 00000000 fe:00 1234                       "
    torch = f"{line}/env/torch/lib/libtorch_cuda.so\n"
    assert FLAGS["cuda_runtime"](f"{torch}{line}/an env/nvidia/cu13/lib/libcudart.so.13\n{torch}") == (
        "/an env/nvidia/cu13/lib/libcudart.so.13"
    )
    assert FLAGS["cuda_runtime"](torch) is None


def test_compiler_is_the_first_command_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -O2")
    assert FLAGS["compiler"]() == shutil.which(sys.executable)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert FLAGS["compiler"]() is None
