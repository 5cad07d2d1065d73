"""Measure the kernels on this device at the sizes that a model meets; `impl="auto"` then takes the fastest.

    bert-fast tune FOLDER --shapes 1x32,8x128
    bert-fast tune base --kernels my_kernel.py --training
    bert-fast tune --reset

The times go into a table in the user's cache, for this device, this build and these sources. Registered kernels, of
--kernels and of installed packages, are measured if they pass the oracle. `bert-fast info` shows the table.
"""

from __future__ import annotations

from typing import Any, Literal

from bert_fast.cli.standard import as_option


def positional(arguments: list[str]) -> list[str]:
    """Rewrite `tune MODEL --option` as `tune --model MODEL --option`."""
    return as_option(arguments, "--model")


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--model", type=str | None, default=None, help="folder, hub name, or size such as base (or MODEL)"
    )
    parser.add_argument("--shapes", type=list[str] | None, default=None, help="sequences x tokens; three by default")
    parser.add_argument(
        "--precisions",
        type=list[Literal["fp32", "bf16"]] | None,
        default=None,
        help="that the model computes in; on a GPU bf16, on a CPU both",
    )
    parser.add_argument("--training", type=bool, default=False, help="time the backward pass too, with dropout")
    parser.add_argument("--ops", type=list[str] | None, default=None, help="ops to measure; all by default")
    parser.add_argument("--kernels", type=str | None, default=None, help="a Python file that registers kernels")
    parser.add_argument("--device", type=Literal["cpu", "cuda"] | None, default=None, help="cuda if there is a device")
    parser.add_argument("--seconds", type=float | None, default=None, help="time for each case; 1 s, on a GPU 0.3")
    parser.add_argument("--reset", type=bool, default=False, help="delete the table of the device")


def run(args: Any) -> int:
    from bert_fast.bench import session, tune
    from bert_fast.bench.model import DTYPES, shape_of
    from bert_fast.kernels._common import third_party

    machine = session.start(args.device)
    kind = machine.device.type
    if args.reset:
        if args.model is not None:
            raise ValueError("--reset takes no model: it deletes the table of the device")
        path = tune.reset(kind)
        print("there is no table for this device" if path is None else f"deleted: {path}")
        return 0
    if args.model is None:
        raise ValueError("tune got no model; expected a folder, a hub name or a size such as base")
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds}; expected more than 0")
    unknown = sorted(set(args.ops or ()) - set(tune.tunable()))
    if unknown:
        raise ValueError(f"--ops has {', '.join(unknown)}; expected some of {', '.join(tune.tunable())}")
    if args.kernels:
        third_party.load_file(args.kernels)
    shapes = args.shapes or tune.SHAPES
    for shape in shapes:
        shape_of(shape)
    precisions = args.precisions or (["bf16"] if kind == "cuda" else ["fp32", "bf16"])
    seconds = args.seconds or (0.3 if kind == "cuda" else 1.0)
    request = tune.Request(
        tune.config_of(args.model), shapes, [DTYPES[name] for name in precisions], args.training, seconds, args.ops
    )
    path = tune.tune(request, machine)
    if path is None:
        print("nothing to choose: on this device every op has one verified implementation; register kernels with "
              "--kernels FILE")  # fmt: skip
    else:
        print(f"written: {path}")
    return 0
