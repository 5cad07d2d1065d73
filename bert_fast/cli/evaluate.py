"""Evaluate a fine-tuned model on labelled rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bert_fast.cli import rows


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder written by bert-fast finetune")
    parser.add_argument("data", type=str, help="labelled rows: csv, tsv, jsonl, json, parquet, conll, or datasets:NAME")
    parser.add_argument("--metrics", type=str | None, default=None, help="JSON file for all metrics")
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"output file for the predictions, {', '.join(rows.FORMATS)}"
    )
    rows.add_row_arguments(parser)


def run(args: Any) -> int:
    rows.check_output(args.output)
    loaded = rows.load_task(args.model, args.device, args.options)
    task = loaded[2]
    table = rows.read_rows(args, task, args.data)

    from bert_fast.tasks.io.columns import choose_columns

    columns = choose_columns(table, task.roles, args.columns)
    table = rows.handle_empty(args, task, table, columns)
    if not len(table):
        raise ValueError(f"{args.data}: every row was dropped, since none has text")
    for message in task.check(table, columns):
        print(message, file=sys.stderr)
    predictions = rows.predict_rows(args, loaded, table, columns)
    if warning := task.warning(predictions, table, columns):
        print(warning, file=sys.stderr)
    metrics = task.evaluate(predictions, table, columns)
    rows.print_metrics(metrics)
    if args.metrics is not None:
        text = json.dumps(metrics, indent=1, ensure_ascii=False)
        Path(args.metrics).write_text(text + "\n", encoding="utf-8")
    if args.output is not None:
        rows.write_predictions(task, table, columns, predictions, args.output)
    return 0
