"""Multiple choice: learning, the loss of transformers, varying numbers of choices, forms of labels."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bert_fast.tasks.io.columns import choose_columns
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.multiple_choice import MultipleChoice
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, Batch, Example, make_task, task_entry, task_from_config

TEXT = TextSettings(max_length=16)
ANIMALS, FOODS, FILLERS = ["cat", "dog"], ["rice", "soup"], ["red", "new"]


def rows(count: int, seed: int, choices: tuple[int, int] = (2, 4)) -> Table:
    """The food is the correct choice among animals."""
    generator = random.Random(seed)
    columns: dict[str, list[Any]] = {"text": [], "choices": [], "label": []}
    for _ in range(count):
        of_row = [
            f"{generator.choice(FILLERS)} {generator.choice(ANIMALS)}" for _ in range(generator.randint(*choices))
        ]
        place = generator.randrange(len(of_row))
        of_row[place] = f"{generator.choice(FILLERS)} {generator.choice(FOODS)}"
        columns["text"].append("you eat")
        columns["choices"].append(of_row)
        columns["label"].append(place)
    return Table(columns, "made up")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of(" ".join(["you", "eat", *ANIMALS, *FOODS, *FILLERS]))


def fitted(table: Table, **options: Any) -> tuple[MultipleChoice, dict[str, str]]:
    task = make_task("multiple-choice", options)
    assert isinstance(task, MultipleChoice)
    columns = choose_columns(table, task.roles)
    task.fit(table, columns)
    return task, columns


def test_a_model_learns_to_choose(tokenizer: Tokenizer, learn: Callable[..., Any], predict: Callable[..., Any]) -> None:
    train, test = rows(120, 0), rows(40, 1)
    task, columns = fitted(train)
    assert task.check(test, columns) == []
    examples = task.encode(train, columns, tokenizer, TEXT, training=True)
    model = learn(task, tokenizer, examples, epochs=5, rows=8)
    predictions = predict(task, model, tokenizer, test, columns, TEXT)
    # Ten of ten seeds of the weights reach 1.0; chance is about 0.36.
    assert task.evaluate(predictions, test, columns)["accuracy"] > 0.9
    for item, choices in zip(predictions, test["choices"], strict=True):
        assert item["chosen"] == choices[item["choice"]]
        assert item["choice"] == int(np.argmax(item["probabilities"]))
        assert len(item["probabilities"]) == len(choices)
        assert sum(item["probabilities"]) == pytest.approx(1.0)


def test_the_loss_equals_that_of_transformers(
    tokenizer: Tokenizer, models_for: Callable[..., Any], mean_loss: Callable[..., Any]
) -> None:
    table = rows(7, 2, (3, 3))
    task, columns = fitted(table)
    examples = task.encode(table, columns, tokenizer, TEXT, training=True)
    ours, theirs = models_for(task, tokenizer)
    inputs = {name: x.view(7, 3, -1) for name, x in Batch.of(examples).padded().items()}
    expected = theirs(**inputs, labels=torch.tensor(table["label"])).loss
    # float64 losses (eps 2.2e-16) of two layers: the error is one eps.
    torch.testing.assert_close(mean_loss(task, ours, examples), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(mean_loss(task, theirs, examples), expected, rtol=1e-9, atol=0)


def test_rows_with_different_numbers_of_choices_have_equal_weight(
    tokenizer: Tokenizer, models_for: Callable[..., Any], mean_loss: Callable[..., Any]
) -> None:
    table = rows(9, 3)
    assert len({len(of_row) for of_row in table["choices"]}) > 1
    task, columns = fitted(table)
    examples = task.encode(table, columns, tokenizer, TEXT, training=True)
    ours, _ = models_for(task, tokenizer)
    alone = [mean_loss(task, ours, [x for x in examples if x.row == row]) for row in range(9)]
    # float64 sums (eps 2.2e-16) in batches of other sizes: the error is one eps.
    torch.testing.assert_close(mean_loss(task, ours, examples), torch.stack(alone).mean(), rtol=1e-9, atol=0)
    twice = [x for x in examples if x.row == 0] * 2
    torch.testing.assert_close(mean_loss(task, ours, twice), alone[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2, 1], [0, 2, 1]),
        (["1", "3", "2"], [0, 2, 1]),
        ([1.0, 3.0, 1.0], [0, 2, 0]),
        (["A", "c", "B"], [0, 2, 1]),
        (["red", "blue 5", "green"], [0, 2, 1]),
    ],
    ids=["from 0", "from 1", "floats", "letters", "texts"],
)
def test_forms_of_labels(labels: list[Any], expected: list[int]) -> None:
    table = Table({"context": ["t"] * 3, "choices": [["red", "green", "blue 5"]] * 3, "answer": labels})
    task, columns = fitted(table)
    assert task.targets(table, columns) == expected
    again = task_from_config({CONFIG_KEY: task_entry(task)})
    assert again.settings() == task.settings()


def test_one_column_per_choice_and_a_question(tokenizer: Tokenizer) -> None:
    table = Table(
        {"context": ["you"], "question": ["eat"], "ending0": ["rice"], "ending1": ["cat"], "label": ["0"], "id": [5]}
    )
    task, columns = fitted(table)
    assert columns == {"text": "context", "question": "question", "label": "label"}
    assert task.choices(table, columns) == [["rice", "cat"]]
    examples = task.encode(table, columns, tokenizer, TEXT, training=True)
    tokens = [[tokenizer.id_to_token(i) for i in example.input_ids] for example in examples]
    assert tokens == [["[CLS]", "you", "eat", "[SEP]", choice, "[SEP]"] for choice in ("rice", "cat")]
    assert examples[1].token_type_ids == [0, 0, 0, 0, 1, 1]
    named, _ = fitted(table, columns=["ending1", "ending0"])
    assert named.choices(table, columns) == [["cat", "rice"]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"choices": [["a", "b"]], "label": [3]}, "f, row 1: the label is 3; expected a number from 0 to 1"),
        ({"choices": [["a", "b"]], "label": ["c d"]}, "the label is 'c d'; .* a letter from A to B"),
        ({"choices": [["a", "b"]], "label": [None]}, "the label is None"),
        ({"choices": [["a", "a"]], "label": ["a a"]}, "the label is 'a a'"),
        ({"choices": [["a"]], "label": [0]}, "f, row 1: 1 choices; expected at least two"),
        ({"choices": ["ab"], "label": [0]}, "the choices are 'ab'; expected a list of texts"),
        ({"label": [0]}, "f: no column of choices among text, label"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_invalid_rows(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(Table({"text": ["t"], **columns}, "f"))


def test_the_highest_score_is_chosen() -> None:
    table = Table({"text": ["t"] * 2, "choices": [["a", "b"], ["c", "d", "e"]], "label": [1, 1]})
    task, columns = fitted(table, keys="from0")
    scores = [np.float32(x) for x in (0.0, 2.0, 0.0, 1.0, 3.0)]
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    examples = [Example(row, [0], [0], None, choice) for row, choice in places]
    predictions = task.decode(scores, examples, table, columns)  # type: ignore[arg-type]
    assert [item["chosen"] for item in predictions] == ["b", "e"]
    assert predictions[0]["probabilities"][1] == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert task.evaluate(predictions, table, columns) == {"accuracy": 0.5, "most_frequent_accuracy": 1.0}


FOUR = ["w", "x", "y", "z"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # ARC: letters or numbers, row by row.
        ({"choices": [{"text": FOUR, "label": list(x)} for x in ("ABCD", "1234")], "answerKey": ["C", "4"]}, [2, 3]),
        # CommonsenseQA.
        ({"choices": [[{"label": x, "text": x.lower()} for x in "ABCD"]] * 2, "answerKey": ["d", "A"]}, [3, 0]),
        # MedQA.
        ({"options": [dict(zip("ABCD", FOUR, strict=True))] * 2, "answer": ["x", "z"]}, [1, 3]),
        # RACE, SWAG, HellaSwag, MMLU, PIQA, Winogrande.
        ({"options": [FOUR] * 2, "answer": ["D", "a"]}, [3, 0]),
        ({**{f"ending{i}": [x] * 2 for i, x in enumerate(FOUR)}, "label": ["3", "0"]}, [3, 0]),
        ({"endings": [FOUR] * 2, "label": ["0", "3"]}, [0, 3]),
        ({**{x: [y] * 2 for x, y in zip("ABCD", FOUR, strict=True)}, "answer": ["(B)", "D."]}, [1, 3]),
        ({"sol1": ["w"] * 2, "sol2": ["x"] * 2, "label": [0, 1]}, [0, 1]),
        ({"option1": ["w"] * 2, "option2": ["x"] * 2, "answer": ["2", "1"]}, [1, 0]),
        ({"option_a": ["w"] * 2, "option_b": ["x"] * 2, "answer": ["option_b", "option_a"]}, [1, 0]),
        # Lists that a csv file holds as text, and numbers as choices.
        ({"choices": ["['w' 'x y']", '["w", "x"]'], "label": ["1", "0"]}, [1, 0]),
        ({"choices": [[3, 4, 5], [7, 8, 9.0]], "label": ["5", 9]}, [2, 2]),
        ({"choices": [["3", "4", "5"], ["7", "8", "9"]], "label": [0, "2.0"]}, [0, 2]),
        ({"choices": [["1", "2", "3", "4"]] * 2, "label": [1, "4"]}, [0, 3]),
        ({"choices": [["b", "a", "c"]] * 2, "label": ["the b", "A"]}, None),
        ({"choices": np.array([["w", "x"], ["y", "z"]]).tolist(), "label": list(np.array([1, 0]))}, [1, 0]),
    ],
)  # fmt: skip
def test_keys_of_public_data(columns: dict[str, list[Any]], expected: list[int] | None) -> None:
    table = Table({"text": ["t"] * 2, **columns}, "f")
    if expected is None:
        with pytest.raises(ValueError, match="f, row 1: the label is 'the b'"):
            fitted(table)
        return
    task, chosen = fitted(table)
    assert task.targets(table, chosen) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"choices": [["w", "x", "y"]] * 2, "label": [1, 2]}, r"row 1: the label 1 is 'x' with .* from0, 'w' with"),
        ({"choices": [["0", "2", "1"]] * 2, "label": [0, 1]}, r"row 2: the label 1 is '2' with .* from0, '1' with"),
        ({"choices": [["b", "a"]] * 2, "label": ["a", "b"]}, r"row 1: the label 'a' is 'b' with .*, 'a' with texts"),
        ({"choices": [{"text": FOUR, "label": list("ABCD")}], "answerKey": ["E"]}, "is 'E'; expected one of A, B"),
        ({"choices": [FOUR], "label": ["9" * 5000]}, "f, row 1: the label is"),
        ({"choices": [FOUR], "label": [[1]]}, r"f, row 1: the label is \[1\]"),
        ({"choices": [["w", None]], "label": [0]}, "f, row 1: the choices are"),
        ({"choices": [{"A": "w", "B": ["x"]}], "label": [0]}, "f, row 1: the choices are"),
    ],
    ids=["from0-from1", "numbers", "letters", "own", "digits", "list", "none", "nested"],
)  # fmt: skip
def test_ambiguous_and_wrong_keys_are_refused_with_their_row(columns: dict[str, list[Any]], message: str) -> None:
    table = Table({"text": ["t"] * len(next(iter(columns.values()))), **columns}, "f")
    with pytest.raises(ValueError, match=message):
        fitted(table)
    if "set options.keys" in message:
        task, chosen = fitted(table, keys="from0")
        assert len(task.targets(table, chosen)) == 2


def test_the_files_of_arc_are_read(tmp_path: Path) -> None:
    choices = [{"text": text, "label": label} for text, label in zip(FOUR, "ABCD", strict=True)]
    row = {"id": "q1", "question": {"stem": "Which?", "choices": choices}, "answerKey": "C"}
    (tmp_path / "arc.jsonl").write_text(json.dumps(row) + "\n")
    task = make_task("multiple-choice")
    table = task.read(tmp_path / "arc.jsonl")
    columns = choose_columns(table, task.roles)
    assert columns == {"text": "question", "choices": "choices", "label": "answerKey"}
    task.fit(table, columns)
    assert task.targets(table, columns) == [2]  # type: ignore[attr-defined]


def test_models_of_before_the_option_keys_are_restored() -> None:
    task = make_task("multiple-choice")
    for first, keys in ((0, "from0"), (1, "from1")):
        task.restore({"first": first})
        assert task.settings() == {"keys": keys}
