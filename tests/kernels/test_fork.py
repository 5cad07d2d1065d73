"""The ops in a process that was forked after OpenMP's threads had started: libgomp would wait for them forever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, sys
import torch
from bert_fast.kernels import available_impls
from bert_fast.kernels._common import cases

def run(op):
    torch.manual_seed(0)
    outs = []
    for sample in cases.load(op).samples():
        inputs = sample.cast(torch.float32)
        for grad in (False, True) if sample.gradients else (False,):
            leaves = [x.requires_grad_(grad) for x in inputs.values() if x.is_floating_point()]
            with torch.set_grad_enabled(grad):
                out = sample.call(impl="cpu", **inputs)
            out = out if isinstance(out, tuple) else (out,)
            outs += [x.detach().double() for x in out if isinstance(x, torch.Tensor)]
            if grad:
                gradients = torch.autograd.grad(out[0].sum(), leaves, allow_unused=True)
                outs += [x.double() for x in gradients if x is not None]
    return outs

def child(op, pipe):
    pipe.send([x.tolist() for x in run(op)])

torch.set_num_threads(2)
for op in [op for op, impls in available_impls().items() if "cpu" in impls and impls["cpu"].ok]:
    expected = run(op)
    torch.randn(2000, 2000).exp_()  # starts the threads, if the op had none to
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(op, there), daemon=True)
    process.start()
    assert here.poll(60), f"{op} hangs"
    for value, right in zip(here.recv(), expected, strict=True):
        value = torch.tensor(value, dtype=torch.float64).reshape(right.shape)
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)  # torch's sums depend on the threads
    process.join(30)
    print(op, torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_every_op_computes_in_a_forked_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 7
    assert all(line.endswith(" 2") for line in lines)  # the parent keeps its threads
