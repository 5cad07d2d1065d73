"""Evaluate a fine-tuned model on labelled rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bert_fast._io import write_json
from bert_fast.cli import output, rows


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder written by bert-fast finetune, or a hub name")
    parser.add_argument("data", type=str, help="labelled rows: csv, tsv, jsonl, json, parquet, conll, or datasets:NAME")
    parser.add_argument("--metrics", type=str | None, default=None, help="JSON file for all metrics")
    output.add_output_arguments(parser)
    rows.add_row_arguments(parser)


def run(args: Any) -> int:
    output.check_output(args.output, inputs=[args.data])
    output.check_output(args.metrics, (), "--metrics", [args.data])
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
    # The files first: whoever reads what is printed may stop reading, as `head` does.
    if args.metrics is not None:
        write_json(Path(args.metrics), metrics)
    if args.output is not None:
        output.write_predictions(
            table,
            predictions,
            args.output,
            class_columns=args.class_columns,
            quote_formulas=args.quote_formulas,
        )
    rows.print_metrics(metrics)
    return 0
