"""Sentence embeddings, trained on pairs, triplets or scored pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast._config import check, convert_fields
from bert_fast.models.embedding import pool
from bert_fast.tasks.encoding import encode_texts, is_truncated
from bert_fast.tasks.io.columns import Role, column_option, number_column, text_column
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import regression_metrics
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Batch, Columns, Example, LossOptions, Task, reject_options, run_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]

TEXT = Role("text", ("text", "anchor", "sentence1", "query", "question1", "question", "sentence", "premise"))
PAIR = Role(
    "text_pair",
    ("text_pair", "positive", "sentence2", "text2", "passage", "answer", "question2", "hypothesis"),
    required=False,
)
NEGATIVE = Role("negative", ("negative", "hard_negative"), required=False)
SCORE = Role("label", ("label", "score", "similarity", "similarity_score", "labels"), required=False, target=True)
ROLES = ("text", "text_pair", "negative")  # indexed by the `extra` of an example


@dataclass(frozen=True)
class SentenceEmbeddingOptions:
    """Options of the task sentence-embedding.

    Args:
        objective: contrastive (classify the pair of each text among all pairs and negatives of the batch), triplet (the
            pair is closer than the negative by a margin) or cosine (regress the cosine of a pair to its score). auto
            is cosine if there are scores and no negatives, else contrastive.
        pooling: of the last hidden states: mean, cls, max or pooler. sentence-transformers loads the result of all but
            pooler.
        temperature: divides the cosines of the contrastive objective.
        margin: of the triplet objective, in units of cosine.
        score_low, score_high: the scores that correspond to cosines of 0 and 1; by default the minimum and maximum of
            the training rows.
    """

    objective: Literal["auto", "contrastive", "triplet", "cosine"] = "auto"
    pooling: Literal["mean", "cls", "max", "pooler"] = "mean"
    temperature: float = 0.05
    margin: float = 0.3
    score_low: float | None = None
    score_high: float | None = None

    def __post_init__(self) -> None:
        convert_fields(self, "options.")
        check(0 < self.temperature < math.inf, f"options.temperature is {self.temperature}; expected more than 0")
        check(0 <= self.margin < math.inf, f"options.margin is {self.margin}; expected 0 or more")
        for name in ("score_low", "score_high"):
            value = getattr(self, name)
            check(value is None or math.isfinite(value), f"options.{name} is {value}; expected a finite number")


class SentenceEmbedding(Task):
    """Embeds texts as vectors such that related texts are close (Reimers and Gurevych, 2019).

    The contrastive objective is multiple negatives ranking (Henderson et al., 2017); larger batches have more
    negatives.
    """

    name = "sentence-embedding"
    model_class = "BertModel"
    roles = (TEXT, PAIR, NEGATIVE, SCORE)
    options_class = SentenceEmbeddingOptions
    text_roles = ROLES
    keep_rows_together = True
    words_may_change = True
    main_metric = "mrr"
    objective: str
    low: float
    high: float

    def fit(self, table: Table, columns: Columns) -> None:
        if not len(table):
            raise ValueError(f"{table.source}: the table is empty; expected at least one row")
        self.objective = self.options.objective
        if self.objective == "auto":
            self.objective = "cosine" if "label" in columns and "negative" not in columns else "contrastive"
        self.low, self.high = 0.0, 1.0
        self._check_columns(table, columns)
        if self.objective == "cosine":
            scores = number_column(table, columns["label"])
            low, high = self.options.score_low, self.options.score_high
            self.low, self.high = min(scores) if low is None else low, max(scores) if high is None else high
            if self.low >= self.high:
                raise ValueError(
                    f"{table.source}: scores from {self.low} to {self.high}; expected different scores, or set "
                    "options.score_low and options.score_high"
                )
        self._choose_metric()

    def _check_columns(self, table: Table, columns: Columns) -> None:
        required = {
            "contrastive": ["text_pair"],
            "triplet": ["text_pair", "negative"],
            "cosine": ["text_pair", "label"],
        }
        if missing := [role for role in required[self.objective] if role not in columns]:
            raise ValueError(
                f"{table.source}: no column for {', '.join(missing)} among {', '.join(table.columns)}, required by the "
                f"objective {self.objective}; name it with {column_option(missing[0])}"
            )

    def _choose_metric(self) -> None:
        self.main_metric = {"contrastive": "mrr", "triplet": "triplet_accuracy", "cosine": "spearman"}[self.objective]

    def check(self, table: Table, columns: Columns) -> list[str]:
        self._check_columns(table, columns)
        if self.objective != "cosine":
            return []
        outside = sum(not self.low <= score <= self.high for score in number_column(table, columns["label"]))
        return [f"{table.source}: {outside} scores are outside {self.low} to {self.high}"] if outside else []

    def describe(self) -> str:
        scores = (
            f", scores of {self.low:g} to {self.high:g} are cosines of 0 to 1" if self.objective == "cosine" else ""
        )
        return f"the objective is {self.objective}{scores}"

    def settings(self) -> dict[str, Any]:
        return {"objective": self.objective, "low": self.low, "high": self.high}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.objective = settings["objective"]
        self.low, self.high = float(settings["low"]), float(settings["high"])
        self._choose_metric()

    def extra_files(self, text: TextSettings, hidden_size: int) -> dict[str, Any]:
        """The files of sentence-transformers: modules, maximum length, pooling."""
        if self.options.pooling == "pooler":
            return {}
        kinds = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
        modules = (("", "Transformer"), ("1_Pooling", "Pooling"))
        return {
            "modules.json": [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for index, (path, kind) in enumerate(modules)
            ],
            "sentence_bert_config.json": {"max_seq_length": text.max_length, "do_lower_case": False},
            "1_Pooling/config.json": {
                "word_embedding_dimension": hidden_size,
                **{f"pooling_mode_{name}": kind == self.options.pooling for kind, name in kinds.items()},
            },
        }

    def _cosines(self, table: Table, columns: Columns) -> list[float]:
        """The scores of the rows, scaled to cosines."""
        return [(score - self.low) / (self.high - self.low) for score in number_column(table, columns["label"])]

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """The text, pair and negative of each row, if present; `extra` is 0, 1 or 2."""
        kinds = [kind for kind, role in enumerate(ROLES) if role in columns]
        encodings = {
            kind: encode_texts(tokenizer, text_column(table, columns[ROLES[kind]]), None, text) for kind in kinds
        }
        targets: list[float | None] = [None] * len(table)
        if self.objective == "cosine" and "label" in columns:
            targets = [*self._cosines(table, columns)]
        return [
            Example(row, encoding.ids, encoding.type_ids, targets[row], kind, is_truncated([encoding]))
            for row in range(len(table))
            for kind, encoding in ((kind, encodings[kind][row]) for kind in kinds)
        ]

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, E): the vector of each text, fp32."""
        out = run_model(model, batch)
        return pool(out["last_hidden_state"], batch.cu_seqlens, self.options.pooling, out.get("pooler_output"))

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        reject_options(self.name, options, "focal_gamma", "label_smoothing")
        vectors = F.normalize(logits, dim=-1)
        by_kind = {kind: [i for i, item in enumerate(examples) if item.extra == kind] for kind in range(len(ROLES))}
        anchors, pairs = vectors[by_kind[0]], vectors[by_kind[1]]
        if self.objective == "cosine":
            targets = torch.tensor([examples[i].target for i in by_kind[0]], device=logits.device, dtype=vectors.dtype)
            return ((anchors * pairs).sum(-1) - targets).square().sum()
        if self.objective == "triplet":
            closer = (anchors * (pairs - vectors[by_kind[2]])).sum(-1)
            return (self.options.margin - closer).clamp(min=0).sum()
        candidates = [*by_kind[1], *by_kind[2]]
        cosines = anchors @ vectors[candidates].T / self.options.temperature
        # A candidate that equals the pair of a row, or its text, is not a negative of that row.
        ids = [tuple(examples[i].input_ids) for i in candidates]
        row_ids = [
            {tuple(examples[i].input_ids), tuple(examples[j].input_ids)}
            for i, j in zip(by_kind[0], by_kind[1], strict=True)
        ]
        masked = torch.tensor([[text in of_row for text in ids] for of_row in row_ids], device=logits.device)
        masked.fill_diagonal_(False)
        targets = torch.arange(len(anchors), device=logits.device)
        return F.cross_entropy(cosines.masked_fill(masked, -torch.inf), targets, reduction="sum")

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        return float(sum(example.extra == 0 for example in examples))

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """For texts without pairs the `vector`; for pairs `similarity`, the cosine, and `rank`, that of a text's pair
        among the pairs of all rows, from 1; for triplets also `negative_similarity`."""
        rows = len(table)
        vectors: dict[int, Array] = {}
        for kind in {example.extra for example in examples}:
            of_kind = [np.asarray(x) for x, example in zip(outputs, examples, strict=True) if example.extra == kind]
            vectors[kind] = np.stack(of_kind)
        if 1 not in vectors:
            return [{"vector": vector.tolist()} for vector in vectors.get(0, np.zeros((rows, 0)))]
        unit = {kind: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for kind, x in vectors.items()}
        similarity = (unit[0] * unit[1]).sum(1)
        pairs = text_column(table, columns["text_pair"])
        number = {text: i for i, text in enumerate(dict.fromkeys(pairs))}
        distinct = np.array([number[text] for text in pairs])
        first = np.unique(distinct, return_index=True)[1]
        predictions = []
        for row in range(rows):
            cosines = unit[1][first] @ unit[0][row]
            # Ties count against the model: equal vectors for all texts give the last rank.
            ahead = cosines >= cosines[distinct[row]]
            item = {"similarity": float(similarity[row]), "rank": int(ahead.sum())}
            if 2 in unit:
                item["negative_similarity"] = float(unit[2][row] @ unit[0][row])
            predictions.append(item)
        return predictions

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """For scored pairs the metrics of regression on cosines and scores; otherwise mrr, mean_similarity and
        recall_at_1, _5, _10 of each text's pair among all pairs; for triplets also triplet_accuracy."""
        if not len(table):
            raise ValueError("the table is empty; expected at least one row to compute metrics")
        similarity = np.array([item["similarity"] for item in predictions])
        if self.objective == "cosine":
            return regression_metrics(self._cosines(table, columns), similarity.tolist())
        ranks = np.array([item["rank"] for item in predictions])
        metrics = {"mrr": float((1 / ranks).mean()), "mean_similarity": float(similarity.mean())}
        metrics |= {f"recall_at_{n}": float((ranks <= n).mean()) for n in (1, 5, 10)}
        if "negative_similarity" in predictions[0]:
            negative = np.array([item["negative_similarity"] for item in predictions])
            metrics["triplet_accuracy"] = float((similarity > negative).mean())
        return metrics

    def outcome(self, prediction: Mapping[str, Any]) -> str | None:
        return f"a cosine of {prediction['similarity']:.3f}" if "similarity" in prediction else None
