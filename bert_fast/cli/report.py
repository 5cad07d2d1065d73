"""Write the HTML report of a fine-tuning run, a pretraining run or a sweep, or one that compares several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert_fast.cli.output import check_output


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "folders", nargs="+", type=str, help="folders of runs, all of pretraining or all of fine-tuning"
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="HTML file; default: in the first folder report.html, or comparison.html of several fine-tuning runs",
    )
    parser.add_argument(
        "--png",
        type=str | None,
        default=None,
        help="folder for the curves of compared or pretraining runs as PNG files",
    )


def run(args: Any) -> int:
    check_output(args.output, ())
    from bert_fast.finetune.comparison import COMPARISON, write_comparison
    from bert_fast.finetune.report import is_finetuning, write_report
    from bert_fast.finetune.sweep_page import RESULT, write_sweep_page
    from bert_fast.pretrain.report import is_pretraining, write_pretrain_report

    folders = [Path(folder) for folder in args.folders]
    output, pictures = (Path(path) if path else None for path in (args.output, args.png))
    pretraining = [folder for folder in folders if is_pretraining(folder)]
    finetuning = [folder for folder in folders if is_finetuning(folder)]
    if pretraining and finetuning:
        raise ValueError(
            f"{pretraining[0]} is a pretraining run and {finetuning[0]} a fine-tuning run; expected one kind of runs"
        )
    if pretraining:
        written = write_pretrain_report(folders, output or folders[0] / "report.html", pictures)
    elif len(folders) == 1 and (folders[0] / RESULT).is_file() and not output and not pictures:
        written = [write_sweep_page(folders[0])]
    elif len(folders) > 1:
        written = write_comparison(folders, output or folders[0] / COMPARISON, pictures)
    elif pictures is not None:
        raise ValueError(f"--png is set; expected only with several runs or pretraining, and {folders[0]} is neither")
    else:
        written = [write_report(folders[0], output)]
    for path in written:
        print(path)
    return 0
