"""How much work a step is, in model FLOPs, and the share of what this machine could do that it takes (MFU)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bert_fast.models import BertConfig
from bert_fast.pretrain.micro_batches import StepBatches

_SECONDS = {"cpu": 0.05, "cuda": 0.5}
_SIZE = {"cpu": 768, "cuda": 8192}


def model_flops(config: BertConfig, *, tokens: float, squares: float, masked: float, sequences: float) -> float:
    """Floating-point operations of forward and backward: those of matrix products, a multiply-add being two.

        forward = L (2 T (4 E^2 + 2 E F) + 4 E sum(len^2)) + 2 M (E^2 + E V) + 2 B (E^2 + 2 E)

    and the backward pass twice that. What a program computes beside (padding, activations again) is not the model's and
    not in it; what it leaves out (rows of the last layer that nothing depends on) is.

    Args:
        tokens: T, real ones.
        squares: sum of the squares of the sequences' lengths.
        masked: M, the tokens to predict.
        sequences: B.
    """
    E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layers = config.num_hidden_layers * (2 * tokens * (4 * E**2 + 2 * E * F) + 4 * E * squares)
    heads = 2 * masked * (E**2 + E * V) + 2 * sequences * (E**2 + 2 * E)
    return 3.0 * (layers + heads)


def gemm_ceiling(device: torch.device, precision: str) -> Tensor:
    """FLOP/s of a large matrix product on `device` in `precision`: the best of a short while, float64 ()."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n, seconds = _SIZE[device.type], _SECONDS[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return torch.tensor(2.0 * n**3 / best, dtype=torch.float64, device=device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """What a run does in a second of training alone: what runs inside `paused` does not count.

    Args:
        config: the model.
        budget: tokens that the micro-batches of a step could have.
        ceiling: FLOP/s of all ranks together, or None where it was not measured.

    Attributes:
        seconds, tokens: of all laps.
    """

    def __init__(self, config: BertConfig, budget: int, ceiling: float | None) -> None:
        self._config, self._budget, self._ceiling = config, budget, ceiling
        self.seconds, self.tokens = 0.0, 0
        self._since, self._done = time.perf_counter(), [0, 0, 0, 0]

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def add(self, taken: StepBatches) -> None:
        """A step is done."""
        new = (1, taken.tokens, taken.squares, taken.examples)
        self._done = [a + b for a, b in zip(self._done, new, strict=True)]

    def lap(self, masked: float) -> dict[str, float]:
        """Of the steps since the last lap, with `masked` tokens to predict: what the log says about the speed.

        tokens_per_second (real ones), fill (the share of the token budget that they take), tflops (model FLOPs a
        second, in 10^12) and, where the ceiling is known, mfu (the share of it).
        """
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        steps, tokens, squares, sequences = self._done
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        self._since, self._done = now, [0, 0, 0, 0]
        work = model_flops(self._config, tokens=tokens, squares=squares, masked=masked, sequences=sequences)
        found = {
            "tokens_per_second": tokens / seconds,
            "fill": tokens / max(steps * self._budget, 1),
            "tflops": work / seconds / 1e12,
        }
        return found if self._ceiling is None else {**found, "mfu": work / seconds / self._ceiling}
