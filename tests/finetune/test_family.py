"""Fine-tuning of the other architectures, with their tokenizers; the results load in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert_fast._config import from_mapping
from bert_fast.cli.main import main
from bert_fast.data import load_tokenizer
from bert_fast.finetune import FinetuneConfig, FinetuneResult, finetune
from bert_fast.models import BertConfig, BertModel
from bert_fast.models.config import longest_input
from bert_fast.models.family import ARCHITECTURES

FAMILY = [name for name in ARCHITECTURES if name != "bert"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
Folder = Callable[[str], Path]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def base(tokenizer_folder: Folder) -> Folder:
    """`base("roberta")`: the folder of a tiny pretrained model and its tokenizer."""

    def folder_of(model_type: str) -> Path:
        folder = tokenizer_folder(model_type)
        tokenizer = load_tokenizer(folder)
        pad = tokenizer.token_to_id("<pad>")
        ids = {"pad_token_id": 0 if pad is None else pad, "type_vocab_size": 1 if pad is not None else 2}
        torch.manual_seed(0)
        config = BertConfig.from_dict(
            {"model_type": model_type, "vocab_size": tokenizer.get_vocab_size(), "embedding_size": 32}, **SIZES, **ids
        )
        BertModel(config).save_pretrained(folder)
        return folder

    return folder_of


def run(task: str, folder: Path, target: Path, rows: list[dict[str, Any]], **settings: Any) -> FinetuneResult:
    data = target.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "task": task,
        "model": str(folder),
        "output_dir": str(target),
        "data": {"train": str(data), "dev": str(data)},
        "text": {"max_length": 24},
        "optimizer": {"lr": 3e-3},
        "dropout": 0.0,
        "classifier_dropout": 0.0,
        "epochs": 6,
        "progress": False,
        "report": False,
        "device": "cpu",
        **settings,
    }
    return finetune(from_mapping(FinetuneConfig, values), report=quiet)


@pytest.mark.parametrize("model_type", FAMILY)
def test_pairs(model_type: str, base: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["café", "北京", "Zoë", "river", "1234", "naïve"]
    rows = [
        {"text": f"the {a} sings", "text_pair": f"a {b} runs", "label": "same" if a == b else "other"}
        for n, a in enumerate(words)
        for b in [a, words[n - 1]] * 3
    ]
    result = run("classification", base(model_type), tmp_path / "run", rows, epochs=2)
    prefix = ARCHITECTURES[model_type].prefix
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    assert type(theirs).__name__ == f"{prefix}ForSequenceClassification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    source = transformers.AutoTokenizer.from_pretrained(base(model_type))
    assert tokenizer.model_max_length == longest_input(theirs.config)
    assert tokenizer.get_vocab() == source.get_vocab()
    assert tokenizer(rows[0]["text"])["input_ids"] == source(rows[0]["text"])["input_ids"]
    lines = [json.loads(x) for x in (tmp_path / "run/predictions.dev.jsonl").read_text().splitlines()][:8]
    with torch.no_grad():
        texts, pairs = ([line["input"][name] for line in lines] for name in ("text", "text_pair"))
        scores = theirs(**tokenizer(texts, pairs, return_tensors="pt", padding=True)).logits.softmax(-1)
    for line, expected in zip(lines, scores.tolist(), strict=True):
        # float32 in another order: some eps (1.2e-7) of the logits; a score moves by a quarter of that.
        assert expected == pytest.approx(list(line["prediction"]["scores"].values()), abs=1e-5)
    assert main(["evaluate", result.folder, str(tmp_path / "run.jsonl")]) == 0
    assert f"{'accuracy':<22} {result.metrics['dev']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["explain", result.folder, "the café", "--pair", "a", "--output", str(tmp_path / "x.html")]) == 0
    assert main(["embed", result.folder, "the café", "a " * 80]) == 0


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_words_of_a_sentence(model_type: str, base: Folder, tmp_path: Path) -> None:
    units = [("Zoë", "PER"), ("Москва", "LOC"), ("北京", "LOC")]
    rows = [
        {"tokens": ["the", *["old"] * (n % 3), name, "runs"], "tags": ["O", *["O"] * (n % 3), f"B-{kind}", "O"]}
        for n in range(12)
        for name, kind in units
    ]
    settings = {"classifier_dropout": None, "optimizer": {"lr": 5e-3}, "epochs": 12}
    result = run("token-classification", base(model_type), tmp_path / "run", rows, **settings)
    assert result.metrics["dev"]["f1"] == 1.0
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run", add_prefix_space=True)
    for row in rows[:6]:
        inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = theirs(**inputs).logits[0].argmax(-1)
        words = inputs.word_ids()
        assert [theirs.config.id2label[int(best[words.index(n)])] for n in range(len(row["tokens"]))] == row["tags"]


@pytest.mark.parametrize("model_type", ["roberta", "camembert", "distilbert"])
def test_answers(model_type: str, base: Folder, tmp_path: Path) -> None:
    names = ["café", "river", "house", "1234"]
    rows = []
    for n in range(16):
        context = f"{'a ' * (n % 4)}small  {names[n % 4]} sleeps again"
        answer = {"text": names[n % 4], "answer_start": context.index(names[n % 4])}
        rows.append({"question": "where?", "context": context, "answers": [answer]})
    # The last model: the first one that scores 1.0 may still add the space, which the metric ignores.
    settings = {"optimizer": {"lr": 5e-3}, "epochs": 20, "text": {"max_length": 36}, "keep_best": False}
    result = run("question-answering", base(model_type), tmp_path / "run", rows, **settings)
    assert result.metrics["dev"]["exact_match"] == 1.0
    lines = [json.loads(x)["prediction"] for x in (tmp_path / "run/predictions.dev.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [names[n % 4] for n in range(16)], "without the preceding space"
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    inputs = tokenizer(rows[5]["question"], rows[5]["context"], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    start, end = out.start_logits[0], out.end_logits[0]
    scores = [start[first] + end[last] for first in range(len(start)) for last in range(first, len(start))]
    # float32 in another order: the error is 8e-7, two ulps of a sum of two logits, of up to 8.
    assert lines[5]["n_best"][0]["score"] == pytest.approx(float(max(scores)), abs=1e-4)


def test_a_transformers_model(base: Folder, tmp_path: Path) -> None:
    """DistilBERT has no token types, and RoBERTa has one."""
    rows = [{"text": f"the {word}", "text_pair": "a", "label": word} for word in ("cat", "dog")] * 8
    for model_type in ("roberta", "distilbert"):
        folder = base(model_type)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = from_mapping(
            FinetuneConfig,
            {
                "task": "classification",
                "model": str(folder),
                "output_dir": str(tmp_path / model_type),
                "data": {"train": str(data), "dev": str(data)},
                "text": {"max_length": 16},
                "steps": 2,
                "progress": False,
                "report": False,
                "device": "cpu",
            },
        )
        result = finetune(config, model, quiet)
        assert result.metrics["run"]["steps"] == 2
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / model_type)
        assert again.config.id2label == {0: "cat", 1: "dog"}


def test_invalid_settings(base: Folder, tmp_path: Path) -> None:
    rows = [{"text": f"the {word}", "label": word} for word in ("cat", "dog")] * 4
    assert longest_input(BertConfig.from_pretrained(base("roberta"))) == 38
    with pytest.raises(ValueError, match=r"text.max_length is 39; expected at most 38"):
        run("classification", base("roberta"), tmp_path / "run", rows, text={"max_length": 39})
    few = load_tokenizer(base("distilbert")).get_vocab_size() - 1
    shutil.copytree(base("distilbert"), tmp_path / "few")
    BertModel(BertConfig.from_pretrained(base("distilbert"), vocab_size=few)).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match=rf"the tokenizer has {few + 1} tokens and the model {few} word embeddings"):
        run("classification", tmp_path / "few", tmp_path / "run", rows)
    tagged = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}] * 4
    with pytest.raises(ValueError, match=r"classifier_dropout is 0\.0; expected None: distilbert has none"):
        run("token-classification", base("distilbert"), tmp_path / "run", tagged)


def test_classifier_dropout_sets_the_dropout_of_the_head(base: Folder, tmp_path: Path) -> None:
    rows = [{"text": f"the {word}", "label": word} for word in ("cat", "dog")] * 4
    result = run("classification", base("distilbert"), tmp_path / "run", rows, classifier_dropout=0.37, steps=1)
    model: Any = result.model
    assert model.dropout.p == 0.37
    assert json.loads((tmp_path / "run/config.json").read_text())["seq_classif_dropout"] == 0.37
