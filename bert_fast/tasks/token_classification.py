"""Token classification: named entities (IOB1, IOB2, IOBES), or plain tags such as parts of speech."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_fast.tasks.alignment import (
    Span,
    first_pieces,
    piece_labels,
    special_tokens_of,
    split_words,
    windows,
    word_pieces,
)
from bert_fast.tasks.classification import class_loss, label_name, label_order, softmax, unseen_labels_message
from bert_fast.tasks.io import tag_schemes
from bert_fast.tasks.io.columns import Role
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Columns, Example, LossOptions, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
IGNORED = -100
PLAIN = "none"

TOKENS = Role("tokens", ("tokens", "words", "text", "sentence", "sentences", "content"))
TAGS = Role(
    "tags",
    ("tags", "ner_tags", "labels", "label", "entities", "ner", "pos_tags", "upos", "pos", "spans", "chunk_tags"),
    target=True,
)


@dataclass(frozen=True)
class TokenClassificationOptions:
    """Options of the task token-classification.

    Args:
        scheme: the tag scheme of the data: iob1, iob2, iobes, or none for plain tags; auto detects it.
        learnt_scheme: the tag scheme of the model's labels; predictions use that of the data.
        invalid: what happens to tags that the scheme forbids: repair decodes them as conlleval and seqeval do, refuse
            raises an error.
        all_pieces: train on every piece of a word, not only the first.
        overlap: pieces that consecutive windows of a long text share.
    """

    scheme: Literal["auto", "iob1", "iob2", "iobes", "none"] = "auto"
    learnt_scheme: Literal["iob1", "iob2", "iobes"] = "iob2"
    invalid: Literal["repair", "refuse"] = "repair"
    all_pieces: bool = False
    overlap: int = 32

    def __post_init__(self) -> None:
        if self.overlap < 0:
            raise ValueError(f"overlap is {self.overlap}; expected 0 or more")


class Sentence(NamedTuple):
    """The words of a row and their character ranges; spans is None if the row is a list of words."""

    words: list[str]
    spans: list[Span] | None


class TokenClassification(Task):
    """Assigns a tag to every word. The words are listed in the row, or found in a text by `split_words`.

    Long texts are split into windows; each word is trained on and predicted once, in the window with most context.
    A word that the tokenizer removes entirely (a zero-width space) is predicted as outside.
    """

    name = "token-classification"
    model_class = "BertForTokenClassification"
    roles = (TOKENS, TAGS)
    options_class = TokenClassificationOptions
    text_roles = ()  # a sentence without words has no tags and no effect
    main_metric = "f1"
    scheme: str  # of the data, "none" for plain tags
    labels: list[str]  # of the model
    fallback: str  # the tag of words without pieces

    def fit(self, table: Table, columns: Columns) -> None:
        tags = self._raw_tags(table, columns)
        if not any(tags):
            raise ValueError(f"{table.source}: no row has tagged words; expected at least one")
        self.scheme = self.options.scheme
        if self.scheme == "auto":
            self.scheme = tag_schemes.guess_scheme(tags) or PLAIN
        counts = Counter(tag for row in self._model_tags(table, tags) for tag in row)
        if self.scheme == PLAIN:
            self.labels = label_order(list(counts))
            self.fallback = counts.most_common(1)[0][0]
            if len(self.labels) < 2:
                raise ValueError(
                    f"{table.source}: every word has the tag {self.labels[0]!r}; expected at least two tags"
                )
        else:
            kinds = sorted({tag_schemes.split_tag(tag)[1] for tag in counts} - {""})
            if not kinds:
                raise ValueError(f"{table.source}: every word is tagged O; expected at least one entity")
            prefixes = "BIES" if self.options.learnt_scheme == "iobes" else "BI"
            self.labels = [tag_schemes.OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in prefixes)]
            self.fallback = tag_schemes.OUTSIDE
        self._choose_metric()

    def _choose_metric(self) -> None:
        self.main_metric = "accuracy" if self.scheme == PLAIN else "f1"

    def check(self, table: Table, columns: Columns) -> list[str]:
        raw = self._raw_tags(table, columns)
        unseen: Counter[str] = Counter()
        for tags in self._model_tags(table, raw):
            unseen.update({tag for tag in tags if tag not in self.labels})
        if unseen:
            raise ValueError(unseen_labels_message(table, unseen, self.labels))
        if self.scheme == PLAIN:
            return []
        invalid = [row for row, tags in enumerate(raw) if tag_schemes.violations(tags, self.scheme)]
        if not invalid:
            return []
        first = tag_schemes.violations(raw[invalid[0]], self.scheme)[0]
        return [
            f"{table.source}: {len(invalid)} rows have tags that {self.scheme.upper()} forbids, decoded as by conlleval"
            f", such as {table.where(invalid[0])}, word {first.word + 1}: {first.text}"
        ]

    def settings(self) -> dict[str, Any]:
        return {"labels": self.labels, "scheme": self.scheme, "fallback": self.fallback}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.labels, self.scheme = list(settings["labels"]), settings["scheme"]
        self.fallback = settings["fallback"]
        self._choose_metric()

    def model_config(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
        }

    def sentences(self, table: Table, columns: Columns) -> list[Sentence]:
        """The words of every row.

        Raises:
            ValueError: a row is neither a string nor a list of strings.
        """
        sentences = []
        for row, value in enumerate(table[columns["tokens"]]):
            if isinstance(value, str):
                spans = split_words(value)
                sentences.append(Sentence([value[start:end] for start, end in spans], spans))
            elif isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
                sentences.append(Sentence(list(value), None))
            else:
                raise ValueError(
                    f"{table.where(row)}: {columns['tokens']!r} holds {value!r}; expected a text or a list of words"
                )
        return sentences

    def _raw_tags(self, table: Table, columns: Columns) -> list[list[str]]:
        """The tags of every row in the scheme of the data; entities by characters become IOB2."""
        rows = []
        for row, (sentence, value) in enumerate(
            zip(self.sentences(table, columns), table[columns["tags"]], strict=True)
        ):
            if isinstance(value, str):
                value = value.split()
            if value is None or not isinstance(value, (list, tuple)):
                raise ValueError(f"{table.where(row)}: {columns['tags']!r} holds {value!r}; expected a list of tags")
            by_characters = sentence.spans is not None and all(isinstance(item, Mapping) for item in value)
            if by_characters:
                assert sentence.spans is not None
                try:
                    entities = [_entity(item) for item in value]
                    rows.append(tag_schemes.char_entities_to_tags(entities, sentence.spans, "iob2"))
                except ValueError as error:
                    raise ValueError(f"{table.where(row)}: {error}") from error
                continue
            tags = [label_name(tag) for tag in value]
            if len(tags) != len(sentence.words):
                raise ValueError(f"{table.where(row)}: {len(tags)} tags; expected {len(sentence.words)}, one per word")
            rows.append(tags)
        return rows

    def _model_tags(self, table: Table, raw: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tags of every row in the scheme of the model's labels."""
        if self.scheme == PLAIN:
            return [list(tags) for tags in raw]
        rows = []
        for row, tags in enumerate(raw):
            try:
                violations = tag_schemes.violations(tags, self.scheme) if self.options.invalid == "refuse" else []
                rows.append(tag_schemes.convert_tags(tags, self.options.learnt_scheme))
            except ValueError as error:
                raise ValueError(f"{table.where(row)}: {error}; set options.scheme to none for plain tags") from error
            if violations:
                raise ValueError(
                    f"{table.where(row)}, word {violations[0].word + 1}: {violations[0].text} in {self.scheme.upper()}"
                    "; set options.invalid to repair to decode it as conlleval does"
                )
        return rows

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """Windows of words. `extra` holds (word, position in the input) of the first pieces in a window's core."""
        special = special_tokens_of(tokenizer, 1)
        size = text.max_length - special.size
        sentences = self.sentences(table, columns)
        pieces = word_pieces(tokenizer, [sentence.words for sentence in sentences])
        numbers = {label: number for number, label in enumerate(self.labels)}
        tags = self._model_tags(table, self._raw_tags(table, columns)) if "tags" in columns else None
        examples = []
        for row, (sentence, of_row) in enumerate(zip(sentences, pieces, strict=True)):
            labels = None
            if tags is not None:
                word_labels = [numbers[tag] for tag in tags[row]]
                labels = piece_labels(of_row.words, word_labels, IGNORED, continuations=self.options.all_pieces)
            firsts = [
                (word, index)
                for word, index in enumerate(first_pieces(of_row.words, len(sentence.words)))
                if index is not None
            ]
            for start, end, core in windows(len(of_row), size, min(self.options.overlap, size // 2), of_row.words):
                ids, types, (shift,) = special.wrap(of_row.ids[start:end])
                target = None
                if labels is not None:
                    target = [IGNORED] * len(ids)
                    target[shift + core[0] - start : shift + core[1] - start] = labels[core[0] : core[1]]
                positions = [(word, index - start + shift) for word, index in firsts if core[0] <= index < core[1]]
                examples.append(Example(row, ids, types, target, positions))
        return examples

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        targets = [label for example in examples for label in example.target]
        return class_loss(logits, torch.tensor(targets, device=logits.device), options)

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        counts = self.class_counts(examples)
        if options.class_weights is None:
            return float(sum(counts))
        return float((options.class_weights.double().cpu() * torch.tensor(counts)).sum())

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """The `tags` of a row, their `probabilities`, and its `entities` with kind, start, end, text and score.

        Starts and ends are characters if the row is a text, else words.
        """
        sentences = self.sentences(table, columns)
        tags = [[self.fallback] * len(sentence.words) for sentence in sentences]
        probabilities = [[1.0] * len(sentence.words) for sentence in sentences]
        for logits, example in zip(outputs, examples, strict=True):
            if not example.extra:
                continue
            words, positions = zip(*example.extra, strict=True)
            scores = softmax(logits[list(positions)])
            for word, number, score in zip(words, scores.argmax(1), scores.max(1), strict=True):
                tags[example.row][word] = self.labels[number]
                probabilities[example.row][word] = float(score)
        return [self._prediction(*row) for row in zip(sentences, tags, probabilities, strict=True)]

    def _prediction(self, sentence: Sentence, tags: list[str], probabilities: list[float]) -> dict[str, Any]:
        if self.scheme == PLAIN:
            return {"tags": tags, "probabilities": probabilities}
        entities = []
        for kind, start, end in tag_schemes.tags_to_entities(tags):
            span: Span = (start, end)
            if sentence.spans is not None:
                span = (sentence.spans[start][0], sentence.spans[end - 1][1])
            entities.append(
                {
                    "kind": kind,
                    "start": span[0],
                    "end": span[1],
                    "text": _text_of(sentence, start, end),
                    "score": min(probabilities[start:end]),
                }
            )
        tags = tag_schemes.convert_tags(tags, self.scheme)
        return {"tags": tags, "probabilities": probabilities, "entities": entities}

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """For entities, micro-averaged precision, recall and f1, macro_f1 and per_class as defined by seqeval, and the
        accuracy of the tags; for plain tags, accuracy, macro_f1 and per_class."""
        raw = self._raw_tags(table, columns)
        predicted = [list(prediction["tags"]) for prediction in predictions]
        if self.scheme == PLAIN:
            return plain_metrics(raw, predicted)
        return entity_metrics([tag_schemes.convert_tags(tags, self.scheme) for tags in raw], predicted)

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """The share of words with a wrong tag."""
        pairs = zip(self._raw_tags(table, columns), predictions, strict=True)
        return [
            sum(a != b for a, b in zip(tags, item["tags"], strict=True)) / max(len(tags), 1) for tags, item in pairs
        ]

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        counts = Counter(label for example in examples for label in example.target)
        return [counts[number] for number in range(len(self.labels))]


def _entity(item: Mapping[str, Any]) -> tag_schemes.Entity:
    """Parse an entity given as an object with start, end and its kind under one of the common names."""
    kind = next((item[name] for name in ("kind", "label", "type", "tag", "entity") if name in item), None)
    if kind is None or not all(isinstance(item.get(name), int) for name in ("start", "end")):
        raise ValueError(f"the entity is {dict(item)}; expected start, end and label")
    return tag_schemes.Entity(str(kind), item["start"], item["end"])


def _text_of(sentence: Sentence, start: int, end: int) -> str:
    """The words [start, end), separated by spaces where the text has white space, or all if the row is words."""
    text = ""
    for word in range(start, end):
        spans = sentence.spans
        separated = word > start and (spans is None or spans[word - 1][1] < spans[word][0])
        text += (" " if separated else "") + sentence.words[word]
    return text


def entity_metrics(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall and F1 of entities, micro-averaged and per kind, and the accuracy of tags, from seqeval.

    Raises:
        ValueError: there are no tags.
    """
    from seqeval import metrics

    gold, guess = [list(tags) for tags in true], [list(tags) for tags in predicted]
    if not any(gold):
        raise ValueError("there are no tagged words; expected at least one to compute metrics")
    kinds = {tag_schemes.split_tag(tag)[1] for tags in (*gold, *guess) for tag in tags} - {""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kinds that are never predicted have precision 0
        report = metrics.classification_report(gold, guess, output_dict=True, zero_division=0) if kinds else {}
        result: dict[str, Any] = {
            name: float(report["micro avg"][key]) if kinds else 0.0
            for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"))
        }
        result["macro_f1"] = float(report["macro avg"]["f1-score"]) if kinds else 0.0
        result["accuracy"] = float(metrics.accuracy_score(gold, guess))
    result["per_class"] = {
        kind: {
            "precision": float(report[kind]["precision"]),
            "recall": float(report[kind]["recall"]),
            "f1": float(report[kind]["f1-score"]),
            "support": int(report[kind]["support"]),
        }
        for kind in sorted(kinds)
    }
    return result


def plain_metrics(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """accuracy, macro_f1 and per_class over all words.

    Raises:
        ValueError: there are no tags.
    """
    from sklearn import metrics

    gold = [tag for tags in true for tag in tags]
    guess = [tag for tags in predicted for tag in tags]
    if not gold:
        raise ValueError("there are no tagged words; expected at least one to compute metrics")
    labels = label_order([*gold, *guess])
    parts = metrics.precision_recall_fscore_support(gold, guess, labels=labels, zero_division=0.0)
    per_class = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(labels, *parts, strict=True)
    }
    macro = float(np.mean([scores["f1"] for scores in per_class.values()]))
    return {"accuracy": float(metrics.accuracy_score(gold, guess)), "macro_f1": macro, "per_class": per_class}
