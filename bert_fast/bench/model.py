"""A model in a folder, in each precision, beside the same weights in transformers: the hidden states of packed batches.

Token ids are random; what is measured is the encoder, not the tokenizer (`benchmarks.models.encode_speed` has both).
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bert_fast
from bert_fast.bench.devices import reason
from bert_fast.bench.names import OURS
from bert_fast.bench.runner import Case, Variant
from bert_fast.kernels import use_impl
from bert_fast.kernels._common.benchmarks import Plan, evenly_spaced
from bert_fast.models import BertModel
from bert_fast.models.config import longest_input
from bert_fast.models.embedding import pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
SHAPES = ("1x32", "8x128", "2x512", "8x512-half", "16x128-random")
# Of the error of transformers in the same precision; the floor is in units of the last place. INT8 has no such peer:
# its factor is on the rounding of bf16.
FACTOR, FLOOR_ULPS, INT8_FACTOR = 3.0, 16.0, 30.0
Encode = Callable[[list[list[int]]], Tensor]


def shape_of(text: str) -> tuple[int, int, str]:
    """Sequences, their length, and "", "half" or "random": of "8x128", "8x512-half" and "16x128-random".

    Raises:
        ValueError: the text is none of these.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:-(half|random))?", text)
    if match is None:
        raise ValueError(
            f"--shapes has {text!r}; expected sequences x tokens, such as 8x128, 8x512-half or 16x128-random"
        )
    return int(match[1]), int(match[2]), match[3] or ""


class Models:
    """The model of a folder in each precision, and transformers' where it is installed.

    Args:
        folder: a folder or a name on the hub.
        precisions: some of fp32, bf16, int8.
        device: of the models; int8 is for a CPU.

    Raises:
        ValueError: the folder has no model that bert_fast loads.
    """

    def __init__(self, folder: str, precisions: Sequence[str], device: torch.device) -> None:
        self.device = device
        fp32 = BertModel.from_pretrained(folder).eval().float().to(device)
        self.config = fp32.config
        makers: dict[str, Callable[[], nn.Module]] = {
            "fp32": lambda: fp32,
            "bf16": lambda: copy.deepcopy(fp32).to(torch.bfloat16),
            "int8": lambda: bert_fast.quantize(copy.deepcopy(fp32)),
        }
        self.ours = {precision: makers[precision]() for precision in precisions}
        self.bytes = sum(weight.nbytes for weight in fp32.parameters())
        self._double = copy.deepcopy(fp32).double()
        self.theirs, self.absent = self._transformers(folder, precisions)
        sample = draw_batch([32, 9], self.config.vocab_size)
        exact = self.exact(sample)
        scale = float(exact.abs().max())

        def error(name: str) -> float:
            encode = self.encoders().get(f"transformers, {name}")
            return 0.0 if encode is None else float((encode(sample).double() - exact).abs().max()) / scale

        self.bounds = {
            "fp32": FACTOR * error("fp32") + FLOOR_ULPS * torch.finfo(torch.float32).eps,
            "bf16": FACTOR * error("bf16") + FLOOR_ULPS * torch.finfo(torch.bfloat16).eps,
            "int8": INT8_FACTOR * torch.finfo(torch.bfloat16).eps * self.config.num_hidden_layers**0.5,
        }

    def _transformers(self, folder: str, precisions: Sequence[str]) -> tuple[dict[str, nn.Module], str]:
        """transformers' model by precision, and the reason why there is none."""
        try:
            import transformers

            transformers.logging.set_verbosity_error()
            fp32 = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        except (ImportError, OSError, ValueError) as problem:
            return {}, reason(problem)
        fp32 = fp32.eval().to(self.device)
        makers = {"fp32": lambda: fp32, "bf16": lambda: copy.deepcopy(fp32).to(torch.bfloat16)}
        return {name: makers[name]() for name in precisions if name in makers}, ""

    def exact(self, sequences: list[list[int]]) -> Tensor:
        """The eager PyTorch reference in float64: (T, E)."""
        with use_impl("reference"):
            return encode_packed(self._double, self.device, sequences)

    def encoders(self) -> dict[str, Encode]:
        """By the name of the variant."""
        encoders: dict[str, Encode] = {
            f"transformers, {name}": partial(encode_padded, model, self.device) for name, model in self.theirs.items()
        }
        ours = getattr(self, "ours", {})
        encoders |= {f"{OURS}, {name}": partial(encode_packed, model, self.device) for name, model in ours.items()}
        return encoders


