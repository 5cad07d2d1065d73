"""What the attacks on files, kills and models start from: a corpus, prepared data, a run, models, a fine-tuned model.

corpus.txt                  40 documents
data/                       prepared
run/                        a pretraining run of 12 steps, with checkpoints of 4, 8 and 12
base/                       a tiny BERT with tokenizer
train.csv  dev.csv          rows for it
tuned/                      base, fine-tuned on the rows
heads/<model_type>/<class>/ a model of transformers with large random weights
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

from tests.torture.process import command, settings

_TEXT = """
the a small old red green bird cat river house sings runs sleeps near under over and then quietly again good fine great
bad poor sad film was it very we saw
"""
WORDS = _TEXT.split()
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PRETRAIN = {
    "data.seq_len": 24,
    "data.token_budget": 96,
    "optimizer.lr": 1e-3,
    "steps": 12,
    "log_interval": 1,
    "eval_interval": 6,
    "checkpoint_interval": 4,
    "keep_last": 3,
    "tensorboard": "false",
    "progress": "false",
    "ceiling": "false",
}
PREPARE = {"vocab_size": 110, "heldout_fraction": 0.2, "shard_tokens": 600, "part_bytes": 2000, "progress": "false"}
FINETUNE = {
    "task": "classification",
    "text.max_length": 16,
    "optimizer.lr": 3e-3,
    "epochs": 1,
    "log_interval": 1,
    "progress": "false",
    "report": "false",
}


def pretrain_command(folder: Path, material: Path, **changed: Any) -> Any:
    """A pretraining run into `folder`, which has 12 steps and three checkpoints."""
    files = {"output_dir": folder, "data.folder": material / "data", "model.config": material / "config.json"}
    return command("pretrain", *settings({**files, **PRETRAIN, **changed}))


def prepare_command(folder: Path, source: Path, **changed: Any) -> Any:
    return command("prepare", *settings({"output": folder, "sources": f"[{source}]", **PREPARE, **changed}))


def finetune_command(folder: Path, material: Path, **changed: Any) -> Any:
    files = {"output_dir": folder, "model": material / "base"}
    files |= {"data.train": material / "train.csv", "data.dev": material / "dev.csv"}
    return command("finetune", *settings({**files, **FINETUNE, **changed}))


def build(target: str, areas: list[str]) -> None:
    """Write to the folder `target` what the attacks of `areas` need."""
    folder = Path(target)
    folder.mkdir()
    rng = random.Random(0)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if set(areas) - {"kernels"}:
        _texts(folder, rng)
        _base(folder / "base")
    if set(areas) & {"files", "kills", "hostile"}:
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES}))
        for run in (
            prepare_command(folder / "data", folder / "corpus.txt"),
            pretrain_command(folder / "run", folder),
            finetune_command(folder / "tuned", folder, report="true"),
        ):
            with (
                open(folder / "messages", "a") as file,
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
            ):
                code = run()
            assert code == 0, (folder / "messages").read_text()
    if "models" in areas:
        _heads(folder / "heads")


def _texts(folder: Path, rng: random.Random) -> None:
    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(4, 9))) + "."

    documents = ["\n".join(sentence() for _ in range(rng.randint(3, 8))) for _ in range(40)]
    (folder / "corpus.txt").write_text("\n\n".join(documents) + "\n")
    for name, rows in (("train", 48), ("dev", 16)):
        lines = [f"{sentence()} {word},{word}" for word in rng.choices(["good", "bad"], k=rows)]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")


def _base(folder: Path) -> None:
    import torch
    import transformers

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", ",", "##s", "x", "##x"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(vocabulary), initializer_range=0.2, **SIZES)
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def _heads(folder: Path) -> None:
    """transformers' models of every architecture and head that the project has, in float64."""
    import torch
    import transformers

    from bert_fast.models.family import ARCHITECTURES, COMMON_MODELS

    for model_type, architecture in ARCHITECTURES.items():
        names = [name.removeprefix("Bert") for name in COMMON_MODELS]
        names += {"bert": ["ForPreTraining", "ForNextSentencePrediction"], "electra": ["ForPreTraining"]}.get(
            model_type, []
        )
        for suffix in names:
            values = {**SIZES, **NO_DROPOUT, "vocab_size": 61, "pad_token_id": 1, "num_labels": 3}
            values |= {"type_vocab_size": 1} if architecture.positions_after_padding else {}
            values |= {"embedding_size": 16} if model_type == "electra" else {}
            if suffix not in ("ForSequenceClassification", "ForTokenClassification"):
                del values["num_labels"]
            values = {architecture.settings.get(key, key): value for key, value in values.items()}
            config = getattr(transformers, f"{architecture.prefix}Config")(**values)
            torch.manual_seed(7)
            model = getattr(transformers, f"{architecture.prefix}{suffix}")(config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    noise = torch.randn(parameter.shape) * (0.15 if parameter.dim() > 1 else 0.3)
                    parameter.copy_(noise + (1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0))
            model.save_pretrained(folder / model_type / suffix)
