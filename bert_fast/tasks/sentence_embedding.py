"""Sentence embeddings, trained on pairs, triplets or scored pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast._config import check, convert_fields
from bert_fast.models.embedding import pool
from bert_fast.tasks import embedding_losses as losses
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
MAX_NEGATIVES = 16
NEGATIVES = (
    Role("negative", ("negative", "hard_negative", "negative_1"), required=False),
    *(
        Role(f"negative_{n}", (f"negative_{n}", f"hard_negative_{n}"), required=False)
        for n in range(2, MAX_NEGATIVES + 1)
    ),
)
SCORE = Role("label", ("label", "score", "similarity", "similarity_score", "labels"), required=False, target=True)
NEGATIVE_SCORE = Role("negative_score", ("negative_score",), required=False, target=True)
ROLES = ("text", "text_pair", *(role.name for role in NEGATIVES))  # indexed by the `extra` of an example
REQUIRED = {
    "contrastive": ("text_pair",),
    "triplet": ("text_pair", "negative"),
    "cosine": ("text_pair", "label"),
    "cosent": ("text_pair", "label"),
    "margin_mse": ("text_pair", "negative", "label"),
}
METRICS = {"contrastive": "mrr", "triplet": "triplet_accuracy", "margin_mse": "triplet_accuracy"}


@dataclass(frozen=True)
class SentenceEmbeddingOptions:
    """Options of the task sentence-embedding.

    Args:
        objective: contrastive (classify the pair of each text among all pairs and negatives of the batch), triplet (the
            pair is closer than each negative by a margin), cosine (regress the cosine of a pair to its score), cosent
            (order the cosines of pairs as their scores: CoSENT, Su, 2022) or margin_mse (regress text . pair -
            text . negative to the difference of a teacher's scores: Hofstätter et al., 2020; the column negative_score,
            or the score is the difference). auto is cosine if there are scores and no negatives, else contrastive.
        pooling: of the last hidden states: mean, cls, max or pooler. sentence-transformers loads the result of all but
            pooler.
        temperature: divides the cosines of the objectives contrastive and cosent.
        margin: of the triplet objective, in units of cosine.
        score_low, score_high: the scores that correspond to cosines of 0 and 1; by default the minimum and maximum of
            the training rows.
        widths: train the first this many components of the vectors too, as vectors by themselves (Matryoshka
            representation learning, Kusupati et al., 2022); the loss is the weighted sum over these widths. Include the
            whole width. None trains whole vectors alone.
        width_weights: one for each of `widths`; None weights them equally, by 1.
    """

    objective: Literal["auto", "contrastive", "triplet", "cosine", "cosent", "margin_mse"] = "auto"
    pooling: Literal["mean", "cls", "max", "pooler"] = "mean"
    temperature: float = 0.05
    margin: float = 0.3
    score_low: float | None = None
    score_high: float | None = None
    widths: list[int] | None = None
    width_weights: list[float] | None = None

    def __post_init__(self) -> None:
        convert_fields(self, "options.")
        check(0 < self.temperature < math.inf, f"options.temperature is {self.temperature}; expected more than 0")
        check(0 <= self.margin < math.inf, f"options.margin is {self.margin}; expected 0 or more")
        for name in ("score_low", "score_high"):
            value = getattr(self, name)
            check(value is None or math.isfinite(value), f"options.{name} is {value}; expected a finite number")
        widths, weights = self.widths, self.width_weights
        check(
            widths is None or (bool(widths) and min(widths) >= 1 and len(set(widths)) == len(widths)),
            f"options.widths is {widths}; expected different numbers of 1 or more",
        )
        check(
            weights is None or (len(weights) == len(widths or ()) and all(0 < x < math.inf for x in weights)),
            f"options.width_weights is {weights}; expected a number above 0 for each of options.widths, {widths}",
        )


class SentenceEmbedding(Task):
    """Embeds texts as vectors such that related texts are close (Reimers and Gurevych, 2019).

    The contrastive objective is multiple negatives ranking (Henderson et al., 2017); larger batches have more
    negatives.
    """

    name = "sentence-embedding"
    model_class = "BertModel"
    roles = (TEXT, PAIR, *NEGATIVES, SCORE, NEGATIVE_SCORE)
    options_class = SentenceEmbeddingOptions
    text_roles = ("text", "text_pair", "negative")  # an empty negative_2 ... is none
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
        if missing := [role for role in REQUIRED[self.objective] if role not in columns]:
            raise ValueError(
                f"{table.source}: no column for {', '.join(missing)} among {', '.join(table.columns)}, required by the "
                f"objective {self.objective}; name it with {column_option(missing[0])}"
            )
        if self.objective == "margin_mse" and (several := [role for role in ROLES[3:] if role in columns]):
            raise ValueError(
                f"{table.source}: margin_mse has the columns {', '.join(columns[role] for role in several)}; expected "
                "one negative for each row"
            )

    def _choose_metric(self) -> None:
        self.main_metric = METRICS.get(self.objective, "spearman")

    def check(self, table: Table, columns: Columns) -> list[str]:
        self._check_columns(table, columns)
        if "label" in REQUIRED[self.objective]:
            self._scores(table, columns)
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

    def _scores(self, table: Table, columns: Columns) -> list[float]:
        """What the objective learns of each row: the score, for cosine scaled to a cosine, or the margin of scores."""
        scores = number_column(table, columns["label"])
        if self.objective == "cosine":
            return [(score - self.low) / (self.high - self.low) for score in scores]
        if self.objective == "margin_mse" and "negative_score" in columns:
            others = number_column(table, columns["negative_score"])
            return [score - other for score, other in zip(scores, others, strict=True)]
        return scores

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """The text, pair and negatives of each row, if present; `extra` is 0, 1, or 2 and more."""
        texts = {kind: text_column(table, columns[role]) for kind, role in enumerate(ROLES) if role in columns}
        encodings = {kind: encode_texts(tokenizer, of_kind, None, text) for kind, of_kind in texts.items()}
        targets: list[float | None] = [None] * len(table)
        if "label" in REQUIRED[self.objective] and "label" in columns:
            targets = [*self._scores(table, columns)]
        return [
            Example(row, encoding.ids, encoding.type_ids, targets[row], kind, is_truncated([encoding]))
            for row in range(len(table))
            for kind, encoding in ((kind, of_kind[row]) for kind, of_kind in encodings.items())
            if kind < 3 or texts[kind][row].strip()
        ]

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, E): the vector of each text, fp32."""
        out = run_model(model, batch)
        return pool(out["last_hidden_state"], batch.cu_seqlens, self.options.pooling, out.get("pooler_output"))

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        reject_options(self.name, options, "focal_gamma", "label_smoothing")
        found = _vectors(logits, examples)
        widths = self.options.widths
        if widths is None:
            return self._loss(found, examples)
        if max(widths) > logits.shape[1]:
            raise ValueError(f"options.widths has {max(widths)}; expected at most the vectors' {logits.shape[1]}")
        weights = self.options.width_weights or [1.0] * len(widths)
        parts = [self._loss(found.truncated(width), examples) * x for width, x in zip(widths, weights, strict=True)]
        return torch.stack(parts).sum()

    def _loss(self, vectors: losses.Vectors, examples: Sequence[Example]) -> Tensor:
        """The summed loss of vectors of one width."""
        if self.objective == "triplet":
            return losses.triplet_loss(vectors, self.options.margin)
        if self.objective == "contrastive":
            texts, pairs, negatives = _by_kind(examples)
            ids = ([tuple(examples[index].input_ids) for index in part] for part in (texts, pairs, negatives))
            same = losses.same_texts(*ids).to(vectors.texts.device)
            return losses.contrastive_loss(vectors, self.options.temperature, same)
        targets = [example.target for example in examples if example.extra == 0]
        scores = torch.tensor(targets, device=vectors.texts.device, dtype=vectors.texts.dtype)
        if self.objective == "cosine":
            return losses.cosine_loss(vectors, scores)
        if self.objective == "cosent":
            return losses.cosent_loss(vectors, scores, self.options.temperature)
        return losses.margin_mse_loss(vectors, scores)

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        return float(sum(example.extra == 0 for example in examples))

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """For texts without pairs the `vector`; for pairs `similarity`, the cosine, and `rank`, that of a text's pair
        among the pairs of all rows, from 1; for triplets also `negative_similarity`, that of the closest negative."""
        rows = len(table)
        texts, pairs_of, negatives = ([outputs[index] for index in part] for part in _by_kind(examples))
        if not pairs_of:
            return [{"vector": vector.tolist()} for vector in texts]
        unit = [_unit(np.stack(texts)), _unit(np.stack(pairs_of))]
        similarity = (unit[0] * unit[1]).sum(1)
        closest: dict[int, float] = {}
        for vector, example in zip(negatives, (item for item in examples if item.extra > 1), strict=True):
            cosine = float(_unit(np.asarray(vector)[None])[0] @ unit[0][example.row])
            closest[example.row] = max(cosine, closest.get(example.row, -math.inf))
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
            if row in closest:
                item["negative_similarity"] = closest[row]
            predictions.append(item)
        return predictions

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """For scored pairs the metrics of regression on cosines and scores; otherwise mrr, mean_similarity and
        recall_at_1, _5, _10 of each text's pair among all pairs; for triplets also triplet_accuracy, the share of
        rows whose pair is closer than every negative."""
        if not len(table):
            raise ValueError("the table is empty; expected at least one row to compute metrics")
        similarity = np.array([item["similarity"] for item in predictions])
        if self.objective in ("cosine", "cosent"):
            return regression_metrics(self._scores(table, columns), similarity.tolist())
        ranks = np.array([item["rank"] for item in predictions])
        metrics = {"mrr": float((1 / ranks).mean()), "mean_similarity": float(similarity.mean())}
        metrics |= {f"recall_at_{n}": float((ranks <= n).mean()) for n in (1, 5, 10)}
        if "negative_similarity" in predictions[0]:
            negative = np.array([item["negative_similarity"] for item in predictions])
            metrics["triplet_accuracy"] = float((similarity > negative).mean())
        return metrics

    def outcome(self, prediction: Mapping[str, Any]) -> str | None:
        return f"a cosine of {prediction['similarity']:.3f}" if "similarity" in prediction else None


def _by_kind(examples: Sequence[Example]) -> tuple[list[int], list[int], list[int]]:
    """The indices of the texts, of their pairs and of the negatives."""
    kinds = [min(example.extra, 2) for example in examples]
    texts, pairs, negatives = ([index for index, kind in enumerate(kinds) if kind == part] for part in range(3))
    return texts, pairs, negatives


def _vectors(x: Tensor, examples: Sequence[Example]) -> losses.Vectors:
    texts, pairs, negatives = _by_kind(examples)
    number = {examples[index].row: row for row, index in enumerate(texts)}
    rows = torch.tensor([number[examples[index].row] for index in negatives], dtype=torch.int64, device=x.device)
    return losses.Vectors(x[texts], x[pairs], x[negatives], rows)


def _unit(x: Array) -> Array:
    """The rows of x divided by their length."""
    result: Array = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return result
