"""Which words an answer comes from, as one HTML page: attention rollout and integrated gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bert_fast.cli import rows
from bert_fast.cli.models import read_texts


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder that bert-fast finetune wrote")
    parser.add_argument("texts", nargs="*", type=str, help="texts; without any and without --file, stdin is read")
    parser.add_argument("--file", type=str | None, default=None, help="one text a line; - is stdin")
    parser.add_argument(
        "--pair", type=str | None, default=None, help="the second text of a pair, or a question's context"
    )
    parser.add_argument("--label", type=str | None, default=None, help="explain this label, not the one predicted")
    parser.add_argument("--steps", type=int, default=50, help="steps of the integral")
    parser.add_argument("--output", type=str, default="explain.html", help="the page")
    parser.add_argument("--device", type=str, default="auto", help="auto takes CUDA where there is one")


def run(args: Any) -> int:
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; expected at least 1")
    texts = read_texts(args.texts, args.file)

    import captum.attr  # noqa: F401  (what is missing is said before the model is read)

    from bert_fast.tasks.explain import explain, page
    from bert_fast.tasks.prediction import text_settings

    model, tokenizer, task = rows.load_task(args.model, args.device)
    settings = text_settings(model)
    found = []
    for text in texts:
        pair = [text] if args.pair is None else [text, args.pair]
        found.append(explain(model, task, tokenizer, pair, settings, label=args.label, steps=args.steps))
    Path(args.output).write_text(page(found, f"{task.name}: {Path(args.model).name}"), encoding="utf-8")
    print(f"{len(found)} texts explained", file=sys.stderr)
    print(args.output)
    return 0