def encode_packed(model: nn.Module, device: torch.device, sequences: list[list[int]]) -> Tensor:
    """Ours: the hidden states (T, E)."""
    with torch.inference_mode():
        hidden: Tensor = model(**pack(sequences, device)).last_hidden_state
    return hidden


def encode_padded(model: nn.Module, device: torch.device, sequences: list[list[int]]) -> Tensor:
    """transformers: the hidden states of the real tokens (T, E)."""
    mask = torch.arange(max(map(len, sequences))) < torch.tensor(list(map(len, sequences)))[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.tensor([token for sequence in sequences for token in sequence])
    mask = mask.to(device)
    with torch.inference_mode():
        hidden: Tensor = model(input_ids=ids.to(device), attention_mask=mask.long()).last_hidden_state
    return hidden[mask]


def draw_batch(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Random token ids, without the first few, which are special."""
    return [torch.randint(min(5, vocabulary - 1), vocabulary, (length,)).tolist() for length in lengths]


def flops(config: Any, lengths: Sequence[int]) -> int:
    """FLOPs of the encoder's matrix products in the forward pass of sequences of these lengths."""
    E, F = config.hidden_size, config.intermediate_size
    scores = sum(2 * length * length * E for length in lengths)
    return int(config.num_hidden_layers * 2 * ((4 * E * E + 2 * E * F) * sum(lengths) + scores))


def case_of(models: Models, lengths: Sequence[int]) -> Case:
    """One batch of sequences of these lengths: transformers, then ours, in each precision."""
    sequences = draw_batch(lengths, models.config.vocab_size)
    variants = {}
    for name, encode in models.encoders().items():
        precision = name.rsplit(", ", 1)[1]
        variants[name] = Variant(
            partial(encode, sequences), lambda hidden: hidden.float(), True, precision, models.bounds[precision]
        )
    return Case(
        variants,
        lambda: models.exact(sequences),
        0.0,  # every variant has its own
        flops=flops(models.config, lengths),
        graph=False,
        tokens=sum(lengths),
        resident=models.bytes,
        length=max(lengths),
    )


def lengths_of(shape: str) -> list[int]:
    """The lengths of the sequences: all the same, evenly spaced from 4 ("half"), or random."""
    batch, seqlen, filling = shape_of(shape)
    if filling == "half":
        return evenly_spaced(batch, min(4, seqlen), seqlen)
    draw = random.Random(0)
    return [draw.randint(1, seqlen) if filling else seqlen for _ in range(batch)]


def plans(models: Models, shapes: Sequence[str]) -> list[Plan]:
    """A case for each shape; each timed call has other tokens.

    Raises:
        ValueError: a shape is longer than the model's positions.
    """
    longest = longest_input(models.config)
    for shape in shapes:
        if shape_of(shape)[1] > longest:
            raise ValueError(f"--shapes has {shape}; the model takes up to {longest} tokens")
    return [Plan(f"{shape} infer", partial(_case, models, lengths_of(shape))) for shape in shapes]


def _case(models: Models, lengths: Sequence[int]) -> Case:
    return replace(case_of(models, lengths), again=lambda: case_of(models, lengths))


def about(models: Models, folder: str) -> Mapping[str, Any]:
    """What the report says of the model."""
    config = models.config
    return {
        "model": folder,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        **({"transformers": f"not timed: {models.absent}"} if models.absent else {}),
    }
