"""Recorded results of ops, heads and a training curve: `bert-fast verify --golden` shows which numbers move.

A new torch, compiler or processor may move them; a kernel or a definition that changes does.

`golden.safetensors` has `PLACES` elements of each result, computed from inputs of a fixed seed: in float64 by the
reference, in float32 and bfloat16 by the implementations that `auto` takes. Its metadata has the
tolerance of each result.

- float64: `FLOAT64_TOLERANCE` of the largest value. Additions in another order and another exp or erf move a value by a
  few units in the last place (2e-16), and the longest sums here have a few thousand terms.
- float32, bfloat16: the bound of the three-way test at the time of the recording. Bits differ by instruction set, but
  every right kernel is within that bound of float64, so two of them are hardly ever further apart.
- losses of a head: twice the tolerance of its logits more, by which a cross entropy follows them at most; a single
  number's own error may be near 0 by luck.
- the training curve: `CURVE_TOLERANCE`, absolute, of each loss: forty times the 2.4e-7 by which the instruction sets
  of the CPU kernels and the reference differed when it was recorded.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast._io import atomic_file
from bert_fast._lock import exclusive
from bert_fast.kernels import use_impl
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.testing.three_way import Comparison, compare, max_error, sample_triples

FILE = Path(__file__).with_name("golden.safetensors")
PLACES = 12
SEED = 20
FLOAT64_TOLERANCE = 1e-12
CURVE_STEPS, CURVE_EVERY, CURVE_TOLERANCE = 200, 10, 1e-5
DTYPES = (torch.float32, torch.bfloat16)
HEADS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)


@dataclass(frozen=True)
class Moved:
    """One result beside the recorded one.

    Attributes:
        name: "attention/no dropout/out/float32".
        distance: the largest difference of an element; inf where the shape is another one or there is no recorded one.
        tolerance: what it may be.
        note: why there is nothing to compare.
    """

    name: str
    distance: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.note and self.distance <= self.tolerance


class Value:
    """`PLACES` elements of a result, in order of memory, and the tolerance of a difference from them."""

    def __init__(self, x: Tensor, tolerance: float) -> None:
        flat = x.detach().flatten().double()
        places = torch.linspace(0, max(0, flat.numel() - 1), min(PLACES, flat.numel())).round().long()
        self.elements, self.tolerance = flat[places], tolerance


def compute() -> Iterator[tuple[str, Value]]:
    """The results by their names: of ops, heads and the training curve. It takes about half a minute of one core."""
    with torch.random.fork_rng(devices=[]):
        for op in sorted(OPS):
            yield from _of_op(op)
        for head in HEADS:
            yield from _of_head(head)
        yield "training curve/float32", Value(training_curve(), CURVE_TOLERANCE)


def check(path: Path = FILE) -> list[Moved]:
    """Every result beside the recorded one.

    Raises:
        FileNotFoundError: nothing is recorded.
    """
    recorded, tolerances, _ = read(path)
    rows, found = [], set()
    for name, value in compute():
        found.add(name)
        rows.append(_moved(name, value, recorded, tolerances))
    return rows + [Moved(name, 0.0, 0.0, "recorded, but no longer computed") for name in sorted(set(recorded) - found)]


def update(path: Path = FILE) -> list[Moved]:
    """Record the results, atomically; returns what differs from those recorded before, in any bit.

    Raises:
        OutputBusyError: another process records.
    """
    from safetensors.torch import save

    with exclusive(path, what="recording of golden files"):
        old, tolerances, _ = read(path) if path.exists() else ({}, {}, {})
        values = dict(compute())
        tensors = {name: value.elements for name, value in values.items()}
        about = {"torch": torch.__version__, "machine": platform.machine()}
        metadata = {
            "about": json.dumps(about),
            "tolerances": json.dumps({name: float(f"{value.tolerance:.3g}") for name, value in values.items()}),
        }
        with atomic_file(path) as temporary:
            temporary.write_bytes(save(tensors, metadata))
    rows = [_moved(name, value, old, tolerances) for name, value in values.items()]
    gone = [Moved(name, 0.0, 0.0, "removed") for name in sorted(set(old) - set(values))]
    return [row for row in rows if row.distance or row.note] + gone


def read(path: Path = FILE) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
    """The recorded elements, their tolerances, and what they were recorded with."""
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; bert-fast verify --update-golden writes it")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    return tensors, json.loads(metadata["tolerances"]), json.loads(metadata["about"])


def is_checkout() -> bool:
    """Whether the package is in a checkout, where the file can be recorded."""
    return os.path.exists(FILE.parents[1] / ".git")


def _moved(name: str, value: Value, recorded: dict[str, Tensor], tolerances: dict[str, float]) -> Moved:
    if name not in recorded:
        return Moved(name, float("inf"), value.tolerance, "not recorded")
    return Moved(name, max_error(value.elements, recorded[name]), tolerances[name])


def _exact(x: Tensor) -> Value:
    return Value(x, FLOAT64_TOLERANCE * float(x.abs().max()) if x.numel() else 0.0)


def _of_op(op: str) -> Iterator[tuple[str, Value]]:
    torch.manual_seed(SEED)
    for sample in cases.load(op).samples():
        state = torch.get_rng_state()
        for dtype in DTYPES:
            torch.set_rng_state(state)  # the same gradients of the outputs in each dtype
            for result, (triple, comparison) in sample_triples(sample, "auto", "cpu", dtype).items():
                name = f"{op}/{sample.name}/{result}"
                if dtype == torch.float32:
                    yield f"{name}/float64", _exact(triple.truth)
                yield f"{name}/{str(dtype).removeprefix('torch.')}", Value(triple.ours, comparison.bound)


def _of_head(head: str) -> Iterator[tuple[str, Value]]:
    """The outputs of a head and the gradient of the word embeddings."""
    torch.manual_seed(SEED)
    model, inputs = tiny_model(head), inputs_of(head)
    model.eval()
    with use_impl("reference"):
        truth = outputs_of(model.double(), inputs)
    for name, x in truth.items():
        yield f"{head}/{name}/float64", _exact(x)
    for dtype in DTYPES:
        for name, (x, comparison) in compare_head(model, inputs, dtype).items():
            yield f"{head}/{name}/{str(dtype).removeprefix('torch.')}", Value(x, comparison.bound)


def compare_head(
    model: Any, inputs: dict[str, Tensor], dtype: torch.dtype, impl: str | Mapping[str, str] = "auto"
) -> dict[str, tuple[Tensor, Comparison]]:
    """What `impl` computes of `outputs_of` the model in `dtype`, each with its three-way test: three times eager's."""
    model.to(dtype)
    with use_impl("reference"):
        eager = outputs_of(model, inputs)
        in_float64 = outputs_of(model.double(), inputs)  # with the weights rounded to `dtype`
    model.to(dtype)
    with use_impl(impl):
        outputs = outputs_of(model, inputs)
    rows = {name: compare(name, x, eager[name].to(x.dtype), in_float64[name], 3.0, 4.0) for name, x in outputs.items()}
    of_logits = max((row.bound for name, row in rows.items() if "logits" in name), default=0.0)
    return {
        name: (x, rows[name]._replace(bound=rows[name].bound + (2 * of_logits if name.endswith("loss") else 0.0)))
        for name, x in outputs.items()
    }


