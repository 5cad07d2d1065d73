"""Labels, examples, losses and predictions of classification, multi-label and regression."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bert_fast.models import BertConfig, BertForSequenceClassification
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import (
    CONFIG_KEY,
    Batch,
    Example,
    LossOptions,
    Task,
    make_task,
    run_model,
    task_entry,
    task_from_config,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "good", "bad", "##s"]
COLUMNS = {"text": "text", "label": "label"}
ONE = LossOptions()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def table(labels: list[Any], **more: Any) -> Table:
    return Table({"text": ["a b c"] * len(labels), "label": labels, **more}, "my.csv")


def fitted(name: str, labels: list[Any], options: dict[str, Any] | None = None) -> Task:
    task = make_task(name, options)
    task.fit(table(labels), COLUMNS)
    return task


def test_labels_are_ordered_and_restored_from_the_configuration() -> None:
    task = fitted("classification", ["10", 9, 2.0, "x", "9"])
    assert task.settings() == {"labels": ["2", "9", "10", "x"]}
    config = BertConfig(**task.model_config(), extra={CONFIG_KEY: task_entry(task)})
    again = task_from_config(json.loads(json.dumps(config.to_dict())))
    assert again.settings() == task.settings()
    assert config.to_dict()["id2label"] == {"0": "2", "1": "9", "2": "10", "3": "x"}
    with pytest.raises(ValueError, match="expected a model written by bert-fast finetune"):
        task_from_config({})


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("classification", ["a", "a"], "every row has the label 'a'; expected at least two classes"),
        ("classification", [], "the table is empty"),
        ("classification", ["a", None], "my.csv, row 2: no label in 'label'"),
        ("classification", ["a", float("nan")], "my.csv, row 2: no label"),
        ("classification", [["a"], ["b"]], "the task multi-label takes lists"),
        ("classification", list(range(60)), "60 different labels in 60 rows"),
        ("multi-label", ["a,b", "b , a"], "every row has the same labels (a, b)"),
        ("multi-label", ["", None], "no row has a label"),
        ("regression", ["1", "much"], "my.csv, row 2: 'label' holds 'much'; expected a number"),
        ("regression", ["1", "inf"], "holds 'inf'"),
        ("regression", [2, 2], "every row has the value 2.0"),
    ],
)
def test_invalid_training_rows_are_refused(name: str, labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fitted(name, labels)


@pytest.mark.parametrize("name", ["classification", "multi-label"])
def test_labels_unseen_in_training_are_listed_with_counts(name: str) -> None:
    task = fitted(name, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"unseen in training: 'x' \(2 rows\), 'y' \(1 rows\); expected a, b, c"):
        task.check(table(["a", "x", "y", "x"]), COLUMNS)
    assert task.check(table(["a", "b"]), COLUMNS) == ["my.csv has no row of c"]


def test_unknown_tasks_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"task is 'classify'; expected one of classification, multi-label"):
        make_task("classify")
    with pytest.raises(
        ValueError, match=r"multi-label has no option sep; expected among its options: pooling, separator, columns"
    ):
        make_task("multi-label", {"sep": ";"})


def test_examples_of_texts_and_pairs(tokenizer: Tokenizer) -> None:
    task = fitted("classification", ["no", "yes"])
    rows = Table({"text": ["a b c", "goods"], "pair": ["b", "c"], "label": ["yes", "no"]})
    single = task.encode(rows, COLUMNS, tokenizer, TextSettings(max_length=4), training=True)
    assert [(list(one.input_ids), one.target) for one in single] == [([2, 5, 6, 3], 1), ([2, 8, 10, 3], 0)]
    pair = task.encode(rows, {**COLUMNS, "text_pair": "pair"}, tokenizer, TextSettings(), training=True)
    assert list(pair[0].input_ids) == [2, 5, 6, 7, 3, 6, 3]
    assert list(pair[0].token_type_ids) == [0, 0, 0, 0, 0, 1, 1]
    left = task.encode(rows, COLUMNS, tokenizer, TextSettings(max_length=4, long="tail"), training=True)
    assert list(left[0].input_ids) == [2, 6, 7, 3]
    assert task.encode(rows, {"text": "text"}, tokenizer, TextSettings(), training=False)[0].target is None


def examples(targets: list[Any]) -> list[Example]:
    return [Example(row, [2, 5 + row % 3, 3], [0, 0, 0], target) for row, target in enumerate(targets)]


@pytest.mark.parametrize(
    ("name", "labels", "targets", "tensor"),
    [
        ("classification", ["a", "b", "c"], [0, 2, 1, 2], torch.tensor([0, 2, 1, 2])),
        ("multi-label", ["a,b", "c"], [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], torch.tensor([[1.0, 1, 0], [0, 0, 0]])),
        ("regression", [1, 2], [0.5, -2.0], torch.tensor([0.5, -2.0])),
    ],
)
def test_the_loss_equals_that_of_the_model(name: str, labels: Any, targets: Any, tensor: torch.Tensor) -> None:
    task = fitted(name, labels)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=11, **sizes, **task.model_config())).eval()
    batch = Batch.of(examples(targets))
    logits = task.forward(model, batch)
    expected = model(**batch.padded(), labels=tensor)
    # float32 through one layer, packed and padded: an eps of a loss of up to 2 is 2.4e-7, of the logits less.
    assert torch.allclose(logits, expected.logits, atol=1e-6)
    mean = task.loss(logits, batch.examples, ONE) / task.weight(batch.examples, ONE)
    assert torch.allclose(mean, expected.loss, atol=1e-6)


def test_packed_and_padded_models_agree() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    batch = Batch.of([Example(0, [2, 5, 6, 3], [0, 0, 1, 1]), Example(1, [2, 3], [0, 0])])
    model = transformers.BertForTokenClassification(settings).eval()
    with torch.no_grad():
        packed = run_model(model, batch)["logits"]
        alone = [
            model(torch.tensor([one.input_ids]), token_type_ids=torch.tensor([one.token_type_ids])).logits[0]
            for one in batch.examples
        ]
        choice = run_model(transformers.BertForMultipleChoice(settings).eval(), batch, num_choices=1)["logits"]
    # float32 in batches of other sizes through one layer: an eps of logits of up to 0.1 is 1e-8.
    assert torch.allclose(packed, torch.cat(alone), atol=1e-6)
    assert choice.shape == (2, 1)


def test_weighted_smoothed_and_focal_losses_by_hand() -> None:
    task = fitted("classification", ["a", "b"])
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    both = examples([0, 1])
    p = logits.softmax(-1)
    weighted = LossOptions(class_weights=torch.tensor([1.0, 3.0], dtype=torch.float64))
    expected = -p[0, 0].log() - 3 * p[1, 1].log()
    assert float(task.loss(logits, both, weighted)) == pytest.approx(float(expected))
    assert task.weight(both, weighted) == 4.0
    focal = -((1 - p[0, 0]) ** 2) * p[0, 0].log() - (1 - p[1, 1]) ** 2 * p[1, 1].log()
    assert float(task.loss(logits, both, LossOptions(focal_gamma=2.0))) == pytest.approx(float(focal))
    smooth = sum(-0.9 * p[row, row].log() - 0.05 * p[row].log().sum() for row in (0, 1))
    assert float(task.loss(logits, both, LossOptions(label_smoothing=0.1))) == pytest.approx(float(smooth))


def test_multi_label_weights_scale_positive_targets() -> None:
    task = fitted("multi-label", ["a", "b"])
    logits = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    weighted = LossOptions(class_weights=torch.tensor([5.0, 7.0], dtype=torch.float64))
    assert float(task.loss(logits, examples([[1.0, 0.0]]), weighted)) == pytest.approx(6 * np.log(2))


def test_multi_label_from_one_column_per_label() -> None:
    rows = Table({"text": ["x", "y", "z"], "toxic": [1, 0, 0], "insult": ["1", "0", "1"]}, "my.csv")
    task = make_task("multi-label", {"columns": ["toxic", "insult"], "threshold": 0.4})
    task.fit(rows, {"text": "text"})
    assert task.targets(rows, {"text": "text"}) == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"my.csv, row 1: 'toxic' holds '2'; expected 0 or 1"):
        task.check(rows.with_column("toxic", [2, 0, 0]), {"text": "text"})


def test_predictions_average_the_examples_of_a_row() -> None:
    task = fitted("classification", ["a", "b"])
    parts = [Example(0, [2, 3], [0, 0]), Example(0, [2, 3], [0, 0]), Example(1, [2, 3], [0, 0])]
    outputs = [np.array([4.0, 0.0]), np.array([0.0, 2.0]), np.array([0.0, 1.0])]
    rows = table(["a", "b"])
    predictions = task.decode(outputs, parts, rows, COLUMNS)
    assert [one["label"] for one in predictions] == ["a", "b"]
    assert predictions[0]["scores"]["a"] == pytest.approx(1 / (1 + np.exp(-1)))
    metrics = task.evaluate(predictions, rows, COLUMNS)
    assert metrics["accuracy"] == 1.0
    assert metrics["confusion_matrix"] == [[1, 0], [0, 1]]
    several = fitted("multi-label", ["a", "b,c"])
    predictions = several.decode([np.array([3.0, -3.0, 0.1])], [Example(0, [2, 3], [0, 0])], table(["a"]), COLUMNS)
    assert predictions[0]["labels"] == ["a", "c"]
    assert several.evaluate(predictions, table(["a,c"]), COLUMNS)["accuracy"] == 1.0
    number = fitted("regression", [1, 2])
    predictions = number.decode([np.array([1.5]), np.array([2.5])], examples([1, 2]), table([1, 2]), COLUMNS)
    assert number.evaluate(predictions, table([1, 2]), COLUMNS)["mae"] == 0.5


def test_equal_labels_of_other_types_are_one_class() -> None:
    task = fitted("classification", [0, 1, True, "1", "1.0", 0.0, False])
    assert task.settings() == {"labels": ["0", "1"]}
    rows = table(["1.0", 0, "true", np.int64(1)])
    assert task.check(rows, COLUMNS) == []
    assert task.targets(rows, COLUMNS) == [1, 0, 1, 1]  # type: ignore[attr-defined]
    words = fitted("classification", ["true", "false"])
    assert words.settings() == {"labels": ["false", "true"]}
    assert words.targets(table([True, False]), COLUMNS) == [1, 0]  # type: ignore[attr-defined]


def test_labels_that_may_mean_none_are_named() -> None:
    task = fitted("classification", ["a", "b", "-", "-"])
    assert task.check(table(["a", "b", "-"]), COLUMNS) == [
        "my.csv: the label '-' (1 rows) is a class; if it means no label, set no_label to ['-']"
    ]
    assert task.describe() == "3 labels: -, a, b"


@pytest.mark.parametrize(
    ("labels", "expected", "separator"),
    [
        (["a, b", "b", "", None], [["a", "b"], ["b"], [], []], ","),
        (["a|b c", "b c", "a"], [["a", "b c"], ["b c"], ["a"]], "|"),
        (["a; b", "a"], [["a", "b"], ["a"]], ";"),
        (["[a, b]", "[]", "[b]"], [["a", "b"], [], ["b"]], ","),
        (['["a", "b"]', "['b']", "['a' 'b']"], [["a", "b"], ["b"], ["a", "b"]], ","),
        ([["a", "b"], ("b",), {"a"}, np.array(["a"])], [["a", "b"], ["b"], ["a"], ["a"]], ","),
        ([[1, 2.0], ["1"], [True]], [["1", "2"], ["1"], ["1"]], ","),
        ([{"a": 1, "b": 0}, {"a": 0, "b": True}], [["a"], ["b"]], ","),
        (['{"a": 1, "b": false}', "{'a': 0, 'b': True}"], [["a"], ["b"]], ","),
        (["{'a', 'b'}", "('a',)", "{'b'}"], [["a", "b"], ["a"], ["b"]], ","),
        ([3, "2,3", float("nan")], [["3"], ["2", "3"], []], ","),
    ],
    ids=str,
)
def test_lists_of_labels(labels: list[Any], expected: list[list[str]], separator: str) -> None:
    rows = table(labels)
    task = fitted("multi-label", labels)
    names = task.settings()["labels"]
    targets = task.targets(rows, COLUMNS)  # type: ignore[attr-defined]
    found = [[name for name, mark in zip(names, row, strict=True) if mark] for row in targets]
    assert found == expected
    assert task.settings()["separator"] == separator
    again = make_task("multi-label")
    again.restore(json.loads(json.dumps(task.settings())))
    assert again.targets(rows, COLUMNS) == targets  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "labels",
    [
        [[0, 1, 1], [0, 0, 0], [1, 0, 0]],
        ["[0, 1, 1]", "[0 0 0]", "[1, 0, 0]"],
        [np.array([0.0, 1, 1]), [False] * 3, [1, 0, 0]],
    ],
    ids=["lists", "texts", "arrays"],
)  # fmt: skip
def test_lists_of_marks_are_one_per_label(labels: list[Any]) -> None:
    task = fitted("multi-label", labels)
    assert task.settings() == {"labels": ["0", "1", "2"], "separator": ",", "multi_hot": 3}
    assert task.targets(table(labels), COLUMNS) == [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]  # type: ignore[attr-defined]
    assert "lists of 3 times 0 or 1" in task.describe()
    with pytest.raises(ValueError, match=r"my.csv, row 1: the labels are \[0, 1\]; expected 3 of 0 and 1"):
        task.check(table([[0, 1]]), COLUMNS)
    with pytest.raises(ValueError, match=r"my.csv, row 1: the labels are 'a'"):
        task.check(table(["a"]), COLUMNS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a,b", "c|d"], r"my.csv, row 2: the labels are 'c|d', other rows have ','; set options.separator"),
        ([["a", None], ["b"]], "my.csv, row 1: a label is None"),
        ([[["a"]], ["b"]], "my.csv, row 1: a label is ['a']"),
        ([{"a": 0.7}, ["b"]], "my.csv, row 1: a label is {'a': 0.7}"),
    ],
    ids=["separators", "none", "nested", "scores"],
)
def test_cells_that_hold_no_labels_are_named(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fitted("multi-label", labels)


OPTIONS = [
    ("token-classification", {"invalid": "refus"}, "options.invalid is 'refus'; expected .*; did you mean 'refuse'?"),
    ("token-classification", {"scheme": "bioes"}, "options.scheme is 'bioes'; expected one of auto, iob1"),
    ("token-classification", {"overlap": -1}, "options.overlap is -1; expected 0 or more"),
    ("token-classification", {"overlap": "x"}, "options.overlap is 'x'; expected an integer"),
    ("token-classification", {"all_pieces": "maybe"}, "options.all_pieces is 'maybe'; expected true or false"),
    ("sentence-embedding", {"objective": "contrast"}, "did you mean 'contrastive'?"),
    ("sentence-embedding", {"poling": "mean"}, "has no option poling; .*did you mean 'pooling'?"),
    ("sentence-embedding", {"temperature": float("nan")}, "options.temperature is nan"),
    ("sentence-embedding", {"score_low": "inf"}, "options.score_low is inf"),
    ("question-answering", {"mismatched": "near"}, "options.mismatched is 'near'"),
    ("question-answering", {"by": "word"}, "did you mean 'words'?"),
    ("question-answering", {"n_best": 0.5}, "options.n_best is 0.5; expected an integer"),
    ("multiple-choice", {"columns": "a"}, "options.columns is 'a'; expected a list"),
    ("multiple-choice", {"keys": "from2"}, "did you mean 'from1'?"),
    ("classification", {"pooling": "avg"}, "options.pooling is 'avg'"),
    ("classification", {"pooling": None}, "options.pooling is None"),
    ("multi-label", {"threshold": True}, "options.threshold is True; expected a number"),
    ("multi-label", {"separator": ""}, "options.separator is empty"),
    ("regression", {"x": 1}, "regression has no option x"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "options", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options_that_are_unknown_or_of_another_type_are_refused(
    task: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message.replace("?", r"\?")):
        make_task(task, options)


def test_options_may_be_scalars_of_numpy_and_texts() -> None:
    options: Any = make_task("question-answering", {"n_best": np.int64(5), "null_threshold": "1.5"}).options
    assert (options.n_best, options.null_threshold) == (5, 1.5)
    options = make_task("token-classification", {"overlap": torch.tensor(3), "all_pieces": "true"}).options
    assert (options.overlap, options.all_pieces) == (3, True)
    options = make_task("sentence-embedding", {"temperature": np.float32(0.5), "margin": 1}).options
    assert (options.temperature, options.margin) == (0.5, 1)
    options = make_task("multi-label", {"columns": ("a", "b")}).options
    assert list(options.columns) == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long": "middle"}, "text.long is 'middle'; expected one of head"),
        ({"truncation": "longest"}, "text.truncation is 'longest'"),
        ({"max_length": "many"}, "text.max_length is 'many'; expected an integer"),
        ({"max_length": 3}, "text.max_length is 3; expected 4 or more"),
    ],
)
def test_settings_of_texts_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TextSettings(**settings)
    assert TextSettings(max_length=np.int64(64)).max_length == 64


def test_predictions_that_are_all_the_same_are_named() -> None:
    task = fitted("classification", ["a", "b"])
    rows = table(["a", "b"] * 6)
    same = [{"label": "a", "scores": {"a": 0.6, "b": 0.4}}] * 12
    assert task.warning(same, rows, COLUMNS) == "warning: all 12 rows of my.csv are predicted as 'a'"
    assert task.warning(same[:8], rows.select(range(8)), COLUMNS) == "", "few rows"
    assert task.warning(same, table(["a"] * 12), COLUMNS) == "", "all correct"
    other = [*same[:11], {"label": "b", "scores": {"a": 0.4, "b": 0.6}}]
    assert task.warning(other, rows, COLUMNS) == ""
    number = fitted("regression", [1, 2])
    assert "predicted as 1.5" in number.warning([{"value": 1.5000001}] * 12, table([1, 2] * 6), COLUMNS)
    several = fitted("multi-label", ["a", "b"])
    none = [{"labels": [], "scores": {"a": 0.1, "b": 0.2}}] * 12
    assert "predicted as having no label" in several.warning(none, table(["a", "b"] * 6), COLUMNS)
