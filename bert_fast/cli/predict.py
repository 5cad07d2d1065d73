"""Predict with a fine-tuned model, packed without padding."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from bert_fast.cli import rows

if TYPE_CHECKING:
    from bert_fast.tasks.io.table import Table
    from bert_fast.tasks.task import Task


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder written by bert-fast finetune")
    parser.add_argument("texts", nargs="*", type=str, help="texts; read from --file, or stdin, if none")
    parser.add_argument(
        "--file",
        type=str | None,
        default=None,
        help="file of rows: csv, tsv, jsonl, json, parquet, conll, txt; - is stdin",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"output file, {', '.join(rows.FORMATS)}; JSON lines on stdout if not set",
    )
    rows.add_row_arguments(parser)


def run(args: Any) -> int:
    rows.check_output(args.output)
    loaded = rows.load_task(args.model, args.device, args.options)
    task = loaded[2]
    table = _table(args, task)

    from bert_fast.tasks.io.columns import choose_columns

    columns = choose_columns(table, task.roles, args.columns, training=False)
    inputs = {role.name: columns[role.name] for role in task.roles if not role.target and role.name in columns}
    table = rows.handle_empty(args, task, table, inputs)
    rows.write_predictions(task, table, inputs, rows.predict_rows(args, loaded, table, inputs), args.output)
    return 0


def _table(args: Any, task: Task) -> Table:
    from bert_fast.tasks.io.table import Table

    if args.texts:
        if args.file is not None:
            raise ValueError("texts and --file are both given; expected one of them")
        return Table({"text": list(args.texts)}, "arguments")
    if args.file not in (None, "-"):
        return rows.read_rows(args, task, args.file)
    lines = [(number, line) for number, line in enumerate(sys.stdin.read().splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError("no texts; give them as arguments, with --file FILE, or as lines on stdin")
    numbers = [number for number, _ in lines]
    if not lines[0][1].lstrip().startswith("{"):
        return Table({"text": [line for _, line in lines]}, "stdin", numbers, "line")
    objects = []
    for number, line in lines:
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"stdin, line {number}: not a JSON object, unlike the first line ({error})") from error
    names = list(dict.fromkeys(name for row in objects for name in row))
    return Table({name: [row.get(name) for row in objects] for name in names}, "stdin", numbers, "line")
