"""Make report.html of a fine-tuning run again, from the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("folder", type=str, help="folder that bert-fast finetune wrote")


def run(args: Any) -> int:
    from bert_fast.training.finetune_report import write_report

    print(write_report(Path(args.folder)))
    return 0
