"""The CPU kernels of instruction sets that this CPU lacks or doesn't choose: the tests of the ops, a process for each.

AVX-512 is emulated (tests/emulator/build.py), with vectors and tiles of the same size and the bfloat16 dot product in
the arithmetic of its instruction. The compiler's code for AVX-512 itself is not tested here.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "embedding_layer_norm",
    "lamb",
    "linear",
    "linear_int8",
    "masked_lm_loss",
)
# Tests that don't depend on the instruction set (schemas, tracing, memory), and the slowest comparisons.
EXCLUDED = ("compile", "opcheck", "memory", "transformers", "30522", "autocast", "at_512 and bfloat16")


BUILD = runpy.run_path(str(ROOT / "tests" / "emulator" / "build.py"))
SMALLEST = Fraction(1, 2**126)  # the smallest normal float32


@pytest.fixture(scope="module")
def emulator() -> str:
    return str(BUILD["build"]("_C"))


def run(isa: str, ops: tuple[str, ...], only: str, **environment: str) -> None:
    """Run those tests of `ops` that the expression `only` selects with the kernels of `isa`."""
    selected = " and ".join(["cpu-cpu", *([only] if only else []), *(f"not ({name})" for name in EXCLUDED)])
    files = [str(ROOT / "tests" / "kernels" / f"test_{op}.py") for op in ops]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *files]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env.update(environment, BERT_FAST_CPU_ISA=isa, BERT_FAST_CUDA_EMULATOR="")  # empty: none
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 20 * len(ops), done.stdout[-1000:]
    assert "skipped" not in done.stdout


def test_baseline() -> None:
    run("generic", ("attention",), "")


def test_avx512(emulator: str) -> None:
    run("avx512", OPS, "", BERT_FAST_AVX512_EMULATOR=emulator)


def test_avx512_with_bfloat16_dot_products(emulator: str) -> None:
    run("avx512bf16", ("attention", "linear"), "not float32", BERT_FAST_AVX512_EMULATOR=emulator)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_products_of_lower_instruction_sets(isa: str) -> None:
    """Compiled, not emulated, where this CPU has them: AVX2, and AVX-512 without dot products (VNNI, BF16)."""
    run(isa, ("linear", "linear_int8"), "")


def flushed(x: Fraction) -> Fraction:
    return x if abs(x) >= SMALLEST else Fraction(0)


def nearest(x: Fraction) -> Fraction:
    """`x` rounded to float32, to nearest even, and to zero below the smallest normal number."""
    if not x:
        return x
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return flushed(round(x / unit) * unit)  # `round` of a Fraction is to even


def value(bits: int) -> Fraction:
    return flushed(Fraction(float(np.array(bits, np.uint32).view(np.float32))))


def test_bf16_dot_is_two_fused_multiply_adds_the_high_halves_first(tmp_path: Path) -> None:
    """Intel's Software Developer's Manual, VDPBF16PS: subnormal inputs and outputs are flushed to zero."""
    program = tmp_path / "cases"
    BUILD["build_program"]("_C", ("tests/emulator/bf16_dot_cases.cpp",), program)
    rng = np.random.default_rng(0)
    signs = rng.integers(0, 2, (3, 2, 600)) << 15
    exponents = np.concatenate([rng.integers(117, 138, (3, 2, 400)), rng.integers(0, 90, (3, 2, 200))], axis=2)
    halves = signs | exponents << 7 | rng.integers(0, 128, (3, 2, 600))  # sum, a, b as two bfloat16 each
    halves[0, 1] = rng.integers(0, 2**16, 600)  # the low half of a float32 may be anything
    words = (halves[:, 0] << 16 | halves[:, 1]).astype(np.uint32).T
    lines = "\n".join(" ".join(f"{word:x}" for word in row) for row in words)
    results = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True).stdout.split()
    assert len(results) == len(words)
    for (total, a, b), bits in zip(words.tolist(), results, strict=True):
        high = nearest(value(total) + value(a & 0xFFFF0000) * value(b & 0xFFFF0000))
        expected = nearest(high + value(a << 16 & 0xFFFF0000) * value(b << 16 & 0xFFFF0000))
        assert Fraction(float(np.array(int(bits, 16), np.uint32).view(np.float32))) == expected
