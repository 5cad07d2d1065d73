"""The speedup of `bert_fast.fuse`: a transformers model before and after it, inference and a step of fine-tuning.

    OMP_NUM_THREADS=1 python -m benchmarks.models.fuse_speed [--device cpu|cuda] [--quick] [--record]

`BertForSequenceClassification` with transformers' `sdpa` attention, and a fused copy of it, on the same padded batches:
four layers of BERT-base, and the six layers of MiniLM-L6-H384; full length and half filled; FP32 and BF16
autocast. "infer" is the logits; "train" is forward, backward and AdamW with dropout 0.1. FLOPs are those of the
encoder's matrix products over the real tokens. Without AVX-512 a step in BF16 takes minutes for both models, so only
MiniLM's inference is timed there.

Before a case is timed, its logits and, for a step, the gradient of every weight are compared without dropout with
transformers in float64: the error of a fused model may be three times that of transformers in the same precision, plus
a floor; if it exceeds that, the fused model is not timed and the exit code is 1.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner.whole_models import FACTOR, FLOOR_ULPS, Size, model_of
from bert_fast import fuse
from bert_fast._device import autocast
from bert_fast.bench.runner import Case, Plan, Variant, arguments, main, parse
from bert_fast.kernels._common.benchmarks import dtype_name, half_filled

SIZES = (Size("base, 4 layers", 4, 768, 3072), Size("MiniLM-L6-H384", 6, 384, 1536, batch=8))


def batch_of(size: Size, lengths: list[int]) -> dict[str, Tensor]:
    mask = (torch.arange(size.seqlen) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(5, size.vocabulary, mask.shape) * mask,
        "attention_mask": mask,
        "labels": torch.arange(len(lengths)) % 2,
    }


def logits_and_gradients(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype, train: bool) -> Tensor:
    """The compared values, concatenated: the logits and each weight's gradient, each over its norm."""
    model.eval()
    with (
        autocast(inputs["labels"].device, dtype_name(dtype)),
        torch.set_grad_enabled(train),
    ):
        out = model(**inputs)
    parts = [out.logits.detach().double().flatten()]
    if train:
        weights = [p for p in model.parameters() if p.dim() == 2]
        parts += [g.double().flatten() for g in torch.autograd.grad(out.loss, weights)]
    return torch.cat([part / part.norm() for part in parts])


def variant(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype, train: bool) -> Variant:
    """The call that is timed, with the model's values without dropout as its result."""
    context = partial(autocast, inputs["labels"].device, dtype_name(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the work of a step, without changing the weights

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), context():
            model(**inputs)

    def step() -> None:
        model.train()
        with context():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(step if train else infer, lambda _: logits_and_gradients(model, inputs, dtype, train))


def case(device: torch.device, size: Size, filled: str, dtype: torch.dtype, kind: str) -> Case:
    """One size: transformers' model and its fused copy."""
    torch.manual_seed(0)
    train = kind == "train"
    lengths = half_filled(size.batch, size.seqlen) if filled else [size.seqlen] * size.batch
    theirs = model_of(size).to(device)
    inputs = {name: x.to(device) for name, x in batch_of(size, lengths).items()}
    compared: Callable[[Any, torch.dtype], Tensor] = partial(logits_and_gradients, inputs=inputs, train=train)
    exact = compared(copy.deepcopy(theirs).double(), dtype=torch.float64)
    error = float((compared(theirs, dtype=dtype) - exact).abs().max() / exact.abs().max())
    return Case(
        {
            "transformers": variant(theirs, inputs, dtype, train),
            "bert_fast fuse": variant(fuse(copy.deepcopy(theirs)), inputs, dtype, train),
        },
        lambda: exact,
        FACTOR * error + FLOOR_ULPS * torch.finfo(dtype).eps,
        flops=size.flops(lengths) * (3 if train else 1),
        dtype=dtype,
        graph=False,  # the host reads the number of real tokens
    )


def plans(device: torch.device, quick: bool) -> list[Plan]:
    bf16 = torch.bfloat16
    cases = list(product(SIZES, (torch.float32, bf16), ("infer", "train"), ("", " half filled")))
    if quick:
        cases = [one for one in cases if one[1] is not bf16]
    elif device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        cases = [one for one in cases if one[1] is not bf16 or (one[0] is SIZES[1] and one[2] == "infer")]
    return [
        Plan(
            f"{size.name}, {size.batch} x {size.seqlen}{filled} {dtype_name(dtype)} {kind}",
            partial(case, device, size, filled, dtype, kind),
        )
        for size, dtype, kind, filled in cases
    ]


if __name__ == "__main__":
    options, machine = parse(arguments("a transformers model before and after bert_fast.fuse"))
    sys.exit(main("fuse", plans(machine.device, options.quick), options, machine))
