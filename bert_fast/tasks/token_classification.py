"""A tag for every word of a text: entities (IOB1, IOB2, IOBES), or plain tags such as parts of speech."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_fast.tasks.alignment import Span, first_pieces, frame_of, split_words, spread, windows, word_pieces
from bert_fast.tasks.classification import class_loss, label_name, label_order, softmax, unseen_message
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
    """Settings of the task token-classification.

    Args:
        scheme: of the tags in the data: iob1, iob2, iobes; none for plain tags; auto finds out.
        learnt_scheme: the scheme of the model's own labels; predictions come in that of the data.
        invalid: what to do with tags that their scheme forbids: repair reads them as conlleval and seqeval do.
        all_pieces: learn every piece of a word, not only its first.
        overlap: pieces that the windows of a long text share.
    """

    scheme: Literal["auto", "iob1", "iob2", "iobes", "none"] = "auto"
    learnt_scheme: Literal["iob1", "iob2", "iobes"] = "iob2"
    invalid: Literal["repair", "refuse"] = "repair"
    all_pieces: bool = False
    overlap: int = 32

    def __post_init__(self) -> None:
        if self.overlap < 0:
            raise ValueError(f"overlap is {self.overlap}; expected 0 or more pieces")


class Sentence(NamedTuple):
    """The words of a row, and where they are in its text; spans is None where the row came as words."""

    words: list[str]
    spans: list[Span] | None


class TokenClassification(Task):
    """A tag for every word. A word is what the row lists, or, in a plain text, what `split_words` finds.

    Long texts are cut into windows; each word is learnt, and predicted, once, in the window that sees most around it.
    A word that the tokenizer drops wholly (a zero-width space) is predicted as outside.
    """

    name = "token-classification"
    model_class = "BertForTokenClassification"
    roles = (TOKENS, TAGS)
    options_class = TokenClassificationOptions
    text_roles = ()  # a sentence without words has no tags, and takes no part
    main_metric = "f1"
    scheme: str  # of the data, "none" for plain tags
    labels: list[str]  # of the model
    fallback: str  # for words without pieces

    def fit(self, table: Table, columns: Columns) -> None:
        tags = self._raw_tags(table, columns)
        if not any(tags):
            raise ValueError(f"{table.source}: no row has words with tags; expected some")
        self.scheme = self.options.scheme
        if self.scheme == "auto":
            self.scheme = tag_schemes.guess_scheme(tags) or PLAIN
        counts = Counter(tag for row in self._learnt(table, tags) for tag in row)
        if self.scheme == PLAIN:
            self.labels = label_order(list(counts))
            self.fallback = counts.most_common(1)[0][0]
            if len(self.labels) < 2:
                raise ValueError(f"{table.source}: every word has the tag {self.labels[0]!r}; expected two or more")
        else:
            kinds = sorted({tag_schemes.split_tag(tag)[1] for tag in counts} - {""})
            if not kinds:
                raise ValueError(f"{table.source}: every word is tagged O; expected some entities")
            prefixes = "BIES" if self.options.learnt_scheme == "iobes" else "BI"
            self.labels = [tag_schemes.OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in prefixes)]
            self.fallback = tag_schemes.OUTSIDE
        self._choose_metric()

    def _choose_metric(self) -> None:
        self.main_metric = "accuracy" if self.scheme == PLAIN else "f1"

    def check(self, table: Table, columns: Columns) -> list[str]:
        raw = self._raw_tags(table, columns)
        found: Counter[str] = Counter()
        for tags in self._learnt(table, raw):
            found.update({tag for tag in tags if tag not in self.labels})
        if found:
            raise ValueError(unseen_message(table, found, self.labels))
        if self.scheme == PLAIN:
            return []
        wrong = [row for row, tags in enumerate(raw) if tag_schemes.problems(tags, self.scheme)]
        if not wrong:
            return []
        first = tag_schemes.problems(raw[wrong[0]], self.scheme)[0]
        return [
            f"{table.source}: {len(wrong)} rows have tags that {self.scheme.upper()} forbids, read as conlleval does; "
            f"the first: {table.where(wrong[0])}, word {first.word + 1}: {first.text}"
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
        """The words of every row. ValueError where a row is neither a text nor a list of words."""
        found = []
        for row, value in enumerate(table[columns["tokens"]]):
            if isinstance(value, str):
                spans = split_words(value)
                found.append(Sentence([value[start:end] for start, end in spans], spans))
            elif isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
                found.append(Sentence(list(value), None))
            else:
                raise ValueError(
                    f"{table.where(row)}: {columns['tokens']!r} holds {value!r}; expected a text or a list of words"
                )
        return found

    def _raw_tags(self, table: Table, columns: Columns) -> list[list[str]]:
        """The tags of every row as the data has them; entities by characters as IOB2."""
        found = []
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
                    found.append(tag_schemes.tags_of_text(entities, sentence.spans, "iob2"))
                except ValueError as error:
                    raise ValueError(f"{table.where(row)}: {error}") from error
                continue
            tags = [label_name(tag) for tag in value]
            if len(tags) != len(sentence.words):
                raise ValueError(f"{table.where(row)}: {len(tags)} tags came for {len(sentence.words)} words")
            found.append(tags)
        return found

    def _learnt(self, table: Table, raw: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tags in the scheme of the model's labels."""
        if self.scheme == PLAIN:
            return [list(tags) for tags in raw]
        found = []
        for row, tags in enumerate(raw):
            try:
                wrong = tag_schemes.problems(tags, self.scheme) if self.options.invalid == "refuse" else []
                found.append(tag_schemes.convert_tags(tags, self.options.learnt_scheme))
            except ValueError as error:
                raise ValueError(f"{table.where(row)}: {error}; for plain tags set options.scheme: none") from error
            if wrong:
                raise ValueError(
                    f"{table.where(row)}, word {wrong[0].word + 1}: {wrong[0].text}, in {self.scheme.upper()}; "
                    "options.invalid: repair reads it as conlleval does"
                )
        return found

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """Windows of words. `extra` holds (word, place in the input) of the first pieces that a window answers for."""
        frame = frame_of(tokenizer, 1)
        size = text.max_length - frame.size
        sentences = self.sentences(table, columns)
        pieces = word_pieces(tokenizer, [sentence.words for sentence in sentences])
        numbers = {label: number for number, label in enumerate(self.labels)}
        tags = self._learnt(table, self._raw_tags(table, columns)) if "tags" in columns else None
        found = []
        for row, (sentence, parts) in enumerate(zip(sentences, pieces, strict=True)):
            labels = None
            if tags is not None:
                of_words = [numbers[tag] for tag in tags[row]]
                labels = spread(parts.words, of_words, IGNORED, continuations=self.options.all_pieces)
            firsts = [
                (word, place)
                for word, place in enumerate(first_pieces(parts.words, len(sentence.words)))
                if place is not None
            ]
            for start, end, core in windows(len(parts), size, min(self.options.overlap, size // 2), parts.words):
                ids, types, (shift,) = frame.around(parts.ids[start:end])
                target = None
                if labels is not None:
                    target = [IGNORED] * len(ids)
                    target[shift + core[0] - start : shift + core[1] - start] = labels[core[0] : core[1]]
                answers = [(word, place - start + shift) for word, place in firsts if core[0] <= place < core[1]]
                found.append(Example(row, ids, types, target, answers))
        return found

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
        """A row's `tags` and their `probabilities`, and its `entities`: kind, start, end, text and score.

        Starts and ends are characters where the row is a text, else words.
        """
        sentences = self.sentences(table, columns)
        tags = [[self.fallback] * len(sentence.words) for sentence in sentences]
        sure = [[1.0] * len(sentence.words) for sentence in sentences]
        for logits, example in zip(outputs, examples, strict=True):
            if not example.extra:
                continue
            words, places = zip(*example.extra, strict=True)
            scores = softmax(logits[list(places)])
            for word, number, score in zip(words, scores.argmax(1), scores.max(1), strict=True):
                tags[example.row][word] = self.labels[number]
                sure[example.row][word] = float(score)
        return [self._prediction(*parts) for parts in zip(sentences, tags, sure, strict=True)]

    def _prediction(self, sentence: Sentence, tags: list[str], sure: list[float]) -> dict[str, Any]:
        if self.scheme == PLAIN:
            return {"tags": tags, "probabilities": sure}
        entities = []
        for kind, start, end in tag_schemes.read_tags(tags):
            place: Span = (start, end)
            if sentence.spans is not None:
                place = (sentence.spans[start][0], sentence.spans[end - 1][1])
            entities.append(
                {
                    "kind": kind,
                    "start": place[0],
                    "end": place[1],
                    "text": _joined(sentence, start, end),
                    "score": min(sure[start:end]),
                }
            )
        return {"tags": tag_schemes.convert_tags(tags, self.scheme), "probabilities": sure, "entities": entities}

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """Of entities: precision, recall and f1 over all, macro_f1, per_class, as seqeval defines them, and accuracy of
        the tags. Of plain tags: accuracy, macro_f1 and per_class."""
        raw = self._raw_tags(table, columns)
        predicted = [list(prediction["tags"]) for prediction in predictions]
        if self.scheme == PLAIN:
            return plain_metrics(raw, predicted)
        return entity_metrics([tag_schemes.convert_tags(tags, self.scheme) for tags in raw], predicted)

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """The share of words with another tag."""
        pairs = zip(self._raw_tags(table, columns), predictions, strict=True)
        return [
            sum(a != b for a, b in zip(tags, item["tags"], strict=True)) / max(len(tags), 1) for tags, item in pairs
        ]

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        counts = Counter(label for example in examples for label in example.target)
        return [counts[number] for number in range(len(self.labels))]


def _entity(item: Mapping[str, Any]) -> tag_schemes.Entity:
    """An entity given as an object with start, end and its kind under one of the usual names."""
    kind = next((item[name] for name in ("kind", "label", "type", "tag", "entity") if name in item), None)
    if kind is None or not all(isinstance(item.get(name), int) for name in ("start", "end")):
        raise ValueError(f"the entity {dict(item)} came; expected start, end and label")
    return tag_schemes.Entity(str(kind), item["start"], item["end"])


def _joined(sentence: Sentence, start: int, end: int) -> str:
    """The words `start` to `end`, with spaces where the text has some; between all where there is no text."""
    found = ""
    for word in range(start, end):
        spans = sentence.spans
        apart = word > start and (spans is None or spans[word - 1][1] < spans[word][0])
        found += (" " if apart else "") + sentence.words[word]
    return found


def entity_metrics(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """seqeval's precision, recall and F1 of whole entities, over all and per kind, and the accuracy of tags."""
    from seqeval import metrics

    gold, found = [list(tags) for tags in true], [list(tags) for tags in predicted]
    if not any(gold):
        raise ValueError("no tagged word came; expected at least one to compute metrics of")
    listed = {tag_schemes.split_tag(tag)[1] for tags in (*gold, *found) for tag in tags} - {""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds that are never predicted, whose precision counts as 0
        report = metrics.classification_report(gold, found, output_dict=True, zero_division=0) if listed else {}
        result: dict[str, Any] = {
            name: float(report["micro avg"][key]) if listed else 0.0
            for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"))
        }
        result["macro_f1"] = float(report["macro avg"]["f1-score"]) if listed else 0.0
        result["accuracy"] = float(metrics.accuracy_score(gold, found))
    result["per_class"] = {
        kind: {
            "precision": float(report[kind]["precision"]),
            "recall": float(report[kind]["recall"]),
            "f1": float(report[kind]["f1-score"]),
            "support": int(report[kind]["support"]),
        }
        for kind in sorted(listed)
    }
    return result


def plain_metrics(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """accuracy, macro_f1 and per_class over all words of all rows."""
    from sklearn import metrics

    gold = [tag for tags in true for tag in tags]
    found = [tag for tags in predicted for tag in tags]
    if not gold:
        raise ValueError("no tagged word came; expected at least one to compute metrics of")
    labels = label_order([*gold, *found])
    parts = metrics.precision_recall_fscore_support(gold, found, labels=labels, zero_division=0.0)
    per_class = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(labels, *parts, strict=True)
    }
    macro = float(np.mean([scores["f1"] for scores in per_class.values()]))
    return {"accuracy": float(metrics.accuracy_score(gold, found)), "macro_f1": macro, "per_class": per_class}
