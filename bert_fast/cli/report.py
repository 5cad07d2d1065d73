"""Write the HTML report of one or more pretraining runs, or of a fine-tuning run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "folders", nargs="+", type=str, help="folders of pretraining runs to compare, or of one fine-tuning run"
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="HTML file of pretraining runs; default: report.html in the first folder",
    )
    parser.add_argument(
        "--png", type=str | None, default=None, help="folder for the curves of pretraining runs as PNG files"
    )


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
        raise ValueError(
            f"--output and --png are set; expected only with pretraining runs, and {folders[0]} is not one"
        )
    print(write_report(folders[0]))
    return 0
