"""What the commands of fine-tuned models share: the model with its task, rows in, predictions and metrics out."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bert_fast.cli.models import load, shows_progress

if TYPE_CHECKING:
    from bert_fast.tasks.io.table import Table
    from bert_fast.tasks.task import Task

FORMATS = (".jsonl", ".csv")
_MOST_LABELS = 20  # more do not fit on a screen as a matrix


def add_row_arguments(parser: Any) -> None:
    """The options of every command that reads rows for a fine-tuned model."""
    parser.add_argument(
        "--columns", type=dict[str, str] | None, default=None, help="role: column, where the names are not the usual"
    )
    parser.add_argument(
        "--names", type=list[str] | None, default=None, help="the columns of a .csv or .tsv file without a header"
    )
    parser.add_argument(
        "--empty", type=Literal["refuse", "drop", "fill"], default="refuse", help="what is done with rows without text"
    )
    parser.add_argument(
        "--options",
        type=dict[str, Any] | None,
        default=None,
        help="settings of the task in place of those of the training, as null_threshold, threshold, n_best",
    )
    parser.add_argument("--fill", type=str, default="[UNK]", help="the text that is put in with --empty fill")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="texts of like length are packed up to this")
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="bf16 is autocast")
    parser.add_argument("--device", type=str, default="auto", help="auto takes CUDA where there is one")


def check_output(output: str | None) -> None:
    """ValueError unless `output` is None or ends as a format that can be written; before anything is computed."""
    if output is not None and Path(output).suffix not in FORMATS:
        raise ValueError(f"--output is {output!r}; expected a name ending in {', '.join(FORMATS)}")


def load_task(folder: str, device: str, options: Mapping[str, Any] | None = None) -> tuple[Any, Any, Task]:
    """The model that bert-fast finetune wrote to `folder`, in eval mode; its tokenizer; its task with `options`."""
    from bert_fast.tasks.task import task_from_config

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the folder that bert-fast finetune wrote")
    task = task_from_config(json.loads(path.read_text(encoding="utf-8")), options)
    model, tokenizer = load(task.model_class, folder, device)
    return model, tokenizer, task


def predictions_of(args: Any, loaded: tuple[Any, Any, Task], table: Table, columns: Mapping[str, str]) -> list[Any]:
    """The predictions for `table`, with a progress bar on a terminal."""
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


def settle(args: Any, task: Task, table: Table, columns: Mapping[str, str]) -> Table:
    """`table` with its empty texts settled as --empty says."""
    from bert_fast.tasks.io.columns import describe, settle_empty

    print(describe(table, columns), file=sys.stderr)
    texts = [columns[role] for role in task.text_roles if role in columns]
    table, _, said = settle_empty(table, texts, args.empty, args.fill)
    if said:
        print(said, file=sys.stderr)
    return table


def write_predictions(
    task: Task, table: Table, columns: Mapping[str, str], predictions: Sequence[Any], output: str | None
) -> None:
    """A line a row: its number in the source, what the model read, what it predicts. JSON lines on stdout if None."""
    inputs = [columns[role.name] for role in task.roles if not role.target and role.name in columns]
    lines = [
        {"row": table.numbers[row], **{name: table[name][row] for name in inputs}, **prediction}
        for row, prediction in enumerate(predictions)
    ]
    with _opened(output) as file:
        if output is not None and output.endswith(".csv"):
            writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
        else:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


@contextmanager
def _opened(output: str | None) -> Iterator[Any]:
    if output is None:
        yield sys.stdout
        return
    with open(output, "w", encoding="utf-8", newline="") as file:
        yield file


def print_metrics(metrics: Mapping[str, Any], prefix: str = "") -> None:
    """The numbers, the table of the classes and the confusion matrix, where there are such."""
    for name, value in metrics.items():
        if value is None or isinstance(value, (int, float)):
            shown = "not defined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
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
    if matrix and len(labels) <= _MOST_LABELS:
        width = max(len(label) for label in labels)
        wide = max([4, *(len(str(count)) for row in matrix for count in row)])
        print("\nconfusion matrix: a line for each true class, predicted classes in the same order")
        for label, row in zip(labels, matrix, strict=True):
            print(f"{label:<{width}}  " + " ".join(f"{count:{wide}}" for count in row))
