"""A step of masked-language-model training on a CPU compared with transformers: forward, backward and AdamW.

    python -m benchmarks.models.cpu_training [--record] [--threads N] [--precisions fp32 bf16] [--compile] [--seconds S]
    python -m benchmarks.models.cpu_training --smoke     a tiny model: checks that it runs, without figures

BERT-base, 8 sequences of 128 tokens, full and half filled (lengths evenly spaced from 4 to 128), 15 % of the tokens
masked, dropout 0.1; FP32, and BF16 autocast. transformers gets padded batches and `sdpa` attention, ours the same
sequences packed; both use fused AdamW with a learning rate of zero, which is the same work and keeps the weights. FLOPs
are those of the matrix products over real and masked tokens, three times the forward's. `bert-fast bench kernels
attention` times attention alone.

As in `bert-fast pretrain`, freed memory stays with the process (`bert_fast/_heap.py`), for transformers too.

Before a case is timed, the loss and the gradient of the word embeddings, which depends on the whole backward pass, are
compared without dropout with transformers in float64: the error of ours may be three times that of transformers in the
same precision, plus a floor; if one exceeds that, nothing is reported.

Without AVX-512 a step in BF16 takes minutes, so it is skipped there unless `--precisions` names it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.cpu_inference import conclude, processor_options, processor_parser, settings_of
from benchmarks.runner.whole_models import FACTOR, FLOOR_ULPS, Scenario, Size, batches, model_of
from bert_fast._device import autocast
from bert_fast._heap import keep_freed_memory
from bert_fast.bench.devices import Cpu
from bert_fast.bench.runner import Case, Plan, Variant, exit_code, run, saving, warm
from bert_fast.data import PackedBatch
from bert_fast.kernels._common.benchmarks import evenly_spaced
from bert_fast.models import BertForMaskedLM

CPU = torch.device("cpu")
BASE = Size("BERT-base", 12, 768, 3072, batch=8, seqlen=128)
SMOKE = Size("tiny", 2, 64, 128, heads=2, vocabulary=100, batch=3, seqlen=12)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Batches = tuple[PackedBatch, dict[str, Tensor]]  # the same sequences packed and padded


@dataclass(frozen=True)
class Side:
    """A model, and its masked-language-model loss of a batch."""

    model: Any
    loss: Callable[[Batches], Tensor]


def theirs_of(model: Any, call: Callable[..., Any] | None = None) -> Side:
    """transformers' BertForMaskedLM, through `call` if given (the compiled model)."""

    def loss(batch: Batches) -> Tensor:
        inputs = {name: batch[1][name] for name in ("input_ids", "attention_mask", "labels")}
        result: Tensor = (call or model)(**inputs).loss
        return result

    return Side(model, loss)


def ours_of(model: BertForMaskedLM) -> Side:
    """Ours on the packed batch."""

    def loss(batch: Batches) -> Tensor:
        names = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "max_seqlen", "labels")
        result: Tensor = model(**{name: getattr(batch[0], name) for name in names}).loss
        return result

    return Side(model, loss)


@cache
def variants_of(size: Size, compiled: bool) -> dict[str, Side]:
    """transformers' model, the same compiled if `compiled`, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = model_of(size, "BertForMaskedLM")
    ours = BertForMaskedLM(settings_of(theirs))
    ours.load_hf(theirs.state_dict())
    variants: dict[str, Side] = {"transformers": theirs_of(theirs)}
    if compiled:
        variants["transformers, torch.compile"] = theirs_of(theirs, torch.compile(theirs, dynamic=False))
    return {**variants, "bert_fast": ours_of(ours)}


def loss_and_gradient(variant: Side, batch: Batches, precision: str) -> Tensor:
    """The compared values, without dropout: the loss, and the word embeddings' gradient over its largest value."""
    variant.model.eval()
    with autocast(CPU, precision):
        loss = variant.loss(batch)
    (gradient,) = torch.autograd.grad(loss, [variant.model.get_input_embeddings().weight])
    return torch.cat([loss.detach().double().reshape(1), (gradient / gradient.abs().max()).double().flatten()])


def step_of(variant: Side, batch: Batches, precision: str) -> Callable[[], None]:
    """Forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(variant.model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        variant.model.train()
        with autocast(CPU, precision):
            loss = variant.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def case(size: Size, lengths: list[int], precision: str, compiled: bool) -> Case:
    """One batch in one precision."""
    variants = variants_of(size, compiled)
    torch.manual_seed(0)
    batch = batches(Scenario("", lengths, size.seqlen), size.vocabulary, torch.device("cpu"))
    theirs = variants["transformers"]
    exact = loss_and_gradient(theirs_of(copy.deepcopy(theirs.model).double()), batch, "fp64")
    error = float((loss_and_gradient(theirs, batch, precision) - exact).abs().max() / exact.abs().max())
    masked = int((batch[0].labels >= 0).sum())
    head = 2 * masked * (size.hidden**2 + size.hidden * size.vocabulary)
    return Case(
        {
            f"{name}, {precision}": Variant(
                step_of(variant, batch, precision),
                lambda _, variant=variant: loss_and_gradient(variant, batch, precision),  # type: ignore[misc]
                precision=precision,
            )
            for name, variant in variants.items()
        },
        lambda: exact,
        FACTOR * error + FLOOR_ULPS * torch.finfo(DTYPES[precision]).eps,
        flops=3 * (size.flops(lengths) + head),
        graph=False,
        tokens=sum(lengths),
    )


def plans(size: Size, precisions: list[str], compiled: bool) -> list[Plan]:
    result = []
    for precision in precisions:
        for half in (False, True):
            lengths = evenly_spaced(size.batch, 4, size.seqlen) if half else [size.seqlen] * size.batch
            title = f"({size.batch}, {size.seqlen}){' half filled' if half else ''} train {size.name} {precision}"
            result.append(Plan(title, partial(case, size, lengths, precision, compiled)))
    return result


def main() -> int:
    parser = processor_parser("a training step on a CPU compared with transformers", seconds=30.0)
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=None, help="bf16 needs AVX-512")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    options = processor_options(parser)
    if not options.smoke:  # which tests run in their own process
        keep_freed_memory()
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability() or options.smoke
    precisions = options.precisions or [name for name in DTYPES if name == "fp32" or wide]
    selected = plans(SMOKE if options.smoke else BASE, precisions, options.compile)
    if options.warm:
        return exit_code(warm(selected, Cpu()))
    seconds = 0.01 if options.smoke else 5.0 if options.quick else options.seconds
    report = run("cpu_training", selected, Cpu(), seconds, options.budget, saving("cpu_training", options))
    if "bf16" not in precisions:
        print("bf16: not measured: without AVX-512 a step takes minutes; --precisions bf16 measures it")
    return conclude("cpu_training", report, options)


if __name__ == "__main__":
    sys.exit(main())
