"""Token classification: learning, the loss of transformers, windows, schemes, entities by words and characters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bert_fast.tasks.io.columns import choose_columns
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.io.tag_schemes import convert_tags
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, Batch, Example, LossOptions, make_task, task_entry, task_from_config
from bert_fast.tasks.token_classification import TokenClassification, entity_metrics

FILLERS = ["the", "met", "in", "walking", "saw"]
ENTITIES = {"ada babbage": "PER", "paris": "LOC", "rome": "LOC"}
PIECES = "the met in walk ##ing saw ada bab ##bage paris rome"
COLUMNS = {"tokens": "tokens", "tags": "tags"}
TEXT = TextSettings(max_length=12)


def sentences(count: int, seed: int, scheme: str = "iob2") -> Table:
    """Random words and entities, some of them adjacent."""
    generator = random.Random(seed)
    tokens, tags = [], []
    for _ in range(count):
        words: list[str] = []
        row: list[str] = []
        for unit in generator.choices([*FILLERS, *ENTITIES], k=generator.randint(1, 14)):
            words += unit.split()
            kind = ENTITIES.get(unit)
            row += [f"{'I' if number else 'B'}-{kind}" if kind else "O" for number in range(len(unit.split()))]
        tokens.append(words)
        tags.append(convert_tags(row, scheme))
    return Table({"tokens": tokens, "tags": tags}, "made up")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of(PIECES)


def fitted(table: Table, **options: Any) -> TokenClassification:
    task = make_task("token-classification", options)
    assert isinstance(task, TokenClassification)
    task.fit(table, COLUMNS)
    return task


@pytest.mark.parametrize(("scheme", "learnt"), [("iob1", "iob2"), ("iob2", "iobes")], ids=lambda name: name)
def test_a_model_learns_entities(
    scheme: str, learnt: str, tokenizer: Tokenizer, learn: Callable[..., Any], predict: Callable[..., Any]
) -> None:
    train, test = sentences(120, 0, scheme), sentences(30, 1, scheme)
    task = fitted(train, learnt_scheme=learnt, overlap=4)
    assert task.scheme == scheme
    assert task.check(test, COLUMNS) == []
    examples = task.encode(train, COLUMNS, tokenizer, TEXT, training=True)
    assert len(examples) > 120, "long sentences have several windows"
    model = learn(task, tokenizer, examples, epochs=8, rows=8, lr=5e-3)
    predictions = predict(task, model, tokenizer, test, COLUMNS, TEXT)
    metrics = task.evaluate(predictions, test, COLUMNS)
    # Ten of ten seeds of the weights reach 1.0; a model that tags every word O has an F1 of 0.
    assert metrics["f1"] > 0.95
    assert metrics["accuracy"] > 0.95
    right = sum(item["tags"] == tags for item, tags in zip(predictions, test["tags"], strict=True))
    assert right >= 27, "of 30, in the scheme of the data"
    assert task.main_metric == "f1"
    json.dumps(predictions)


@pytest.mark.parametrize("all_pieces", [False, True], ids=["first pieces", "all pieces"])
def test_the_loss_equals_that_of_transformers(
    all_pieces: bool, tokenizer: Tokenizer, models_for: Callable[..., Any], mean_loss: Callable[..., Any]
) -> None:
    table = sentences(9, 2)
    task = fitted(table, all_pieces=all_pieces)
    examples = task.encode(table, COLUMNS, tokenizer, TextSettings(max_length=48), training=True)
    ours, theirs = models_for(task, tokenizer)
    batch = Batch.of(examples)
    inputs = batch.padded()
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, example in zip(labels, examples, strict=True):
        row[: len(example.target)] = torch.tensor(example.target)
    expected = theirs(**inputs, labels=labels).loss
    # float64 losses (eps 2.2e-16) of two layers, here and below: the error is one eps.
    torch.testing.assert_close(mean_loss(task, ours, examples), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(mean_loss(task, theirs, examples), expected, rtol=1e-9, atol=0)
    weights = torch.rand(len(task.labels), dtype=torch.float64) + 0.5
    weighted = torch.nn.functional.cross_entropy(theirs(**inputs).logits.flatten(0, 1), labels.flatten(), weights)
    loss = mean_loss(task, ours, examples, LossOptions(class_weights=weights))
    torch.testing.assert_close(loss, weighted, rtol=1e-9, atol=0)


def test_every_word_is_trained_on_and_predicted_once(tokenizer: Tokenizer) -> None:
    table = sentences(40, 3)
    task = fitted(table, overlap=5)
    examples = task.encode(table, COLUMNS, tokenizer, TEXT, training=False)
    assert max(len(example.input_ids) for example in examples) == TEXT.max_length
    assert task.weight(examples, LossOptions()) == sum(map(len, table["tokens"]))
    outputs = []
    for example in examples:
        # An oracle that is correct where the example has a target and wrong elsewhere.
        scores = np.full((len(example.input_ids), len(task.labels)), 0.0)
        for place, label in enumerate(example.target):
            scores[place, label if label >= 0 else 1] = 9.0
        outputs.append(scores)
    predictions = task.decode(outputs, examples, table, COLUMNS)
    assert [item["tags"] for item in predictions] == table["tags"]
    assert task.class_counts(examples)[0] == sum(tags.count("O") for tags in table["tags"])


def oracle(task: TokenClassification, examples: list[Example]) -> list[Any]:
    eye = np.eye(len(task.labels)) * 9
    return [np.stack([eye[max(label, 0)] for label in example.target]) for example in examples]


def test_texts_with_entities_by_characters(tokenizer_of: Callable[..., Tokenizer]) -> None:
    texts = ["Ada Lovelace met 李雷 in Zu\u0308rich.", "the\u200b \u200b man", ""]
    spans = [[(0, 12, "PER"), (17, 19, "PER"), (23, 31, "LOC")], [], []]
    entities = [[{"start": a, "end": b, "label": kind} for a, b, kind in row] for row in spans]
    table = Table({"text": texts, "entities": entities})
    task = make_task("token-classification")
    columns = choose_columns(table, task.roles)
    assert columns == {"tokens": "text", "tags": "entities"}
    task.fit(table, columns)
    examples = task.encode(table, columns, tokenizer_of("ada love ##lace met in zu ##rich"), TEXT, training=True)
    predictions = task.decode(oracle(task, examples), examples, table, columns)  # type: ignore[arg-type]
    predicted = [[(item["start"], item["end"], item["kind"]) for item in row["entities"]] for row in predictions]
    assert predicted == spans
    assert [item["text"] for item in predictions[0]["entities"]] == ["Ada Lovelace", "李雷", "Zu\u0308rich."]
    assert predictions[1]["tags"] == ["O", "O", "O"], "a word of removed characters is outside"
    assert predictions[2] == {"tags": [], "probabilities": [], "entities": []}
    assert task.evaluate(predictions, table, columns)["f1"] == 1.0


def test_plain_tags(tokenizer: Tokenizer, learn: Callable[..., Any], predict: Callable[..., Any]) -> None:
    kinds = {"the": "DET", "in": "ADP"}
    rows = sentences(60, 4)["tokens"]
    table = Table({"tokens": rows, "pos": [[kinds.get(word, "X") for word in row] for row in rows]})
    columns = choose_columns(table, TokenClassification.roles)
    task = make_task("token-classification")
    task.fit(table, columns)
    assert task.settings() == {"labels": ["ADP", "DET", "X"], "scheme": "none", "fallback": "X"}
    model = learn(task, tokenizer, task.encode(table, columns, tokenizer, TEXT, training=True), epochs=5, lr=5e-3)
    predictions = predict(task, model, tokenizer, table, columns, TEXT)
    # Ten of ten seeds reach 1.0; the most frequent tag alone has 0.77.
    assert task.evaluate(predictions, table, columns)["accuracy"] > 0.95
    assert task.main_metric == "accuracy"


def test_entity_metrics_by_hand() -> None:
    """Two of three predicted entities are correct, of four true ones; the third lacks a word."""
    true = [["B-P", "I-P", "O", "B-L"], ["B-P", "O", "B-L", "I-L"]]
    predicted = [["B-P", "I-P", "O", "B-L"], ["O", "O", "B-L", "O"]]
    metrics = entity_metrics(true, predicted)
    assert metrics["precision"] == pytest.approx(2 / 3)
    assert metrics["recall"] == pytest.approx(2 / 4)
    assert metrics["f1"] == pytest.approx(4 / 7)
    assert metrics["accuracy"] == pytest.approx(6 / 8)
    assert metrics["per_class"]["P"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert metrics["per_class"]["L"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert entity_metrics([["O"]], [["O"]])["f1"] == 0.0


def test_a_task_is_restored_from_the_configuration() -> None:
    table = sentences(20, 5, "iobes")
    task = fitted(table, learnt_scheme="iobes", overlap=7)
    again = task_from_config(json.loads(json.dumps({CONFIG_KEY: task_entry(task)})))
    assert isinstance(again, TokenClassification)
    assert (again.labels, again.scheme, again.options) == (task.labels, task.scheme, task.options)
    assert again.model_config()["id2label"][0] == "O"
    assert again.main_metric == "f1"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"tokens": [["a", "b"]], "tags": [["O"]]}, {}, "line 7: 1 tags; expected 2, one per word"),
        ({"tokens": [["a"]], "tags": [["O"]]}, {}, "every word is tagged O"),
        ({"tokens": [["a"]], "tags": [["X"]]}, {}, "every word has the tag 'X'"),
        ({"tokens": [[]], "tags": [[]]}, {}, "no row has tagged words"),
        ({"tokens": [7], "tags": [["O"]]}, {}, "line 7: 'tokens' holds 7; expected a text or a list of words"),
        ({"tokens": [["a"]], "tags": [None]}, {}, "line 7: 'tags' holds None"),
        (
            {"tokens": [["a"]], "tags": [["N"]]},
            {"scheme": "iob2"},
            "line 7, word 1: 'N' is not an entity tag.*scheme to none",
        ),
        (
            {"tokens": [["a", "b"]], "tags": [["O", "I-P"]]},
            {"scheme": "iob2", "invalid": "refuse"},
            "line 7, word 2: I-P does not continue an entity P in IOB2",
        ),
        (
            {"tokens": ["ab cd"], "tags": [[{"start": 1, "end": 2, "label": "P"}]]},
            {},
            "line 7: Entity.* does not start and end at word boundaries",
        ),
        ({"tokens": ["ab"], "tags": [[{"start": 1, "label": "P"}]]}, {}, "line 7: .*expected start, end and label"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_invalid_rows(columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(Table(columns, "file", [7], "line"), **options)


def test_rows_that_do_not_match_the_training_rows() -> None:
    task = fitted(sentences(20, 6))
    other = Table({"tokens": [["a", "b"]], "tags": [["B-ORG", "I-ORG"]]}, "dev.conll")
    with pytest.raises(
        ValueError, match=r"dev.conll: labels unseen in training: 'B-ORG' \(1 rows\), 'I-ORG' \(1 rows\)"
    ):
        task.check(other, COLUMNS)
    repaired = Table({"tokens": [["a", "b"]], "tags": [["O", "I-PER"]]}, "dev.conll")
    messages = task.check(repaired, COLUMNS)
    assert "1 rows have tags that IOB2 forbids" in messages[0]
    assert "dev.conll, row 1, word 2: I-PER does not continue an entity PER" in messages[0]


@pytest.mark.parametrize(
    ("written", "scheme", "form"),
    [
        (["B-PER", "L-PER", "O", "U-LOC", "B-PER", "I-PER", "L-PER"], "bilou", "prefix"),
        (["B-PER", "E-PER", "O", "S-LOC", "B-PER", "M-PER", "E-PER"], "bmes", "prefix"),
        (["PER-B", "PER-I", "O", "LOC-B", "PER-B", "PER-I", "PER-I"], "iob2", "suffix"),
        (["b-PER", "i-PER", "o", "b-LOC", "b-PER", "i-PER", "i-PER"], "iob2", "prefix"),
        (["B_PER", "I_PER", "O", "B_LOC", "B_PER", "I_PER", "I_PER"], "iob2", "prefix"),
    ],
    ids=["BILOU", "BMES", "suffix", "lower case", "underscore"],
)
def test_every_writing_of_tags_is_learnt_as_entities(written: list[str], scheme: str, form: str) -> None:
    """A perfect model predicts the entities that the tags mean, in tags of the data's scheme."""
    table = Table({"tokens": [list("abcdefg")], "tags": [written]}, "f")
    task = fitted(table)
    assert (task.scheme, task.settings()["form"]) == (scheme, form)
    assert scheme.upper() in task.describe()
    assert task.labels == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    examples = [Example(0, [1] * 7, [0] * 7, [3, 4, 0, 1, 3, 4, 4], [(word, word) for word in range(7)])]
    predictions = task.decode(oracle(task, examples), examples, table, COLUMNS)
    entities = [(item["kind"], item["start"], item["end"]) for item in predictions[0]["entities"]]
    assert entities == [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 7)]
    assert predictions[0]["tags"] == [
        tag.replace("_", "-").replace("o", "O").replace("b-", "B-").replace("i-", "I-") for tag in written
    ]
    metrics = task.evaluate(predictions, table, COLUMNS)
    assert (metrics["f1"], metrics["scheme"]) == (1.0, scheme)
    assert task.errors(predictions, table, COLUMNS) == [0.0]
    again = task_from_config(json.loads(json.dumps({CONFIG_KEY: task_entry(task)})))
    assert again.evaluate(predictions, table, COLUMNS)["f1"] == 1.0


