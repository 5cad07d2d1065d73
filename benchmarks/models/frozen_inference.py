"""What reading the weights at every call costs: a model in inference, and a copy of it that `bert_fast.freeze` packed.

    python -m benchmarks.models.frozen_inference [--quick] [--record]

BERT-base and the six layers of MiniLM-L6-H384, packed batches of a few to a thousand tokens, float32, bfloat16 and
INT8, interleaved in one process. Both compute from the same weights; the results have to agree to the dtype's rounding.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import product

import torch
from torch import Tensor

import bert_fast
from benchmarks.runner.whole_models import Size
from bert_fast.bench.runner import Case, Plan, Variant, arguments, main, parse
from bert_fast.models import BertConfig, BertModel
from bert_fast.models.embedding import pack

SIZES = (Size("BERT-base", 12, 768, 3072), Size("MiniLM-L6-H384", 6, 384, 1536))
LENGTHS = ([8], [32], [128], [128] * 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


def model_of(size: Size, kind: str) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
    )
    model = BertModel(config, add_pooling_layer=False).eval().to(DTYPES[kind])
    return bert_fast.quantize(model) if kind == "int8" else model


def case(size: Size, kind: str, lengths: list[int]) -> Case:
    """One model and one batch."""
    inputs = pack([[5 + i % 900 for i in range(length)] for length in lengths])
    model = model_of(size, kind)

    def hidden(model: BertModel) -> Tensor:
        with torch.inference_mode():
            out: Tensor = model(**inputs).last_hidden_state
        return out

    def variant(model: BertModel) -> Variant:
        return Variant(partial(hidden, model), lambda _: hidden(model).double())

    # A packed product of oneDNN may add in another order, and its result is rounded before the next layer: one unit in
    # the last place a sublayer, at the largest value.
    bound = 2 * size.layers * torch.finfo(DTYPES[kind]).eps
    variants = {
        "weights read at every call": variant(model),
        "bert_fast.freeze": variant(bert_fast.freeze(copy.deepcopy(model))),
    }
    return Case(
        variants, lambda: hidden(model).double(), bound, flops=size.flops(lengths), dtype=DTYPES[kind], graph=False
    )


def plans(quick: bool) -> list[Plan]:
    cases = product(SIZES[1:] if quick else SIZES, DTYPES, LENGTHS)
    return [
        Plan(f"{size.name}, {sum(lengths)} tokens {kind}", partial(case, size, kind, lengths))
        for size, kind, lengths in cases
    ]


if __name__ == "__main__":
    options, machine = parse(arguments("inference with weights that are read at every call, and with frozen ones"))
    main("frozen_inference", plans(options.quick), options, machine)
