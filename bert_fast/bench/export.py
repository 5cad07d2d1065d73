"""An op in the formats of other benchmarks: a FlashInfer-Trace definition, a Benchmark of Hugging Face's `kernels`.

FlashInfer-Trace (https://bench.flashinfer.ai) describes a kernel by its axes, tensors and a reference in Python; a
Benchmark class is what `kernels benchmark` runs for a kernel on the Hub. Both take our reference as what is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMATS = ("flashinfer-trace", "hf-kernels")
# BERT-base; what is not here varies: tokens T, sequences + 1 B1.
SIZES = {"E": 768, "F": 3072, "N": 12, "D": 64, "QKV": 3, "V": 30522, "P": 512, "K": 2}
VARIABLE = {"T": "tokens of the packed batch", "B1": "sequences of the batch, plus one"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of an op: the axes and the dtype; activations are in the dtype that is asked for."""

    axes: tuple[str, ...]
    dtype: str = "activation"


@dataclass(frozen=True)
class Exported:
    """An op: its tensors in the order of its arguments, the output, and further arguments as Python text."""

    inputs: Mapping[str, Tensor]
    output: Tensor
    rest: str = ""
    suffix: str = ""  # of the call, where it returns more than the output


def _vector(axis: str) -> Tensor:
    return Tensor((axis,), "float32")


_IDS = Tensor(("T",), "int64")
OPS = {
    "attention": Exported(
        {
            "qkv": Tensor(("T", "QKV", "N", "D")),
            "cu_seqlens": Tensor(("B1",), "int32"),
            "bias": Tensor(("QKV", "N", "D"), "float32"),
        },
        Tensor(("T", "N", "D")),
        "max_seqlen=int(cu_seqlens.diff().max())",
    ),
    "add_layer_norm": Exported(
        {"x": Tensor(("T", "E")), "residual": Tensor(("T", "E")), "weight": _vector("E"), "bias": _vector("E")}
        | {"x_bias": _vector("E")},
        Tensor(("T", "E")),
    ),
    "bias_gelu": Exported({"x": Tensor(("T", "F")), "bias": _vector("F")}, Tensor(("T", "F"))),
    "linear": Exported(
        {"x": Tensor(("T", "E")), "weight": Tensor(("F", "E")), "bias": _vector("F")},
        Tensor(("T", "F")),
        "activation='gelu'",
    ),
    "embedding_layer_norm": Exported(
        {"input_ids": _IDS, "token_type_ids": _IDS, "position_ids": _IDS}
        | {"word": Tensor(("V", "E")), "token_type": Tensor(("K", "E")), "position": Tensor(("P", "E"))}
        | {"weight": _vector("E"), "bias": _vector("E")},
        Tensor(("T", "E")),
    ),
    "masked_lm_loss": Exported(
        {"hidden": Tensor(("T", "E")), "labels": _IDS, "dense_weight": Tensor(("E", "E")), "dense_bias": _vector("E")}
        | {"norm_weight": _vector("E"), "norm_bias": _vector("E")}
        | {"decoder_weight": Tensor(("V", "E")), "decoder_bias": _vector("V")},
        Tensor((), "float32"),
        suffix=".loss",
    ),
}
# How the benchmark draws a tensor of indices.
_DRAWN = {
    "cu_seqlens": "torch.arange(0, T + 1, 128, dtype=torch.int32, device=self.device)",
    "input_ids": f"torch.randint({SIZES['V']}, (T,), device=self.device)",
    "labels": f"torch.randint({SIZES['V']}, (T,), device=self.device)",
    "token_type_ids": f"torch.randint({SIZES['K']}, (T,), device=self.device)",
    "position_ids": f"torch.arange(T, device=self.device) % {SIZES['P']}",
}


