"""Curves of pretraining runs, one or several beside each other, or the page of a fine-tuning run, as HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("folders", nargs="+", type=str, help="of pretraining runs, or of one fine-tuning run")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="of pretraining runs; report.html in the first folder",
    )
    parser.add_argument("--png", type=str | None, default=None, help="a folder for the curves as pictures")


def run(args: Any) -> int:
    from bert_fast.finetune.report import write_report
    from bert_fast.pretrain.report import is_pretraining, write_pretrain_report

    folders = [Path(folder) for folder in args.folders]
    if len(folders) > 1 or is_pretraining(folders[0]):
        output = Path(args.output) if args.output else folders[0] / "report.html"
        for path in write_pretrain_report(folders, output, Path(args.png) if args.png else None):
            print(path)
        return 0
    if args.output or args.png:
        raise ValueError(f"--output and --png are for pretraining runs; {folders[0]} is none")
    print(write_report(folders[0]))
    return 0