def test_tables_may_write_their_tags_in_different_forms() -> None:
    table = Table({"tokens": [["a", "b"]], "tags": [["PER-B", "PER-I"]]}, "f")
    task = fitted(table)
    other = Table({"tokens": [["a", "b"]], "tags": [["B-PER", "L-PER"]]}, "g")
    assert task.evaluate([{"tags": ["PER-B", "PER-I"]}], other, COLUMNS)["f1"] == 1.0


def test_one_stray_tag_does_not_make_a_corpus_plain() -> None:
    table = sentences(50, 7)
    table = Table({name: [*table[name], row] for name, row in (("tokens", ["a", "b"]), ("tags", ["O", "PERSON"]))}, "f")
    with pytest.raises(
        ValueError, match=r"f, row 51, word 2: 'PERSON' is not an entity tag, as others are, such as 'B-"
    ):
        fitted(table)
    assert fitted(table, scheme="none").describe().startswith("plain tags: ")
    with pytest.raises(ValueError, match=r"f, row 51, word 2: 'PERSON' is not an entity tag such as B-PER, or O"):
        fitted(table, scheme="iob2")


@pytest.mark.parametrize(
    "tags", ["O B-X I-X", "O,B-X,I-X", "['O', 'B-X', 'I-X']", '["O", "B-X", "I-X"]', "['O' 'B-X' 'I-X']"]
)
def test_tags_and_words_that_a_csv_file_holds_as_text(tags: str) -> None:
    task = fitted(Table({"tokens": ["a b c"], "tags": [tags]}, "f"))
    assert task.labels == ["O", "B-X", "I-X"]
    table = Table({"tokens": ["['a' 'b' 'c d']"], "tags": [tags]}, "f")
    assert fitted(table).sentences(table, COLUMNS)[0].words == ["a", "b", "c d"]


