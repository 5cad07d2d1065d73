"""Attribute predictions to words, as an HTML page: attention rollout and integrated gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bert_fast._io import write_text
from bert_fast.cli import rows
from bert_fast.cli.models import read_texts
from bert_fast.cli.output import check_output


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder written by bert-fast finetune, or a hub name")
    parser.add_argument("texts", nargs="*", type=str, help="texts; read from --file, or stdin, if none")
    parser.add_argument("--file", type=str | None, default=None, help="a file of texts, one per line; - is stdin")
    parser.add_argument("--pair", type=str | None, default=None, help="second text of a pair, or context of a question")
    parser.add_argument("--label", type=str | None, default=None, help="explain this label; default: the predicted one")
    parser.add_argument("--steps", type=int, default=50, help="steps of integrated gradients")
    parser.add_argument("--output", type=str, default="explain.html", help="HTML file to write")
    parser.add_argument("--device", type=str, default="auto", help="auto selects CUDA if it is available")


def run(args: Any) -> int:
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; expected at least 1")
    check_output(args.output, (), inputs=[args.file])
    texts = read_texts(args.texts, args.file)

    import captum.attr  # noqa: F401  (fail before loading the model if it is missing)

    from bert_fast.tasks.explain import explain, page
    from bert_fast.tasks.prediction import text_settings

    model, tokenizer, task = rows.load_task(args.model, args.device)
    settings = text_settings(model)
    explanations = []
    for text in texts:
        pair = [text] if args.pair is None else [text, args.pair]
        explanations.append(explain(model, task, tokenizer, pair, settings, label=args.label, steps=args.steps))
    write_text(Path(args.output), page(explanations, f"{task.name}: {Path(args.model).name}"))
    print(f"{len(explanations)} texts explained", file=sys.stderr)
    print(args.output)
    return 0
