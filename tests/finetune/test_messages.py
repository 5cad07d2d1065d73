"""What a run says of its rows: how they were read, the labels, rows without one, unknown tokens, truncation, equal
predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bert_fast._config import from_mapping
from bert_fast.cli.main import main
from bert_fast.finetune import FinetuneConfig, FinetuneResult, finetune
from bert_fast.finetune.data import Split, hold_out
from bert_fast.finetune.task_run import TaskRun
from bert_fast.models import BertConfig, BertModel
from bert_fast.tasks.io.labels import label_key
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.task import Batch

WORDS = ["good", "bad", "the", "film", "was", "é", "2028"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def run(
    base: Path, tmp_path: Path, content: str, name: str = "train.csv", task: str = "classification", **settings: Any
) -> tuple[list[str], FinetuneResult]:
    """Fine-tune for one step on a file of rows; the messages and the result."""
    messages: list[str] = []
    return messages, finetune(config_of(base, tmp_path, content, name, task, **settings), report=messages.append)


def config_of(
    base: Path, tmp_path: Path, content: str, name: str = "train.csv", task: str = "classification", **settings: Any
) -> FinetuneConfig:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    data = {"train": str(tmp_path / name), "dev": str(tmp_path / name), **settings.pop("data", {})}
    values = {"task": task, "model": str(base), "output_dir": str(tmp_path / "run"), "data": data, "steps": 1}
    values |= {
        "progress": False,
        "report": False,
        "device": "cpu",
        "text": {"max_length": 8},
        "dropout": 0.0,
        **settings,
    }
    config: FinetuneConfig = from_mapping(FinetuneConfig, values)
    return config


def rows(count: int, text: str = "the film was {}") -> list[tuple[str, str]]:
    return [(text.format(WORDS[number % 2]), WORDS[number % 2]) for number in range(count)]


CONTENT = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(5))


def test_the_dialect_and_the_labels_are_printed_and_no_label_drops_rows(base: Path, tmp_path: Path) -> None:
    content = "text;label\n" + "".join(
        f"{text};{label}\n" for text, label in [*rows(12), ("the film", "-"), ("film", "")]
    )
    messages, result = run(base, tmp_path, content, data={"no_label": ["-"]})
    assert any("14 rows; text, label; delimiter ';' detected (format.delimiter)" in line for line in messages)
    assert any("2 of 14 rows have no label ('-' 1 times, '' 1 times); dropped" in line for line in messages)
    assert any(line.endswith("2 labels: bad, good") for line in messages)
    assert result.metrics["dev"]["labels"] == ["bad", "good"]
    assert not any("is a class" in line for line in messages)
    with pytest.raises(ValueError, match=r"line 15: no label in 'label'; .* set no_label to drop such rows"):
        run(base, tmp_path, content, overwrite=True)
    messages, _ = run(base, tmp_path, content[: content.index("film;\n")], overwrite=True)
    assert any("the label '-' (1 rows) is a class; if it means no label" in line for line in messages)


def test_evaluate_takes_the_same_settings(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(base, tmp_path, "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(12)))
    (tmp_path / "dev.csv").write_bytes("text::label\nthe film é::good\nfilm::bad\nfilm::-1\n".encode("latin-1"))
    arguments = ["evaluate", str(tmp_path / "run"), str(tmp_path / "dev.csv"), "--no_label", '["-", -1]']
    assert main(arguments) == 2
    assert "dev.csv, line 2: not UTF-8" in capsys.readouterr().err
    assert main([*arguments, "--format.encoding", "latin-1", "--format.delimiter", "::"]) == 0
    assert "1 of 3 rows have no label ('-1' 1 times); dropped" in capsys.readouterr().err
    assert main([*arguments, "--format.encoding", "latin-7777"]) == 2
    assert "format.encoding is 'latin-7777'; expected a codec" in capsys.readouterr().err


def test_unknown_tokens_and_truncation_are_counted(base: Path, tmp_path: Path) -> None:
    table = [*rows(8), ("кино было good", "good"), ("the film was the film was the film was", "bad")]
    content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in table)
    messages, _ = run(base, tmp_path, content)
    # 8 rows of 4 words, one of 3 with two unknown ones, and 6 of 9 that fit: 2 of 41.
    assert any("warning: 4.9% of the tokens of" in line and "are [UNK]" in line for line in messages)
    assert any("1 of 10 rows (10.0%) of" in line and "are truncated; text.long is head" in line for line in messages)
    known = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(200)) + "кино,good\n"
    messages, _ = run(base, tmp_path, known, overwrite=True)
    assert not any("[UNK]" in line or "truncated" in line for line in messages), "1 of 801 is less than 1 %"


def test_one_class_predicted_for_every_row_is_a_warning(base: Path, tmp_path: Path) -> None:
    content = "text,label\n" + "".join(f"the film,{label}\n" for _, label in rows(12))
    messages, _ = run(base, tmp_path, content)
    assert any("warning: all 12 rows of" in line and "are predicted as" in line for line in messages)


def test_the_tag_scheme_is_printed_and_kept_in_the_metrics(base: Path, tmp_path: Path) -> None:
    content = "# sentence 1\nthe O\nfilm B-WORK\n2028 L-WORK\n\n# sentence 2\ngood O\nbad U-WORK\n"
    messages, result = run(base, tmp_path, content, "train.conll", "token-classification")
    assert any("entity tags of the scheme BILOU: WORK" in line for line in messages)
    assert any("2 lines of comments" in line for line in messages)
    assert json.loads((Path(result.folder) / "metrics.json").read_text())["dev"]["scheme"] == "bilou"
    content += "\nwas PERSON\n"
    with pytest.raises(ValueError, match=r"train.conll, line 10, word 1: 'PERSON' is not an entity tag, as others are"):
        run(base, tmp_path, content, "train.conll", "token-classification", overwrite=True)


def test_no_label_needs_a_column_of_labels(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.no_label is \['O'\]; expected none, since no column of labels is read"):
        run(base, tmp_path, "the B-X\n", "train.conll", "token-classification", data={"no_label": ["O"]})


def test_tags_that_the_scheme_forbids_are_named_in_training_rows_too(base: Path, tmp_path: Path) -> None:
    content = "the O\nfilm I-WORK\n\n" + "good B-WORK\nbad I-WORK\n\n" * 5
    messages, _ = run(base, tmp_path, content, "train.conll", "token-classification")
    assert any("1 rows have tags that IOB2 forbids" in line and "line 1, word 2" in line for line in messages)


def test_rows_with_unusual_line_separators_survive_a_run(base: Path, tmp_path: Path) -> None:
    odd = "the\u2028film\u2029was\u0085good\x0bbad\x0cthe\x1cfilm"
    content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in [*rows(6), (odd, "good")])
    _, result = run(base, tmp_path, content)
    lines = (Path(result.folder) / "predictions.dev.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["input"]["text"] for line in lines if line][-1] == odd


@pytest.mark.parametrize(
    "weights",
    [[1, 5], (1.0, 5), ["1", "5.0"], np.array([1, 5]), torch.tensor([1.0, 5.0]), {"good": 5, "bad": np.float32(1)}],
    ids=["ints", "tuple", "texts", "ndarray", "tensor", "by label"],
)
def test_class_weights_are_numbers_of_any_kind(weights: Any, base: Path, tmp_path: Path) -> None:
    task_run = TaskRun(config_of(base, tmp_path, CONTENT, loss={"class_weights": weights}), None, lambda _: None)
    loss = task_run.backward(task_run.train_examples, task_run.loss_weight([task_run.train_examples]), 1.0)
    logits = task_run.task.forward(task_run.model, Batch.of(task_run.train_examples))
    targets = torch.tensor([example.target for example in task_run.train_examples])
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, torch.tensor([1.0, 5.0]).double())
    # float32 (eps 1.2e-7): a loss of about 0.7, of five rows.
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"good": 1, "bat": 2}, "loss.class_weights has the label 'bat'; expected bad, good; did you mean 'bad'"),
        ({"good": 1}, "loss.class_weights has no weight of bad; expected one of every label"),
        ([1, 2, 3], "loss.class_weights has 3 numbers; expected 2, one per label"),
        ([1, "x"], "loss.class_weights is"),
        (np.ones((2, 2)), "loss.class_weights is"),
    ],
    ids=["unknown", "missing", "three", "text", "matrix"],
)
def test_class_weights_that_do_not_fit_are_refused(weights: Any, message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TaskRun(config_of(base, tmp_path, CONTENT, loss={"class_weights": weights}), None, lambda _: None)


def test_equal_labels_of_other_types_are_stratified_together() -> None:
    labels: list[Any] = [1, 1.0, "1", True, "1.0", 0, "0", 0.0, False, 0] * 4
    split = Split(Table({"text": [str(number) for number in range(40)], "label": labels}), {"label": "label"})
    train, dev = hold_out(split, 0.1, seed=0)
    assert sorted(map(label_key, dev.table["label"])) == ["0", "0", "1", "1"]
    assert len(train.table) == 36
