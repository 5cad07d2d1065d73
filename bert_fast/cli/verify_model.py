"""`bert-fast verify --model` and `--endpoint`: the invariants of an encoder as a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bert_fast._terminal import printable

if TYPE_CHECKING:
    from bert_fast.invariants import Row


def verify_model(args: Any) -> int:
    """Check what the arguments name and print a line an invariant; 1 where one does not hold."""
    if args.model is not None and args.endpoint is not None:
        raise ValueError(
            "--model and --endpoint were both given; expected one of them (the server's weights: --against)"
        )
    for name in ("ops", "impls", "kernels"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} was given with --model or --endpoint; it is for kernels")
    if args.record:
        raise ValueError("--record was given with --model or --endpoint; it is for kernels")
    if args.tolerance is not None and not args.tolerance > 0:
        raise ValueError(f"--tolerance is {args.tolerance}; expected a number above 0")
    rows = 0
    failed = 0
    for name, row in _rows(args):
        if not rows:
            print("distance: |x - expected| / |expected| of the worst text, against the weights in float64")
            print("bound: three times that of eager PyTorch in the same dtype, plus four ulp\n")
        rows += 1
        failed += not row.ok
        print(line(name, row), flush=True)
    print(f"\n{rows - failed} of {rows} invariants hold")
    if failed:
        print(f"bert-fast verify: {failed} invariants do not hold", file=sys.stderr)
    return 1 if failed else 0


def line(name: str, row: Row) -> str:
    """An invariant as a line; under it the worst text and the fault, where it does not hold."""
    state = "ok" if row.ok and row.texts else "FAILED" if not row.ok else "-"
    numbers = f"{row.distance:9.2e} {row.bound:9.2e}" if row.texts else f"{'':>19}"
    text = f"{name:<32} {row.invariant:<30} {numbers}  {state}"
    if row.note:
        text += f"  ({printable(row.note)})"
    if row.finding is not None:
        shown = row.finding.text if len(row.finding.text) <= 60 else f"{row.finding.text[:57]}..."
        text += f"\n    worst text: {printable(repr(shown))}"
        if row.finding.mistake:
            text += f"\n    looks like: {row.finding.mistake}"
    return text


def _rows(args: Any) -> Iterator[tuple[str, Row]]:
    import torch

    from bert_fast.cli.models import model_folder
    from bert_fast.invariants import Endpoint, Reference, check_encoder, check_hidden, load_subject
    from bert_fast.invariants.models import default_library

    options = {"pooling": args.pooling, "normalize": args.normalize, "max_seqlen": args.max_seqlen}
    dtypes = [getattr(torch, name) for name in args.dtypes or ["float32"]]
    if args.endpoint is not None:
        if args.against in (None, "transformers"):
            raise ValueError("--endpoint needs --against, the folder of the weights that the server has")
        if len(dtypes) > 1:
            raise ValueError(f"--dtypes has {', '.join(args.dtypes)}; expected the one dtype of the server")
        endpoint = Endpoint(args.endpoint, dialect=args.dialect, model=args.served_model)
        reference = Reference(model_folder(args.against, "a model"), **options)
        for row in check_encoder(endpoint, reference, dtype=dtypes[0], tolerance=args.tolerance, unit=True):
            yield endpoint.dialect, row
        return
    folder = model_folder(args.model, "a model")
    of_transformers = args.against == "transformers"
    right = folder if args.against is None or of_transformers else model_folder(args.against, "a model")
    reference = Reference(right, library="transformers" if of_transformers else None, **options)
    own = reference if right == folder else Reference(folder, **options)
    library = default_library(folder) if args.library == "auto" else args.library
    for dtype in dtypes:
        subject = load_subject(folder, library, own, dtype, args.device)
        for row in check_encoder(subject, reference, dtype=dtype, tolerance=args.tolerance):
            yield subject.name, row
        if subject.layouts:
            hidden = check_hidden(
                subject.hidden, reference, dtype=dtype, tolerance=args.tolerance, layouts=subject.layouts
            )
            for row in hidden:
                yield subject.name, row
