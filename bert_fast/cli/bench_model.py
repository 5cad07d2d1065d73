"""Time a model in a folder, in each precision, beside the same weights in transformers.

    bert-fast bench model sentence-transformers/all-MiniLM-L6-v2 --shapes 1x32,8x128
    bert-fast bench model FOLDER --precisions bf16 --output model.json --html model.html

The hidden states of packed batches of random tokens, compared with float64 before and after the timing. A shape is
sequences x tokens; 8x512-half has lengths from 4 to 512, 16x128-random random ones.
"""

from __future__ import annotations

from typing import Any, Literal

from bert_fast.cli.bench_kernels import add_common_arguments
from bert_fast.cli.standard import as_option


def positional(arguments: list[str]) -> list[str]:
    """Rewrite `bench model FOLDER --option` as `bench model --model FOLDER --option`."""
    return as_option(arguments, "--model")


def add_arguments(parser: Any) -> None:
    parser.add_argument("--model", type=str | None, default=None, help="folder of a model, or a hub name (or MODEL)")
    parser.add_argument("--shapes", type=list[str] | None, default=None, help="sequences x tokens; five by default")
    parser.add_argument(
        "--precisions",
        type=list[Literal["fp32", "bf16", "int8"]] | None,
        default=None,
        help="all that the device has by default",
    )
    add_common_arguments(parser)


def run(args: Any) -> int:
    from bert_fast.bench import model, session

    if args.model is None:
        raise ValueError("bench model got no model; expected a folder or a hub name")
    shapes = args.shapes or list(model.SHAPES[:3] if args.quick else model.SHAPES)
    for shape in shapes:
        model.shape_of(shape)
    machine = session.start(args.device)
    precisions = args.precisions or (["fp32", "bf16", "int8"] if machine.device.type == "cpu" else ["fp32", "bf16"])
    if "int8" in precisions and machine.device.type != "cpu":
        raise ValueError("--precisions has int8 on a CUDA device; INT8 is for a CPU: --device cpu")
    models = model.Models(args.model, precisions, machine.device)
    if models.absent:
        print(f"transformers is not timed: {models.absent}")
    plans = model.plans(models, shapes)
    return session.run({"model": session.Suite("model", plans, about=model.about(models, args.model))}, machine, args)
