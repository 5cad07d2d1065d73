"""Fine-tuning on words, answers, choices and pairs, from files to folders that transformers loads."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import bert_fast
from bert_fast._config import from_mapping
from bert_fast._io import write_json
from bert_fast.cli.main import main
from bert_fast.data import load_tokenizer
from bert_fast.finetune import FinetuneConfig, FinetuneResult, finetune
from bert_fast.finetune.data import Split, duplicates
from bert_fast.models import BertConfig, BertModel
from bert_fast.runtime.log import read_log
from bert_fast.tasks.io.columns import choose_columns
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import predict
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, task_class, task_from_config

NAMES, PLACES, FILLERS = ["ada", "bob", "eva"], ["rome", "oslo", "bonn"], ["the", "we", "saw", "went", "in", "to"]
QUESTIONS = ["who", "where", "?"]
FAMILY = {"ada": "eva", "rome": "bonn", "saw": "went"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES, *PLACES, *FILLERS, *QUESTIONS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    return folder


def words_of(number: int) -> list[str]:
    """Fillers with one name and one place among them; positions and length depend on `number`."""
    words = [FILLERS[(number * 7 + position * 5) % len(FILLERS)] for position in range(3 + number % 9)]
    words.insert(number % 4, NAMES[number % 3])
    words.insert((number * 3) % len(words), PLACES[number // 3 % 3])
    return words


def conll(folder: Path, numbers: range) -> Path:
    lines = []
    for number in numbers:
        for word in words_of(number):
            lines.append(f"{word}\t{'B-PER' if word in NAMES else 'B-LOC' if word in PLACES else 'O'}")
        lines.append("")
    path = folder / f"{numbers.start}.conll"
    path.write_text("\n".join(lines) + "\n")
    return path


def squad(folder: Path, numbers: range) -> Path:
    """One context per number, with two questions."""
    paragraphs = []
    for number in numbers:
        context = " ".join(words_of(number))
        qas = []
        for question, kind in (("who ?", NAMES), ("where ?", PLACES)):
            text = next(word for word in words_of(number) if word in kind)
            answers = [{"text": text, "answer_start": context.index(text)}]
            qas.append({"id": f"{number}-{question}", "question": question, "answers": answers})
        paragraphs.append({"context": context, "qas": qas})
    path = folder / f"{numbers.start}.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def choices(folder: Path, numbers: range) -> Path:
    """The name is correct, the place wrong."""
    rows = []
    for number in numbers:
        pair = [NAMES[number % 3], PLACES[number // 3 % 3]]
        rows.append({"text": "who ?", "choices": pair if number % 2 else pair[::-1], "label": 1 - number % 2})
    path = folder / f"{numbers.start}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(folder: Path, numbers: range) -> Path:
    path = folder / f"{numbers.start}.csv"
    keys = list(FAMILY)
    rows = [(f"the {keys[n % 3]}", f"{'we' if n % 2 else 'in'} {FAMILY[keys[n % 3]]}") for n in numbers]
    path.write_text("anchor,positive\n" + "".join(f"{anchor},{pair}\n" for anchor, pair in rows))
    return path


WRITERS = {
    "token-classification": conll,
    "question-answering": squad,
    "multiple-choice": choices,
    "sentence-embedding": pairs,
}


def run(task: str, base: Path, folder: Path, model: Any = None, **settings: Any) -> tuple[FinetuneResult, list[str]]:
    messages: list[str] = []
    write = WRITERS[task]
    # Each pair occurs once on dev, so that it is the only correct one.
    dev = write(folder, range(100, 103 if task == "sentence-embedding" else 124))
    config = from_mapping(
        FinetuneConfig,
        {
            "task": task,
            "model": str(base),
            "output_dir": str(folder / "run"),
            "data": {"train": str(write(folder, range(0, 90))), "dev": str(dev)},
            "text": {"max_length": 14},
            "optimizer": {"lr": 4e-3},
            "epochs": 16,
            "dropout": 0.0,
            "progress": False,
            "report": False,
            "device": "cpu",
            **settings,
        },
    )
    return finetune(config, model, report=messages.append), messages


PREDICTED = {
    "token-classification": "tags",
    "question-answering": "answer",
    "multiple-choice": "chosen",
    "sentence-embedding": "rank",
}


@pytest.mark.parametrize("task", WRITERS)
def test_a_model_learns_and_loads_in_transformers(task: str, base: Path, tmp_path: Path) -> None:
    result, messages = run(task, base, tmp_path)
    folder = Path(result.folder)
    dev = result.task.read(next(tmp_path.glob("100.*")))
    assert result.metrics["dev"][result.task.main_metric] >= 0.9
    assert any(f"{len(dev)} rows; " in line for line in messages), "the columns are reported"
    assert len((folder / "predictions.dev.jsonl").read_text().splitlines()) == len(dev)
    again = task_from_config(json.loads((folder / "config.json").read_text()))
    tokenizer = load_tokenizer(folder)
    theirs, loading = getattr(transformers, result.task.model_class).from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ours = getattr(bert_fast, result.task.model_class).from_pretrained(folder)
    columns = choose_columns(dev, again.roles, training=False)
    expected = predict(ours, again, tokenizer, dev, columns)
    predictions = predict(theirs.eval(), again, tokenizer, dev, columns)
    assert len(expected) == len(predictions) == len(dev)
    key = PREDICTED[task]
    assert [item[key] for item in predictions] == [item[key] for item in expected]
    if task == "token-classification":
        assert theirs.config.id2label == {0: "O", 1: "B-LOC", 2: "I-LOC", 3: "B-PER", 4: "I-PER"}
        text = "  ".join(words_of(105)).upper()
        alone = predict(ours, again, tokenizer, Table({"text": [text]}), {"tokens": "text"})[0]
        named = [(item["text"], item["kind"]) for item in alone["entities"]]
        assert named == [(w.upper(), "PER" if w in NAMES else "LOC") for w in words_of(105) if w not in FILLERS]
        assert all(text[item["start"] : item["end"]] == item["text"] for item in alone["entities"])


@pytest.mark.parametrize("task", WRITERS)
def test_a_fused_transformers_model_has_the_same_losses(task: str, base: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("plain", "fused"):
        folder = tmp_path / name
        folder.mkdir()
        labels = {"num_labels": 5} if task == "token-classification" else {}
        torch.manual_seed(1)
        kind = getattr(transformers, task_class(task).model_class)
        model = kind.from_pretrained(base, attn_implementation="eager", **labels)
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if name == "fused":
            bert_fast.fuse(model)
        result, _ = run(task, base, folder, model, steps=4, log_interval=1)
        lines = [line for line in read_log(Path(result.folder) / "log.jsonl") if line["kind"] == "train"]
        losses.append([line["loss"] for line in lines])
    assert len(losses[0]) == 4
    # float32 in another order: 7e-7 after four steps of AdamW, which can enlarge rounding in small gradients.
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
def test_a_result_loads_in_sentence_transformers(pooling: str, base: Path, tmp_path: Path) -> None:
    """With equal vectors, also of texts longer than text.max_length; its pooling module has no pooler."""
    # A GPU machine without network can't install the package.
    library = pytest.importorskip if torch.cuda.is_available() else importlib.import_module
    sentence_transformers: Any = library("sentence_transformers")
    result, _ = run("sentence-embedding", base, tmp_path, steps=2, options={"pooling": pooling})
    folder = Path(result.folder)
    if pooling == "pooler":
        assert not (folder / "modules.json").exists()
        return
    texts = ["the ada", "we saw rome in oslo", "", " ".join(words_of(8)) + " to bonn" * 9]
    task = task_from_config(json.loads((folder / "config.json").read_text()))
    model = BertModel.from_pretrained(folder)
    settings = TextSettings(max_length=14)
    ours = predict(model, task, load_tokenizer(folder), Table({"text": texts}), {"text": "text"}, text=settings)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert theirs.max_seq_length == 14
    vectors = theirs.encode(texts, show_progress_bar=False)
    # float32 in another order through two layers: the error is 7e-7, three eps of values of up to 2.6.
    np.testing.assert_allclose(vectors, [item["vector"] for item in ours], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
@pytest.mark.parametrize("long", ["head", "tail", "head_tail"])
def test_embed_reads_a_result_as_predict_does(
    pooling: str, long: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a checkpoint of sentence-transformers, whose own modules the result does not keep."""
    start = tmp_path / "start"
    shutil.copytree(base, start)
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    entries = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules.items()]
    write_json(start / "modules.json", entries)
    write_json(start / "config_sentence_transformers.json", {"prompts": {"x": "the "}, "default_prompt_name": "x"})
    text = {"max_length": 11, "long": long}
    result, _ = run("sentence-embedding", start, tmp_path, steps=2, options={"pooling": pooling}, text=text)
    folder = Path(result.folder)
    texts = ["the ada", "we saw rome in oslo", "to bonn", " ".join(words_of(8)) + " to bonn" * 9]
    task = task_from_config(json.loads((folder / "config.json").read_text()))
    model = BertModel.from_pretrained(folder)
    predicted = predict(model, task, load_tokenizer(folder), Table({"text": texts}), {"text": "text"})
    expected = [item["vector"] for item in predicted]
    # float32 in other batches: an eps or two of values of up to 2.6.
    np.testing.assert_allclose(model.encode(texts), expected, rtol=0.0, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = BertModel.from_pretrained(tmp_path / "again").encode(texts, tokenizer=load_tokenizer(folder))
    np.testing.assert_allclose(again, expected, rtol=0.0, atol=1e-5)
    capsys.readouterr()
    assert main(["embed", str(folder), *texts]) == 0
    lines = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(lines, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("task", ["question-answering", "sentence-embedding"])
def test_unsupported_loss_options_are_refused(task: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"loss.label_smoothing is 0.1; expected 0: {task} does not support it"):
        run(task, base, tmp_path, steps=1, loss={"label_smoothing": 0.1})
    with pytest.raises(ValueError, match=rf"loss.class_weights is balanced; expected none: {task} has no classes"):
        run(task, base, tmp_path, steps=1, loss={"class_weights": "balanced"})
    assert not (tmp_path / "run").exists()


def test_questions_on_one_context_are_held_out_together(base: Path, tmp_path: Path) -> None:
    data = {"train": str(squad(tmp_path, range(0, 90))), "dev_fraction": 0.3}
    result, _ = run("question-answering", base, tmp_path, data=data, steps=1, report=True)
    lines = [json.loads(line) for line in (Path(result.folder) / "predictions.dev.jsonl").read_text().splitlines()]
    held = {line["input"]["context"] for line in lines}
    every = result.task.read(data["train"])["context"]
    assert 54 <= len(lines) < 70
    assert len(lines) == sum(context in held for context in every)
    assert sum(line["error"] for line in lines) == pytest.approx(len(lines) * (1 - result.metrics["dev"]["f1"]))
    assert "Worst mistakes on dev" in (Path(result.folder) / "report.html").read_text()


def test_the_null_threshold_is_tuned_on_dev_and_stored(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {}
    for name, rows in (("train", range(0, 40)), ("dev", range(100, 116))):
        content = json.loads(squad(tmp_path, rows).read_text())
        for paragraph in content["data"][0]["paragraphs"][::2]:
            paragraph["qas"][0] |= {"answers": [], "is_impossible": True}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        data[name] = str(tmp_path / f"{name}.json")
    (tmp_path / "given").mkdir()
    result, messages = run("question-answering", base, tmp_path, data=data, steps=3)
    dev = result.metrics["dev"]
    assert any(text.startswith("null_threshold is set to ") for text in messages)
    assert dev["null_threshold"] == dev["best_f1_threshold"] != 0.0
    assert dev["f1"] == pytest.approx(dev["best_f1"])
    entry = json.loads((Path(result.folder) / "config.json").read_text())[CONFIG_KEY]
    assert entry["null_threshold"] == dev["null_threshold"]
    assert main(["evaluate", result.folder, data["dev"]]) == 0
    assert f"{'f1':<22} {dev['f1']:.4f}" in capsys.readouterr().out.splitlines()
    command = ["predict", result.folder, "--file", data["dev"]]
    for threshold, answered in ((1e9, True), (-1e9, False)):
        assert main([*command, "--options", json.dumps({"null_threshold": threshold})]) == 0
        answers = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
        assert {bool(answer) for answer in answers} == {answered}
    given, messages = run(
        "question-answering", base, tmp_path / "given", data=data, steps=1, options={"null_threshold": 2.0}
    )
    assert given.metrics["dev"]["null_threshold"] == 2.0
    assert not any(text.startswith("null_threshold is ") for text in messages)


def test_rows_with_equal_texts_and_different_choices_are_not_duplicates() -> None:
    task = task_class("multiple-choice")()
    columns = {"text": "text", "label": "label"}
    rows = {"text": ["who?"] * 2, "choice0": ["ada", "bob"], "choice1": ["eve", "dan"], "label": [0, 1]}
    train = Split(Table(rows, "train"), columns)
    task.fit(train.table, columns)
    other = Split(Table({**rows, "choice1": ["eve", "eve"]}, "dev"), columns)
    (message,) = duplicates(task, train, other)
    assert message.startswith("1 of 2 rows of dev are also in train")
