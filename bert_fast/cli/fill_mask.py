"""What could stand where a text says [MASK]."""

from __future__ import annotations

import json
from typing import Any

from bert_fast.cli.models import load, read_texts


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder of a checkpoint")
    parser.add_argument("texts", nargs="*", type=str, help="texts with [MASK]; without any, lines are read from stdin")
    parser.add_argument("--file", type=str | None, default=None, help="one text a line; - is stdin")
    parser.add_argument("--top_k", type=int, default=5, help="candidates for each [MASK]")
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    parser.add_argument("--device", type=str, default="auto", help="auto takes CUDA where there is one")


def run(args: Any) -> int:
    texts = read_texts(args.texts, args.file)

    from bert_fast.tasks.fill_mask import fill_mask

    model, tokenizer = load("BertForMaskedLM", args.model, args.device)
    for text in texts:
        found = fill_mask(model, tokenizer, text, top_k=args.top_k)
        if args.json:
            print(json.dumps({"text": text, "masks": [[c._asdict() for c in choices] for choices in found]}))
            continue
        print(text)
        for number, choices in enumerate(found, start=1):
            listed = "  ".join(f"{choice.token} {choice.probability:.1%}" for choice in choices)
            print(f"  {number}: {listed}" if len(found) > 1 else f"  {listed}")
    return 0
