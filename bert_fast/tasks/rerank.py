"""Cross-encoders: the relevance of a text for a query, read together by a classifier of one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bert_fast._config import convert_fields
from bert_fast.tasks.encoding import encode_texts, is_truncated
from bert_fast.tasks.io.columns import column_option, number_column, text_column
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import ranking_metrics
from bert_fast.tasks.sentence_embedding import NEGATIVES, PAIR, SCORE, TEXT
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Batch, Columns, Example, LossOptions, Task, reject_options, run_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]

QUERY = replace(
    TEXT, usual_names=("query", *(name for name in TEXT.usual_names if name not in ("query", "text")), "text")
)
PASSAGE = replace(PAIR, usual_names=(*PAIR.usual_names, "document", "text"), required=True)
_NEGATIVES = [role.name for role in NEGATIVES]


@dataclass(frozen=True)
class RerankOptions:
    """Options of the task rerank.

    Args:
        objective: bce (binary cross entropy of each pair, with labels of 0 to 1, or 1 for the text of a row and 0 for
            its negatives) or listwise (classify the text of a row among it and its negatives, by logit). auto is
            listwise if there are negatives, else bce.
    """

    objective: Literal["auto", "bce", "listwise"] = "auto"

    def __post_init__(self) -> None:
        convert_fields(self, "options.")


class Rerank(Task):
    """Scores texts for a query with a cross-encoder (Nogueira and Cho, 2019).

    Rows are a query and a text with a label of 0 to 1, or a query, a relevant text and negatives.
    """

    name = "rerank"
    model_class = "BertForSequenceClassification"
    roles = (QUERY, PASSAGE, *NEGATIVES, SCORE)
    options_class = RerankOptions
    text_roles = ("text", "text_pair", "negative")  # an empty negative_2 ... is none
    keep_rows_together = True
    words_may_change = True
    group_role = "text"
    length_in_tokenizer = True
    objective: str

    def fit(self, table: Table, columns: Columns) -> None:
        if not len(table):
            raise ValueError(f"{table.source}: the table is empty; expected at least one row")
        negatives = "negative" in columns
        self.objective = self.options.objective
        if self.objective == "auto":
            self.objective = "listwise" if negatives else "bce"
        if not negatives:
            self._need(table, columns, "negative" if self.objective == "listwise" else "label")
            labels = self._labels(table, columns)
            if len(set(labels)) < 2:
                raise ValueError(f"{table.source}: every row has the label {labels[0]}; expected different labels")
        self.main_metric = self._metric(table, columns)

    def _need(self, table: Table, columns: Columns, role: str) -> None:
        if role not in columns:
            raise ValueError(
                f"{table.source}: no column for {role} among {', '.join(table.columns)}, required by the objective "
                f"{self.objective}; name it with {column_option(role)}"
            )

    def _metric(self, table: Table, columns: Columns) -> str:
        """ndcg_at_10 if queries have texts of different labels; of single pairs a metric over all of them."""
        labels = [1.0] if "negative" in columns else self._labels(table, columns)
        by_query: dict[str, set[float]] = {}
        for query, label in zip(text_column(table, columns["text"]), labels, strict=False):
            by_query.setdefault(query, set()).add(label)
        if "negative" in columns or any(len(found) > 1 for found in by_query.values()):
            return "ndcg_at_10"
        return "average_precision" if set(labels) <= {0.0, 1.0} else "spearman"

    def _labels(self, table: Table, columns: Columns) -> list[float]:
        labels = number_column(table, columns["label"])
        for row, label in enumerate(labels):
            if not 0 <= label <= 1:
                raise ValueError(f"{table.where(row)}: {columns['label']!r} holds {label:g}; expected 0 to 1")
        return labels

    def check(self, table: Table, columns: Columns) -> list[str]:
        if "negative" not in columns:
            self._need(table, columns, "label")
            self._labels(table, columns)
        return []

    def describe(self) -> str:
        return f"the objective is {self.objective}"

    def settings(self) -> dict[str, Any]:
        return {"objective": self.objective, "main_metric": self.main_metric}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.objective, self.main_metric = settings["objective"], settings["main_metric"]

    def model_config(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": None}

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """The query with the text of each row, then with its negatives; `extra` is whether it is a negative."""
        if text.long != "head" or text.truncation != "longest_first":
            raise ValueError(
                f"text.long is {text.long} and text.truncation {text.truncation}; expected head and longest_first, as "
                "rerankers truncate"
            )
        queries = text_column(table, columns["text"])
        relevant, negatives = text_column(table, columns["text_pair"]), _negatives(table, columns)
        labels: Sequence[float | None] = [None] * len(table)
        if "negative" in columns:
            labels = [1.0] * len(table)
        elif "label" in columns:
            labels = self._labels(table, columns)
        kept = [
            (row, kind, text) for row in range(len(table)) for kind, text in enumerate([relevant[row], *negatives[row]])
        ]
        encodings = encode_texts(tokenizer, [queries[row] for row, _, _ in kept], [x for _, _, x in kept], text)
        return [
            Example(
                row, encoding.ids, encoding.type_ids, 0.0 if kind else labels[row], kind > 0, is_truncated([encoding])
            )
            for (row, kind, _), encoding in zip(kept, encodings, strict=True)
        ]

    def forward(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """(B,): the logit of each pair."""
        return run_model(model, batch)["logits"].squeeze(-1)

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        reject_options(self.name, options, "focal_gamma", "label_smoothing")
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if self.objective == "bce":
            targets = torch.tensor([example.target for example in examples], device=wide.device, dtype=wide.dtype)
            return F.binary_cross_entropy_with_logits(wide, targets, reduction="sum")
        sizes = [len(list(group)) for _, group in groupby(examples, key=lambda example: example.row)]
        rows = pad_sequence(list(wide.split(sizes)), batch_first=True, padding_value=-torch.inf)
        first = torch.zeros(len(sizes), dtype=torch.int64, device=wide.device)
        return F.cross_entropy(rows, first, reduction="sum")

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        listwise = self.objective == "listwise"
        return float(sum(not example.extra for example in examples) if listwise else len(examples))

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """`score`, the sigmoid of the logit, and with negatives `negative_scores`."""
        predictions: list[dict[str, Any]] = [{} for _ in range(len(table))]
        for output, example in zip(outputs, examples, strict=True):
            score = float(1 / (1 + np.exp(-np.float64(output))))
            if example.extra:
                predictions[example.row].setdefault("negative_scores", []).append(score)
            else:
                predictions[example.row]["score"] = score
        return predictions

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """The metrics of `ranking_metrics` over the texts of each query, in whatever rows they are.

        A negative that several rows of a query have counts once, and not at all where another row has it as the
        relevant text.
        """
        labels = [1.0] * len(table) if "negative" in columns else self._labels(table, columns)
        queries, texts = text_column(table, columns["text"]), text_column(table, columns["text_pair"])
        by_query: dict[str, tuple[list[float], list[float]]] = {}
        negatives = _negatives(table, columns)
        counted = set(zip(queries, texts, strict=True))
        for row, (query, label, item) in enumerate(zip(queries, labels, predictions, strict=True)):
            truth, scores = by_query.setdefault(query, ([], []))
            truth.append(label)
            scores.append(item["score"])
            for text, score in zip(negatives[row], item.get("negative_scores", []), strict=True):
                if (query, text) not in counted:
                    counted.add((query, text))
                    truth.append(0.0)
                    scores.append(score)
        return ranking_metrics(list(by_query.values()))

    def outcome(self, prediction: Mapping[str, Any]) -> str:
        return f"a score of {prediction['score']:.3f}"


def _negatives(table: Table, columns: Columns) -> list[list[str]]:
    """The negatives of each row; an empty one after the first is none."""
    texts = [text_column(table, columns[role]) for role in _NEGATIVES if role in columns]
    return [
        [of_role[row] for number, of_role in enumerate(texts) if number == 0 or of_role[row].strip()]
        for row in range(len(table))
    ]
