"""Token classification: named entities in any scheme of tags, or plain tags such as parts of speech."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_fast._config import convert_fields
from bert_fast.tasks.alignment import (
    Span,
    first_pieces,
    piece_labels,
    special_tokens_of,
    split_words,
    windows,
    word_pieces,
)
from bert_fast.tasks.classification import class_loss, softmax, unseen_labels_message
from bert_fast.tasks.io import tag_schemes
from bert_fast.tasks.io.columns import Role, column_option
from bert_fast.tasks.io.labels import is_missing, label_name, label_order, list_from_text, plain_value
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
        scheme: the tag scheme of the data: iob1, iob2, iobes, bilou, bmes, bmewo, or none for plain tags; auto detects
            it. Tags may be written B-PER, PER-B, or B alone, with a dash, underscore, colon or slash.
        learnt_scheme: the tag scheme of the model's labels; predictions use that of the data.
        invalid: what happens to tags that the scheme forbids: repair decodes them as conlleval and seqeval do, refuse
            raises an error.
        all_pieces: train on every piece of a word, not only the first.
        overlap: pieces that consecutive windows of a long text share.
    """

    scheme: Literal["auto", "iob1", "iob2", "iobes", "bilou", "bmes", "bmewo", "none"] = "auto"
    learnt_scheme: Literal["iob1", "iob2", "iobes"] = "iob2"
    invalid: Literal["repair", "refuse"] = "repair"
    all_pieces: bool = False
    overlap: int = 32

    def __post_init__(self) -> None:
        convert_fields(self, "options.")
        if self.overlap < 0:
            raise ValueError(f"options.overlap is {self.overlap}; expected 0 or more")


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
    style: tag_schemes.TagStyle | None  # of the data; None for plain tags
    labels: list[str]  # of the model
    fallback: str  # the tag of words without pieces

    def fit(self, table: Table, columns: Columns) -> None:
        raw = self._raw_tags(table, columns)
        if not any(raw):
            raise ValueError(f"{table.source}: no row has tagged words; expected at least one")
        if self.options.scheme == "auto":
            self.style = tag_schemes.detect_style(raw, table.where)
            if self.style is None:
                self._check_order(table, columns)
        elif self.options.scheme == PLAIN:
            self.style = None
        else:
            self.style = tag_schemes.TagStyle(self.options.scheme, tag_schemes.detect_form(raw))
        counts = Counter(tag for row in self._model_tags(table, self._tags(table, columns)) for tag in row)
        if self.style is None:
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

    def _check_order(self, table: Table, columns: Columns) -> None:
        """Refuse tags in the column of words, before the words (as in the MIT restaurant corpus).

        Raises:
            ValueError: most words are entity tags.
        """
        words = Counter(word for sentence in self.sentences(table, columns) for word in sentence.words)
        outside = words["O"] + words["o"]
        tags = sum(n for word, n in words.items() if tag_schemes.ENTITY_TAG.fullmatch(word))
        if tags and 2 * (tags + outside) > words.total():
            example = next(filter(tag_schemes.ENTITY_TAG.fullmatch, words))
            raise ValueError(
                f"{table.source}: the words are entity tags, such as {example!r}; if the tags come "
                f"first, swap the columns: {column_option('tokens')} {columns['tags']}, and {column_option('tags')} "
                f"{columns['tokens']}"
            )

    @property
    def scheme(self) -> str:
        """The tag scheme of the data; "none" for plain tags."""
        return PLAIN if self.style is None else self.style.scheme

    def _choose_metric(self) -> None:
        self.main_metric = "accuracy" if self.style is None else "f1"

    def describe(self) -> str:
        if self.style is None:
            numbers = all(label.isdecimal() for label in self.labels)
            what = "plain tags, numbers without names" if numbers else "plain tags"
            return f"{what}: {', '.join(self.labels[:20])}{' ...' if len(self.labels) > 20 else ''}"
        kinds = list(dict.fromkeys(tag_schemes.split_tag(label)[1] for label in self.labels[1:]))
        forms = {"prefix": "", "suffix": ", written with the letter last", "letter": ", without kinds"}
        return f"entity tags of the scheme {self.scheme.upper()}{forms[self.style.form]}: {', '.join(kinds)}"

    def check(self, table: Table, columns: Columns) -> list[str]:
        raw = self._tags(table, columns)
        unseen: Counter[str] = Counter()
        for tags in self._model_tags(table, raw):
            unseen.update({tag for tag in tags if tag not in self.labels})
        if unseen:
            raise ValueError(unseen_labels_message(table, unseen, self.labels))
        if self.style is None:
            return []
        kinds = sorted({tag_schemes.split_tag(label)[1] for label in self.labels[1:]})
        twins = [
            f"{one} and {two}" for one, two in pairwise(sorted(kinds, key=str.lower)) if one.lower() == two.lower()
        ]
        messages = (
            [f"{table.source}: kinds that differ in case are different kinds: {', '.join(twins)}"] if twins else []
        )
        invalid = [row for row, tags in enumerate(raw) if tag_schemes.violations(tags, self.scheme)]
        if not invalid:
            return messages
        first = tag_schemes.violations(raw[invalid[0]], self.scheme)[0]
        return [
            *messages,
            f"{table.source}: {len(invalid)} rows have tags that {self.scheme.upper()} forbids, decoded as by conlleval"
            f", such as {table.where(invalid[0])}, word {first.word + 1}: {first.text}",
        ]

    def settings(self) -> dict[str, Any]:
        settings = {"labels": self.labels, "scheme": self.scheme, "fallback": self.fallback}
        return settings if self.style is None else {**settings, "form": self.style.form}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.labels, self.fallback = list(settings["labels"]), settings["fallback"]
        scheme = settings["scheme"]
        self.style = None if scheme == PLAIN else tag_schemes.TagStyle(scheme, settings.get("form", "prefix"))
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
            value = plain_value(value)
            if isinstance(value, str) and (listed := list_from_text(value)) and all(isinstance(x, str) for x in listed):
                value = listed  # a list that was written to a csv file
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
        """The tags of every row as they are written; entities by characters become IOB2.

        Raises:
            ValueError: a row has no tags, or not one for each word; the message says where.
        """
        rows = []
        sentences = self.sentences(table, columns)
        for row, (sentence, value) in enumerate(zip(sentences, table[columns["tags"]], strict=True)):
            value = plain_value(value)
            if isinstance(value, str):
                value = _tags_from_text(value, len(sentence.words))
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
            if len(value) != len(sentence.words):
                raise ValueError(f"{table.where(row)}: {len(value)} tags; expected {len(sentence.words)}, one per word")
            for word, tag in enumerate(value):
                if is_missing(tag) or isinstance(tag, (list, tuple, Mapping)):
                    raise ValueError(f"{table.where(row)}, word {word + 1}: the tag is {tag!r}; expected a text")
            rows.append([label_name(tag) for tag in value])
        return rows

    def _tags(self, table: Table, columns: Columns) -> list[list[str]]:
        """The tags of every row, of entities with the letters of IOBES."""
        raw = self._raw_tags(table, columns)
        if self.style is None:
            return raw
        style = tag_schemes.TagStyle(self.style.scheme, tag_schemes.detect_form(raw))  # tables may differ in their form
        rows = []
        for row, tags in enumerate(raw):
            try:
                rows.append(style.read(tags))
            except ValueError as error:
                raise ValueError(f"{table.where(row)}, {error}; set options.scheme to none for plain tags") from error
        return rows

    def _model_tags(self, table: Table, rows_of_tags: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tags of every row, as `_tags` returns them, in the scheme of the model's labels."""
        if self.style is None:
            return [list(tags) for tags in rows_of_tags]
        rows = []
        for row, tags in enumerate(rows_of_tags):
            violations = tag_schemes.violations(tags, self.scheme) if self.options.invalid == "refuse" else []
            rows.append(tag_schemes.convert_tags(tags, self.options.learnt_scheme))
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
        tags = self._model_tags(table, self._tags(table, columns)) if "tags" in columns else None
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
        if self.style is None:
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
        tags = self.style.write(tag_schemes.convert_tags(tags, self.scheme))
        return {"tags": tags, "probabilities": probabilities, "entities": entities}

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """For entities, micro-averaged precision, recall and f1, macro_f1 and per_class as defined by seqeval, and the
        accuracy of the tags; for plain tags, accuracy, macro_f1 and per_class. `scheme` is the tag scheme."""
        true = self._tags(table, columns)
        predicted = [list(prediction["tags"]) for prediction in predictions]
        if self.style is None:
            return {**plain_metrics(true, predicted), "scheme": PLAIN}
        true = [tag_schemes.convert_tags(tags, self.scheme) for tags in true]
        return {**entity_metrics(true, list(map(self.style.read, predicted))), "scheme": self.scheme}

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """The share of words with a wrong tag."""
        predicted = [item["tags"] if self.style is None else self.style.read(item["tags"]) for item in predictions]
        pairs = zip(self._tags(table, columns), predicted, strict=True)
        return [sum(a != b for a, b in zip(*tags, strict=True)) / max(len(tags[0]), 1) for tags in pairs]

    def warning(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> str:
        rows = [row for row, prediction in enumerate(predictions) if prediction["tags"]]
        return super().warning([predictions[row] for row in rows], table.select(rows), columns)

    def outcome(self, prediction: Mapping[str, Any]) -> str:
        tags = sorted(set(prediction["tags"]))
        return f"{tags[0]!r} at every word" if len(tags) == 1 else repr(prediction["tags"])

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        counts = Counter(label for example in examples for label in example.target)
        return [counts[number] for number in range(len(self.labels))]


def _tags_from_text(text: str, words: int) -> list[Any]:
    """The tags in a text: a list as JSON or Python write it, or tags separated by spaces, or by commas."""
    listed = list_from_text(text)
    if listed is not None:
        return listed
    tags = text.split()
    by_commas = [tag.strip() for tag in text.split(",")]
    return by_commas if len(tags) != words == len(by_commas) else tags


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
