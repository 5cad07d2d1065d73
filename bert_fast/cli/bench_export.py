"""Write an op for other benchmarks: a FlashInfer-Trace definition (JSON), or a Benchmark of Hugging Face's kernels.

    bert-fast bench export attention --format flashinfer-trace --output attention.json
    bert-fast bench export add_layer_norm --format hf-kernels --output benchmarks/benchmark_add_layer_norm.py

The sizes are those of BERT-base; what is right is bert_fast's reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from bert_fast.cli.standard import as_option


def positional(arguments: list[str]) -> list[str]:
    """Rewrite `bench export OP --option` as `bench export --op OP --option`."""
    return as_option(arguments, "--op")


def add_arguments(parser: Any) -> None:
    parser.add_argument("--op", type=str | None, default=None, help="the op (or OP)")
    parser.add_argument(
        "--format", type=Literal["flashinfer-trace", "hf-kernels"], default="flashinfer-trace", help="of the file"
    )
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="bfloat16", help="of the activations"
    )
    parser.add_argument("--output", type=str | None, default=None, help="the file; printed by default")


def run(args: Any) -> int:
    from bert_fast._io import write_text
    from bert_fast.bench.export import exported

    text = exported(args.op or "", args.format, args.dtype)
    if args.output is None:
        print(text, end="")
        return 0
    write_text(Path(args.output), text)
    print(f"written: {args.output}")
    return 0
