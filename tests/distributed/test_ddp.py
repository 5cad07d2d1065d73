"""The model under DistributedDataParallel, with every implementation that has all of its ops here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_fast.kernels import available_impls

WORKER = Path(__file__).with_name("ddp_worker.py")
MODEL_OPS = ("add_layer_norm", "attention", "bias_gelu", "embedding_layer_norm", "masked_lm_loss", "padding")
# On a machine with a GPU the Triton kernels need CUDA tensors, and gloo can't reduce those of two ranks on one GPU.
IMPLS = [
    impl
    for impl in ("reference", "triton", "cpu")
    if all(available_impls()[op][impl].ok for op in MODEL_OPS) and not (impl == "triton" and torch.cuda.is_available())
]


@pytest.mark.parametrize(("impl", "kind"), [*((impl, "bert_fast") for impl in IMPLS), ("auto", "fused")])
def test_gradients_are_the_mean_over_the_ranks(impl: str, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER, impl, kind],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
