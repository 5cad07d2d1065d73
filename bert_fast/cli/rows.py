"""Shared code of the commands for fine-tuned models: loading model and task, reading rows, printing metrics."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from bert_fast._config import from_mapping
from bert_fast._io import read_json
from bert_fast._terminal import printable
from bert_fast.cli.models import load, model_folder, shows_progress
from bert_fast.tasks.settings import FormatSettings

if TYPE_CHECKING:
    from bert_fast.tasks.io.table import Table
    from bert_fast.tasks.task import Task

_MAX_LABELS = 20  # a larger confusion matrix does not fit on a screen


def add_row_arguments(parser: Any) -> None:
    """Add the options of commands that read rows for a fine-tuned model."""
    parser.add_argument(
        "--columns", type=dict[str, str] | None, default=None, help="role: column, for columns without a common name"
    )
    parser.add_argument(
        "--names", type=list[str] | None, default=None, help="column names of a .csv or .tsv file without a header"
    )
    parser.add_class_arguments(FormatSettings, "format")
    parser.add_argument(
        "--no_label",
        type=list[str | int] | None,
        default=None,
        help='drop rows whose label is empty or one of these: ["-"]',
    )
    parser.add_argument(
        "--empty",
        type=Literal["refuse", "drop", "fill"],
        default="refuse",
        help="refuse, drop or fill rows without text",
    )
    parser.add_argument(
        "--options",
        type=dict[str, Any] | None,
        default=None,
        help="override options of the task, such as null_threshold, threshold, n_best",
    )
    parser.add_argument("--fill", type=str, default="[UNK]", help="text of empty rows with --empty fill")
    parser.add_argument(
        "--batch_tokens", type=int, default=8192, help="maximum tokens of a batch of texts of similar length"
    )
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="fp32, or bf16 autocast")
    parser.add_argument("--device", type=str, default="auto", help="auto selects CUDA if it is available")


def read_rows(args: Any, task: Task, source: str) -> Table:
    """Read the table of a source as --names and --format say."""
    return task.read(source, args.names, from_mapping(FormatSettings, args.format))


def load_task(folder: str, device: str, options: Mapping[str, Any] | None = None) -> tuple[Any, Any, Task]:
    """Load a fine-tuned model in eval mode, its tokenizer, and its task; `options` override those of the training."""
    from bert_fast.tasks.task import task_from_config

    local = model_folder(folder, "a folder written by bert-fast finetune, with config.json")
    path = local / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a folder written by bert-fast finetune")
    task = task_from_config(read_json(path), options)
    model, tokenizer = load(task.model_class, str(local), device)
    return model, tokenizer, task


def predict_rows(args: Any, loaded: tuple[Any, Any, Task], table: Table, columns: Mapping[str, str]) -> list[Any]:
    """Predict the rows of `table`, with a progress bar on a terminal."""
    from bert_fast._progress import ProgressBar
    from bert_fast.tasks.prediction import predict

    model, tokenizer, task = loaded
    with ProgressBar(len(table), shown=shows_progress(), unit="text") as bar:
        return predict(
            model,
            task,
            tokenizer,
            table,
            columns,
            batch_tokens=args.batch_tokens,
            precision=args.precision,
            progress=bar.update,
        )


def handle_empty(args: Any, task: Task, table: Table, columns: Mapping[str, str]) -> Table:
    """Refuse, drop or fill the rows without text, as --empty says, and drop those without a label, as --no_label."""
    from bert_fast.tasks.io.columns import describe_columns, handle_empty_texts
    from bert_fast.tasks.io.labels import drop_unlabelled

    print(describe_columns(table, columns), file=sys.stderr)
    texts = [columns[role] for role in task.text_roles if role in columns]
    table, message = handle_empty_texts(table, texts, args.empty, args.fill)
    if message:
        print(message, file=sys.stderr)
    if "label" in columns and any(role.name == "label" and role.target for role in task.roles):
        table, message = drop_unlabelled(table, columns["label"], args.no_label)
        if message:
            print(message, file=sys.stderr)
    return table


def print_metrics(metrics: Mapping[str, Any], prefix: str = "") -> None:
    """Print the scalar metrics, the metrics per class and the confusion matrix, as far as present."""
    for name, value in metrics.items():
        if value is None or isinstance(value, (int, float)):
            shown = "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
            print(f"{prefix + _name(name):<22} {shown}")
    classes = {_name(label): row for label, row in (metrics.get("per_class") or {}).items()}
    if classes:
        width = max(map(len, [*classes, "class"]))
        print(f"\n{'class':<{width}}  precision  recall      f1  support")
        for label, row in classes.items():
            print(
                f"{label:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['support']:7}"
            )
    matrix, labels = metrics.get("confusion_matrix"), [_name(label) for label in metrics.get("labels") or []]
    if matrix and len(labels) <= _MAX_LABELS:
        width = max(len(label) for label in labels)
        digits = max([4, *(len(str(count)) for row in matrix for count in row)])
        print("\nconfusion matrix: one row per true class, one column per predicted class")
        for label, row in zip(labels, matrix, strict=True):
            print(f"{label:<{width}}  " + " ".join(f"{count:{digits}}" for count in row))


def _name(label: str) -> str:
    return printable(label, lines=False)
