"""Sentiment of movie review snippets or tweets (Hutto and Gilbert, 2014), from all-MiniLM-L6-v2's weights.

    python -m examples.sentiment movies          # naive Bayes, bert_fast and transformers' Trainer
    python -m examples.sentiment tweets

The rows are downloaded from PyPI (in the source archive of vaderSentiment, MIT) at run time and not stored. Each text
has the mean of twenty ratings from -4 to 4; its sign is the label, and texts with a mean of 0 are skipped. Every fifth
row is for test, every twentieth of the others for dev; neither selects anything.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

from examples.naive_bayes import accuracy
from examples.trainer_comparison import Experiment, Row, arguments, compared, download, minilm, thinned, write_results

PACKAGE = "vaderSentiment==3.3.2"
FILES = {"movies": "movieReviewSnippets_GroundTruth.txt", "tweets": "tweets_GroundTruth.txt"}


def parse(text: str) -> list[Row]:
    """Parse lines of number, mean rating and text, separated by tabs, to rows of text and label."""
    rows = []
    for line in text.splitlines():
        _, rating, content = line.split("\t", 2)
        if float(rating) != 0:
            rows.append({"text": content.strip(), "label": "positive" if float(rating) > 0 else "negative"})
    return rows


def fetch(kind: str) -> list[Row]:
    """The rows of movies or tweets."""
    inner = f"{PACKAGE.replace('==', '-')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tempfile.TemporaryDirectory() as name, tarfile.open(download(PACKAGE, Path(name), source=True)) as archive:
        packed = archive.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as resources:
            member = resources.extractfile(f"hutto_ICWSM_2014/{FILES[kind]}")
            assert member is not None
            return parse(member.read().decode("utf-8", errors="replace"))


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Every fifth row is for test, every twentieth of the others for dev."""
    rest = [row for number, row in enumerate(rows) if number % 5 != 4]
    return {
        "train": [row for number, row in enumerate(rest) if number % 20 != 19],
        "dev": rest[19::20],
        "test": rows[4::5],
    }


def main() -> None:
    parser = arguments(__doc__ or "", epochs=2, seeds=1, max_length=64)
    parser.add_argument("kind", choices=sorted(FILES))
    options = parser.parse_args()
    splits = thinned(split(fetch(options.kind)), options.rows)
    bayes = accuracy(splits["train"] + splits["dev"], splits["test"])
    experiment = Experiment(
        "classification",
        minilm(),
        splits,
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
    title = f"Sentiment of {options.kind}, from MiniLM-L6's weights"
    write_results("sentiment", title, lines, write=options.write, suffix=f"_{options.kind}")


if __name__ == "__main__":
    main()
