"""Predict the most likely tokens for each [MASK]."""

from __future__ import annotations

from typing import Any

from bert_fast._terminal import data_stream
from bert_fast.cli.models import load, read_texts
from bert_fast.cli.output import to_json


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder of a checkpoint, or a hub name")
    parser.add_argument("texts", nargs="*", type=str, help="texts with [MASK]; read from stdin, one per line, if none")
    parser.add_argument("--file", type=str | None, default=None, help="a file of texts, one per line; - is stdin")
    parser.add_argument("--top_k", type=int, default=5, help="candidates per [MASK]")
    parser.add_argument("--json", type=bool, default=False, help="print one JSON object per text")
    parser.add_argument("--device", type=str, default="auto", help="auto selects CUDA if it is available")


def run(args: Any) -> int:
    texts = read_texts(args.texts, args.file)

    from bert_fast.tasks.fill_mask import fill_mask

    model, tokenizer = load("BertForMaskedLM", args.model, args.device)
    for text in texts:
        masks = fill_mask(model, tokenizer, text, top_k=args.top_k)
        if args.json:
            found = [[candidate._asdict() for candidate in candidates] for candidates in masks]
            data_stream().write(to_json({"text": text, "masks": found}) + "\n")
            continue
        print(text)
        for number, candidates in enumerate(masks, start=1):
            listed = "  ".join(f"{token} {probability:.1%}" for token, probability in candidates)
            print(f"  {number}: {listed}" if len(masks) > 1 else f"  {listed}")
    return 0
