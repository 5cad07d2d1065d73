"""What `bert-fast verify` checks of whole models: each head of a small encoder, and dropout over layers and steps.

- the outputs of each head and the gradient of its word embeddings, in float32 and bfloat16, against float64 and eager
  PyTorch: at most three times eager's error;
- the masks of every place of dropout in every layer, over two steps: pairwise independent, at their rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from bert_fast.golden import DTYPES, HEADS, compare_head, inputs_of, tiny_model
from bert_fast.kernels import use_impl
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels._common.library import simulated
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.verification_kernels import DEVIATIONS, Check, correlation, guarded

SHAPE = (2, 24, 64)  # of a mask: heads, rows, columns
DROPOUT = 0.25


def check_models(impls: list[str] | None = None, seed: int = 0) -> Iterator[Check]:
    """Every head with every implementation that has all of its ops, on the devices of this machine."""
    with torch.random.fork_rng(devices=[]):
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for impl in model_impls(device):
                if impls is not None and impl not in impls:
                    continue
                for head in HEADS:
                    torch.manual_seed(seed)
                    subject = f"{head} {impl} {device}"
                    yield from guarded("model", subject, partial(head_errors, head, impl, device))
        if impls is None:
            torch.manual_seed(seed)
            model = tiny_model("BertForMaskedLM", dropout=DROPOUT).train()
            inputs = inputs_of("BertForMaskedLM")
            yield from guarded("dropout", "BertForMaskedLM", partial(model_dropout, model, inputs))


def model_impls(device: str) -> list[str]:
    """ "auto", and what has every op of an encoder on `device`; the definition is the yardstick."""
    needed = ("embedding_layer_norm", "attention", "add_layer_norm", "bias_gelu", "linear")
    return ["auto"] + [
        impl
        for impl, implementation in OPS["attention"].impls.items()
        if implementation.device == device
        and not simulated(impl)
        and all(impl in OPS[op].impls and OPS[op].impls[impl].availability.ok for op in needed)
    ]


def head_errors(head: str, impl: str | Mapping[str, str], device: str) -> Iterator[tuple[str, float, float]]:
    """The output or gradient nearest to its bound, in each dtype."""
    model = tiny_model(head).to(device).eval()
    inputs = {name: x.to(device) for name, x in inputs_of(head).items()}
    for dtype in DTYPES:
        rows = compare_head(model, inputs, dtype, impl)
        name, (_, worst) = max(rows.items(), key=lambda row: row[1][1].ours / max(row[1][1].bound, 1e-30))
        yield f"{name} {str(dtype).removeprefix('torch.')}", worst.ours, worst.bound


def dropout_states(model: Any, inputs: dict[str, Tensor], steps: int = 2) -> dict[str, Tensor]:
    """The (seed, offset) that each place of dropout got in each step, by its name."""
    found: dict[str, Tensor] = {}

    def hook(place: str, module: Any, arguments: tuple[Any, ...]) -> None:
        states = [x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.int64 and x.shape[-1:] == (2,)]
        for index, state in enumerate(states[0].view(-1, 2)):
            found[f"{place}, place {index}"] = state.clone()

    places = {"embeddings": model.bert.embeddings} | {
        f"layer {index}": layer for index, layer in enumerate(model.bert.encoder.layer)
    }
    model.bert.encoder.gradient_checkpointing = True  # layers run as modules, with their hooks
    try:
        for step in range(steps):
            handles = [
                module.register_forward_pre_hook(partial(hook, f"step {step}, {place}"))
                for place, module in places.items()
            ]
            model(**inputs)
            for handle in handles:
                handle.remove()
    finally:
        model.bert.encoder.gradient_checkpointing = False
    return found


def model_dropout(model: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[str, float, float]]:
    """The masks of the model's states: their rate, the most alike pair, and a chi-square over all pairs."""
    with use_impl("reference"):
        states = dropout_states(model, inputs)
    expected = 2 * (1 + 3 * len(model.bert.encoder.layer))
    yield "places of dropout", abs(len(states) - expected), 0.0
    masks = {name: (dropout_multiplier(state, DROPOUT, *SHAPE) > 0).double() for name, state in states.items()}
    kept = torch.stack(list(masks.values()))
    deviation = math.sqrt(DROPOUT * (1 - DROPOUT) / kept.numel())
    yield "rate", abs(float(kept.mean()) - (1 - DROPOUT)) / deviation, DEVIATIONS
    pairs = {(a, b): correlation(masks[a], masks[b], DROPOUT) for a, b in combinations(masks, 2)}
    (a, b), worst = max(pairs.items(), key=lambda pair: pair[1])
    yield f"{a} and {b}" if worst > DEVIATIONS else "layers and steps", worst, DEVIATIONS
    chi_square = sum(value**2 for value in pairs.values())
    yield "chi-square", (chi_square - len(pairs)) / math.sqrt(2 * len(pairs)), DEVIATIONS
