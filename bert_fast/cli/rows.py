"""Shared code of the commands for fine-tuned models: loading model and task, reading rows, writing results."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bert_fast._config import from_mapping
from bert_fast.cli.models import load, shows_progress
from bert_fast.tasks.settings import FormatSettings

if TYPE_CHECKING:
    from bert_fast.tasks.io.table import Table
    from bert_fast.tasks.task import Task

FORMATS = (".jsonl", ".csv")
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


def check_output(output: str | None) -> None:
    """Raise ValueError, before anything is computed, if the suffix of `output` is not a supported format."""
    if output is not None and Path(output).suffix not in FORMATS:
        raise ValueError(f"--output is {output!r}; expected a file name ending in {', '.join(FORMATS)}")


def read_rows(args: Any, task: Task, source: str) -> Table:
    """Read the table of a source as --names and --format say."""
    return task.read(source, args.names, from_mapping(FormatSettings, args.format))


def load_task(folder: str, device: str, options: Mapping[str, Any] | None = None) -> tuple[Any, Any, Task]:
    """Load a fine-tuned model in eval mode, its tokenizer, and its task; `options` override those of the training."""
    from bert_fast.tasks.task import task_from_config

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a folder written by bert-fast finetune")
    task = task_from_config(json.loads(path.read_text(encoding="utf-8")), options)
    model, tokenizer = load(task.model_class, folder, device)
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


def write_predictions(
    task: Task, table: Table, columns: Mapping[str, str], predictions: Sequence[Any], output: str | None
) -> None:
    """Write one line per row: its number in the source, the inputs and the prediction; JSON lines on stdout if None."""
    inputs = [columns[role.name] for role in task.roles if not role.target and role.name in columns]
    lines = [
        {"row": table.numbers[row], **{name: table[name][row] for name in inputs}, **prediction}
        for row, prediction in enumerate(predictions)
    ]
    with _open_output(output) as file:
        if output is not None and output.endswith(".csv"):
            writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
        else:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


@contextmanager
def _open_output(output: str | None) -> Iterator[Any]:
    if output is None:
        yield sys.stdout
        return
    with open(output, "w", encoding="utf-8", newline="") as file:
        yield file


def print_metrics(metrics: Mapping[str, Any], prefix: str = "") -> None:
    """Print the scalar metrics, the metrics per class and the confusion matrix, as far as present."""
    for name, value in metrics.items():
        if value is None or isinstance(value, (int, float)):
            shown = "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
            print(f"{prefix + name:<22} {shown}")
    classes = metrics.get("per_class") or {}
    if classes:
        width = max(map(len, [*classes, "class"]))
        print(f"\n{'class':<{width}}  precision  recall      f1  support")
        for label, row in classes.items():
            print(
                f"{label:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['support']:7}"
            )
    matrix, labels = metrics.get("confusion_matrix"), metrics.get("labels") or []
    if matrix and len(labels) <= _MAX_LABELS:
        width = max(len(label) for label in labels)
        digits = max([4, *(len(str(count)) for row in matrix for count in row)])
        print("\nconfusion matrix: one row per true class, one column per predicted class")
        for label, row in zip(labels, matrix, strict=True):
            print(f"{label:<{width}}  " + " ".join(f"{count:{digits}}" for count in row))