def exported(op: str, form: str, dtype: str) -> str:
    """The text of a file: JSON of FlashInfer-Trace, or Python with a Benchmark.

    Args:
        op: a key of `OPS`.
        form: one of `FORMATS`.
        dtype: of the activations, e.g. "bfloat16".

    Raises:
        ValueError: an argument is none of these.
    """
    if op not in OPS:
        raise ValueError(f"the op is {op!r}; expected one of {', '.join(OPS)}")
    if form not in FORMATS:
        raise ValueError(f"the format is {form!r}; expected one of {', '.join(FORMATS)}")
    if form == "hf-kernels":
        return hf_benchmark(op, dtype)
    return json.dumps(flashinfer_definition(op, dtype), indent=2) + "\n"


def _call(op: str, function: str, prefix: str = "") -> str:
    described = OPS[op]
    arguments = [f"{name}={prefix}{name}" for name in described.inputs]
    rest = described.rest.replace("cu_seqlens.", f"{prefix}cu_seqlens.")
    return f"{function}({', '.join([*arguments, *([rest] if rest else [])])}){described.suffix}"


def flashinfer_definition(op: str, dtype: str) -> dict[str, Any]:
    """The definition as JSON values: axes, inputs, outputs and the reference."""
    described = OPS[op]
    tensors = {**described.inputs, "out": described.output}
    axes = dict.fromkeys(axis for tensor in tensors.values() for axis in tensor.axes)

    def spec(tensor: Tensor) -> dict[str, Any]:
        shape = list(tensor.axes) if tensor.axes else None
        return {"shape": shape, "dtype": dtype if tensor.dtype == "activation" else tensor.dtype}

    names = ", ".join(described.inputs)
    return {
        "name": f"bert_fast_{op}_{dtype}",
        "op_type": op,
        "description": f"{op} of bert_fast, with the sizes of BERT-base",
        "axes": {
            axis: {"type": "const", "value": SIZES[axis]}
            if axis in SIZES
            else {"type": "var", "description": VARIABLE[axis]}
            for axis in axes
        },
        "inputs": {name: spec(tensor) for name, tensor in described.inputs.items()},
        "outputs": {"out": spec(described.output)},
        "reference": (
            f"from functools import partial\n\nfrom bert_fast.kernels import {op} as public\n\n"
            f"{op} = partial(public, impl='reference')\n\n\ndef run({names}):\n    return {_call(op, op)}\n"
        ),
    }


def hf_benchmark(op: str, dtype: str) -> str:
    """A Python file whose Benchmark calls `kernel.<op>` of the kernel on the Hub and compares it with our reference."""
    described = OPS[op]
    lines = [
        f'"""{op} with the sizes of BERT-base: `kernels benchmark` calls `kernel.{op}`, and compares its result',
        'with the reference of bert_fast."""',
        "",
        "import torch",
        "from kernels.benchmark import Benchmark",
        "",
        f"from bert_fast.kernels import {op}",
        "",
        "T = 8192  # tokens",
        "",
        "",
        f"class {''.join(word.capitalize() for word in op.split('_'))}Benchmark(Benchmark):",
        "    seed = 0",
        "",
        "    def setup(self):",
    ]
    for name, tensor in described.inputs.items():
        drawn = _DRAWN.get(name)
        if drawn is None:
            shape = ", ".join(str(SIZES.get(axis, axis)) for axis in tensor.axes)
            kind = dtype if tensor.dtype == "activation" else tensor.dtype
            drawn = f"torch.randn({shape}, device=self.device).to(torch.{kind})"
        lines.append(f"        self.{name} = {drawn}")
    ours = _call(op, op, "self.")
    ours = f"{ours[: len(ours) - len(described.suffix) - 1]}, impl='reference'){described.suffix}"
    lines += [
        "",
        f"    def benchmark_{op}(self):",
        f"        self.out = {_call(op, f'self.kernel.{op}', 'self.')}",
        "",
        f"    def verify_{op}(self):",
        f"        return {ours}",
        "",
    ]
    return "\n".join(lines)
