"""The house rules that a file listing can prove: every op complete under its one name, no oversized file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import bert_fast.kernels
from bert_fast.kernels import available_impls
from bert_fast.kernels._common import dispatch

ROOT = Path(__file__).resolve().parents[1]
OPS = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "embedding_layer_norm",
    "lamb",
    "linear",
    "linear_int8",
    "masked_lm_loss",
    "padding",
]
WITHOUT_CPU_KERNELS = {"lamb"}  # an optimizer step is bound by memory that torch._foreach_* already streams


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_available_impls_lists_exactly_the_ops() -> None:
    assert sorted(available_impls()) == OPS
    for impls in available_impls().values():
        assert list(impls) == ["reference", "triton", "cuda", "cpu"]
        assert impls["reference"] == (True, True, "")
        assert all(found.ok or found.reason for found in impls.values())


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op: str) -> None:
    files = set(tracked())
    wanted = {f"kernels/{op}/{part}" for part in ("__init__.py", "api.py", "op.py", "reference.py", "README.md")}
    wanted |= {f"tests/kernels/test_{op}.py", f"kernels/{op}/cases.py"}
    if op not in WITHOUT_CPU_KERNELS:
        wanted |= {f"csrc/{op}/cpu.cpp", f"csrc/{op}/cpu_kernels.h"}
    assert wanted <= files, f"missing: {sorted(wanted - files)}"


def test_public_functions_are_exported_and_documented() -> None:
    for name in bert_fast.kernels.__all__:
        exported = getattr(bert_fast.kernels, name)
        assert exported.__doc__, f"{name} has no docstring"


def test_every_automatic_choice_carries_its_measurement() -> None:
    for op in dispatch.OPS.values():
        for choice in op.auto_rules:
            assert any(character.isdigit() for character in choice.measured), f"{op.name}: {choice}"


def test_no_source_file_is_longer_than_it_can_be_read() -> None:
    long = {
        name: lines
        for name in tracked()
        if name.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))
        and (lines := len((ROOT / name).read_text().splitlines())) > 600
    }
    assert not long, long


def test_no_empty_files_but_the_type_marker() -> None:
    assert [name for name in tracked() if not (ROOT / name).stat().st_size] == ["bert_fast/py.typed"]
