"""Times of benchmarks in the records of a device: their sizes are those that `auto` asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast.bench.kernels import case_of, record_times
from bert_fast.kernels._common import records
from bert_fast.kernels._common.benchmarks import Benchmark
from bert_fast.kernels._common.dispatch import OPS, Op
from bert_fast.kernels._common.times import Size, Time, size_of_rows
from bert_fast.kernels.add_layer_norm import cases as add_layer_norm_cases
from bert_fast.kernels.attention import cases as attention_cases
from bert_fast.kernels.bias_gelu import cases as bias_gelu_cases

CPU, BF16 = torch.device("cpu"), torch.bfloat16
BENCHMARKS = {
    "attention": lambda p: attention_cases.gpu_benchmark(CPU, [8, 5], 16, BF16, "forward", p, False),
    "bias_gelu": lambda p: bias_gelu_cases._benchmark(CPU, 4, 8, BF16, "forward"),
    "add_layer_norm": lambda p: add_layer_norm_cases._benchmark(CPU, 4, 8, BF16, "forward", p),
}


def test_every_op_with_several_gpu_kernels_is_here() -> None:
    several = {name for name, op in OPS.items() if {"triton", "cuda"} <= set(op.impls) and op.timed_as == name}
    assert several == set(BENCHMARKS)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("op", BENCHMARKS)
def test_the_size_of_a_benchmark_is_that_of_its_call(
    op: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark: Benchmark = BENCHMARKS[op](dropout_p)  # type: ignore[no-untyped-call]
    sizes: list[Size | None] = []
    select = Op.select

    def recording(self: Op, impl: str, x: torch.Tensor, dtype: Any = None, size: Size | None = None) -> Any:
        sizes.append(size)
        return select(self, impl, x, dtype, size)

    monkeypatch.setattr(Op, "select", recording)
    benchmark.call(*benchmark.inputs, impl="reference")
    assert sizes == [benchmark.size] != [None]
    expected = {"dtype": "bfloat16", "which": "forward", **sizes[0]._asdict()}  # type: ignore[union-attr]
    assert case_of(op, CPU, benchmark).call == expected


def test_the_times_of_ours_go_into_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[Time]] = {}

    def write_times(device: str, op: str, impl: str, times: list[Time]) -> Path | None:
        assert (device, op) == ("NVIDIA H200", "bias_gelu")
        written[impl] = times
        return None

    monkeypatch.setattr(records, "write_times", write_times)
    size = size_of_rows(16384, 4096)
    call = Time("bfloat16", "forward", size, 0.0).call()
    rows = [
        {"variant": "eager", "ms": 9.0, "call": call},
        {"variant": "bert_fast triton", "ms": 2.0, "call": call},
        {"variant": "bert_fast cuda", "ms": None, "call": call},  # refused
        {"variant": "bert_fast triton, with bias", "ms": 3.0, "call": call},
        {"variant": "bert_fast cuda", "ms": 1.0, "call": None},
    ]
    record_times("bias_gelu", "NVIDIA H200", {"rows": rows})
    assert written == {"triton": [Time("bfloat16", "forward", size, 2.0)]}