@pytest.mark.parametrize("tag", [None, float("nan"), "", ["O"], {"a": 1}], ids=str)
def test_tags_that_are_none_are_named(tag: Any) -> None:
    with pytest.raises(ValueError, match=r"f, row 2, word 2: the tag is "):
        fitted(Table({"tokens": [["a"], ["b", "c"]], "tags": [["O"], ["B-X", tag]]}, "f"))


def test_a_model_that_tags_nothing_is_named() -> None:
    table = sentences(20, 8)
    task = fitted(table)
    predictions = [{"tags": ["O"] * len(words)} for words in table["tokens"]]
    assert "20 rows of made up are predicted as 'O' at every word" in task.warning(predictions, table, COLUMNS)
    assert task.warning([{"tags": tags} for tags in table["tags"]], table, COLUMNS) == ""


def test_tags_before_words_are_refused() -> None:
    task = make_task("token-classification")
    table = Table({"tokens": [["B-Dish", "O"], ["O", "O", "B-Price"]], "tags": [["pizza", "is"], ["it", "is", "low"]]})
    with pytest.raises(ValueError, match=r"the words are entity tags, such as 'B-Dish'; .*columns.tokens"):
        task.fit(table, {"tokens": "tokens", "tags": "tags"})
    plain = Table({"tokens": [["E-mail", "O", "x", "y"]], "tags": [["NN", "UH", "SYM", "SYM"]]})
    task.fit(plain, {"tokens": "tokens", "tags": "tags"})