def tiny_model(head: str, layers: int = 2, dropout: float = 0.0) -> Any:
    """A model of random weights, two layers of 3 heads of 16."""
    from bert_fast import models

    config = models.BertConfig(
        vocab_size=211,
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=96,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1,
    )
    return getattr(models, head)(config)


def inputs_of(head: str) -> dict[str, Tensor]:
    """Random inputs and labels for `tiny_model(head)`: four rows of 31, 7, 1 and 18 tokens."""
    lengths, rows = (31, 7, 1, 18), 4
    shape = (rows, max(lengths))
    ids = torch.randint(5, 211, shape)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, shape)}
    if head == "BertForMultipleChoice":
        inputs = {name: x.view(2, 2, -1) for name, x in inputs.items()}
        return {**inputs, "labels": torch.tensor([1, 0])}
    labels = torch.where((torch.rand(shape) < 0.3) & (mask == 1), ids, -100)
    labels[:, 0] = ids[:, 0]
    extra = {
        "BertForPreTraining": {"labels": labels, "next_sentence_label": torch.tensor([0, 1, 1, 0])},
        "BertForMaskedLM": {"labels": labels},
        "BertForNextSentencePrediction": {"labels": torch.tensor([0, 1, 1, 0])},
        "BertForSequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
        "BertForTokenClassification": {"labels": torch.where(labels >= 0, labels % 2, -100)},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([3, 1, 0, 2]),
            "end_positions": torch.tensor([9, 4, 0, 2]),
        },
    }
    return inputs | extra.get(head, {})


def outputs_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point outputs, and the gradient of the word embeddings, of the loss or of their mean squares."""
    model.zero_grad()
    out = model(**inputs, return_dict=True)
    results = {name: x for name, x in out.items() if isinstance(x, Tensor) and x.is_floating_point()}
    loss = results.get("loss")
    if loss is None:
        loss = torch.stack([x.float().square().mean() for x in results.values()]).sum()
    loss.backward()
    word = next(x for name, x in model.named_parameters() if name.endswith("word_embeddings.weight"))
    return {name: x.detach() for name, x in results.items()} | {"dword_embeddings": word.grad.clone()}


def training_curve() -> Tensor:
    """The loss of every `CURVE_EVERY`-th of `CURVE_STEPS` steps of a tiny masked language model with dropout."""
    torch.manual_seed(SEED)
    model = tiny_model("BertForMaskedLM", layers=1, dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    inputs = inputs_of("BertForMaskedLM")
    losses = []
    for step in range(CURVE_STEPS):
        optimizer.zero_grad()
        loss = model(**inputs, return_dict=True).loss
        loss.backward()
        optimizer.step()
        if step % CURVE_EVERY == CURVE_EVERY - 1:
            losses.append(loss.detach())
    return torch.stack(losses)
