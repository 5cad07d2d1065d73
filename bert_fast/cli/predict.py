"""Predict with a fine-tuned model, packed without padding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bert_fast._text import read_lines
from bert_fast.cli import output, rows

if TYPE_CHECKING:
    from bert_fast.tasks.io.table import Table
    from bert_fast.tasks.task import Task


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder written by bert-fast finetune, or a hub name")
    parser.add_argument("texts", nargs="*", type=str, help="texts; read from --file, or stdin, if none")
    parser.add_argument(
        "--file",
        type=str | None,
        default=None,
        help="file of rows: csv, tsv, jsonl, json, parquet, conll, txt; - is stdin",
    )
    parser.add_argument(
        "--pair",
        type=bool,
        default=False,
        help="predict pairs of texts, or questions with their contexts: two arguments, two texts separated by a tab on "
        "each line, or two columns of --file",
    )
    output.add_output_arguments(parser)
    rows.add_row_arguments(parser)


def run(args: Any) -> int:
    output.check_output(args.output, inputs=[args.file])
    loaded = rows.load_task(args.model, args.device, args.options)
    task = loaded[2]
    table = _table(args, task)

    from bert_fast.tasks.io.columns import choose_columns, column_option

    columns = choose_columns(table, task.roles, args.columns, training=False)
    inputs = {role.name: columns[role.name] for role in task.roles if not role.target and role.name in columns}
    second = _pair_roles(task)[1] if args.pair else ""
    if second and second not in inputs:
        raise ValueError(
            f"{table.source}: no column for {second} among {', '.join(table.columns)}; expected one, since --pair is "
            f"set; name it with {column_option(second)}"
        )
    table = rows.handle_empty(args, task, table, inputs)
    output.write_predictions(
        table,
        rows.predict_rows(args, loaded, table, inputs),
        args.output,
        class_columns=args.class_columns,
        quote_formulas=args.quote_formulas,
    )
    return 0


def _table(args: Any, task: Task) -> Table:
    from bert_fast.tasks.io.sources import read_jsonl, read_text
    from bert_fast.tasks.io.table import Table

    if args.texts:
        if args.file is not None:
            raise ValueError("texts and --file are both given; expected one of them")
        if args.pair:
            return _pairs(task, _tab_separated(args.texts), "arguments", list(range(1, len(args.texts) + 1)))
        return Table({"text": list(args.texts)}, "arguments")
    if args.file not in (None, "-"):
        table = rows.read_rows(args, task, args.file)
        if args.pair and list(table.columns) == ["text"]:
            return _pairs(task, table["text"], table.source, table.numbers, table.unit)
        return table
    lines = [(number, line) for number, line in read_lines(sys.stdin, "stdin") if line.strip()]
    if not lines:
        raise ValueError("no texts; give them as arguments, with --file FILE, or as lines on stdin")
    if lines[0][1].lstrip().startswith("{"):
        return read_jsonl(lines, "stdin")
    if args.pair:
        return _pairs(task, [line for _, line in lines], "stdin", [number for number, _ in lines], "line")
    return read_text(lines, "stdin")


def _pair_roles(task: Task) -> tuple[str, str]:
    """The roles of the two texts of a pair."""
    names = [role.name for role in task.roles if role.name in task.text_roles and not role.target]
    if len(names) < 2:
        raise ValueError(f"--pair is set; expected a task on pairs of texts, and the task of the model is {task.name}")
    return names[0], names[1]


def _tab_separated(texts: Sequence[str]) -> list[str]:
    """Texts of which each is a pair; an even number of texts without tabs are pairs of neighbours."""
    if len(texts) % 2 or any("\t" in text for text in texts):
        return list(texts)
    return [f"{first}\t{second}" for first, second in zip(texts[::2], texts[1::2], strict=True)]


def _pairs(task: Task, texts: Sequence[str], source: str, numbers: list[int], unit: str = "row") -> Table:
    """A table of the two texts that a tab separates in each of `texts`."""
    from bert_fast.tasks.io.table import Table

    first, second = _pair_roles(task)
    columns: dict[str, list[Any]] = {first: [], second: []}
    for number, text in zip(numbers, texts, strict=False):
        parts = text.split("\t")
        if len(parts) != 2:
            raise ValueError(
                f"{source}, {unit} {number}: {len(parts)} texts separated by tabs; expected 2, since --pair is set"
            )
        columns[first].append(parts[0])
        columns[second].append(parts[1])
    return Table(columns, source, numbers[: len(texts)], unit)
