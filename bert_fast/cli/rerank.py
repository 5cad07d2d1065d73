"""Order texts by the score that a cross-encoder gives them for a query."""

from __future__ import annotations

from typing import Any

from bert_fast._terminal import data_stream
from bert_fast.cli.models import load, read_texts, shows_progress
from bert_fast.cli.output import to_json


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder of a sequence classifier with one label, or a hub name")
    parser.add_argument("query", type=str, help="what is searched for")
    parser.add_argument("texts", nargs="*", type=str, help="texts; read from stdin, one per line, if none")
    parser.add_argument("--file", type=str | None, default=None, help="a file of texts, one per line; - is stdin")
    parser.add_argument("--top_k", type=int | None, default=None, help="print this number of texts; default: all")
    parser.add_argument("--prompt_name", type=str | None, default=None, help="the name of a prompt of the folder")
    parser.add_argument(
        "--activation", type=str | None, default=None, help="of the score, such as torch.nn.Identity; default: its own"
    )
    parser.add_argument(
        "--max_seqlen", type=int | None, default=None, help="truncate longer pairs; default: the folder's maximum"
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=8192, help="maximum tokens of a batch of pairs of similar length"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto selects CUDA if it is available")


def run(args: Any) -> int:
    texts = read_texts(args.texts, args.file)
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"top_k is {args.top_k}; expected 1 or more")

    model, tokenizer = load("BertForSequenceClassification", args.model, args.device)
    scores = model.rerank(
        args.query,
        texts,
        tokenizer=tokenizer,
        prompt_name=args.prompt_name,
        activation=args.activation,
        max_seqlen=args.max_seqlen,
        batch_tokens=args.batch_tokens,
        show_progress_bar=shows_progress(),
    ).tolist()
    ranked = sorted(range(len(texts)), key=lambda index: (-scores[index], index))
    for index in ranked[: args.top_k]:
        data_stream().write(to_json({"index": index, "score": scores[index], "text": texts[index]}) + "\n")
    return 0
