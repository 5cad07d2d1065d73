"""The models of fine-tuning: sequences, tokens, answers and choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast.kernels._common.checks import check_integer, check_same_device, check_shape
from bert_fast.models.bert import BertHeadModel, Encoded, Options
from bert_fast.models.config import BertConfig
from bert_fast.models.encoder import activated
from bert_fast.models.losses import class_labels, mean_binary_cross_entropy, mean_cross_entropy, mean_squared_error
from bert_fast.models.outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _dropout(config: BertConfig, name: str) -> nn.Dropout:
    """With the probability of the setting `name`; see `Pooling`."""
    if name == "classifier":
        name = "hidden_dropout_prob" if config.classifier_dropout is None else "classifier_dropout"
    return nn.Dropout(getattr(config, name) if hasattr(config, name) else config.extra.get(name, 0.0))


_REDUCTIONS = {"cls": (), "mean": ("mean",), "max": ("max",), "mean_max": ("mean", "max")}


def _reductions(config: BertConfig) -> tuple[str, ...]:
    """How all tokens become the classifier's input, from the setting classifier_pooling; () for the first token's."""
    name = config.extra.get("classifier_pooling", "cls")
    if name not in _REDUCTIONS:
        raise ValueError(f"classifier_pooling is {name!r}; expected one of {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS[name]


class _SequenceModel(BertHeadModel):
    """Base of the models with a linear layer on one vector of a sequence: the encoder's pooled one, or their own."""

    def __init__(self, config: BertConfig, classes: int, dropout: str) -> None:
        pooling = config.architecture.pooling.get(self.head)
        self.reductions = _reductions(config) if self.head == "ForSequenceClassification" else ()
        if self.reductions:
            pooling = None
        super().__init__(config, add_pooling_layer=pooling is None and not self.reductions)
        if pooling is not None:
            for name, value in pooling.needs:
                if config.extra.get(name, value) != value:
                    raise ValueError(f"{name} is {config.extra[name]!r}; {self.hf_class} is here with {value!r} only")
            self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
            self.pre_dropout = _dropout(config, pooling.before)
            dropout = pooling.after
        self.pooling = pooling
        self.dropout = _dropout(config, dropout)
        self.classifier = nn.Linear(config.hidden_size * max(len(self.reductions), 1), classes)
        self.finish()

    def classify(self, encoded: Encoded) -> Tensor:
        """The logits of every sequence: (B, classes)."""
        pooled = encoded.pooled
        if self.reductions:
            lengths, hidden = encoded.tokens.cu_seqlens.long().diff(), encoded.hidden
            # Past the real tokens there is nothing to reduce: an empty sequence gives zeros, as in `Tokens.first`.
            found = [torch.segment_reduce(hidden.float(), name, lengths=lengths) for name in self.reductions]
            pooled = torch.cat(found, 1).masked_fill((lengths == 0).unsqueeze(1), 0.0).to(hidden.dtype)
        if self.pooling is not None:
            first = self.pre_dropout(encoded.tokens.first(encoded.hidden))
            pooled = activated(first, self.pre_classifier, self.pooling.activation)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits


class BertForSequenceClassification(_SequenceModel):
    """BERT with a linear layer on the pooled output: one class, several classes, or regression.

    With a setting `classifier_pooling` of mean, max or mean_max in the configuration, which transformers does not know,
    the linear layer reads that of all tokens, and there is no pooler.
    """

    head = "ForSequenceClassification"

    def __init__(self, config: BertConfig) -> None:
        assert config.num_labels is not None
        super().__init__(config, config.num_labels, "classifier")
        self.num_labels = config.num_labels

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Unpack[Options],
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """logits (B, num_labels), and the loss of the configuration's problem_type where labels are given.

        Without a problem_type it follows from the labels: regression for one class, one class for integer labels (B,),
        several classes for floating-point labels (B, num_labels).
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        logits = self.classify(encoded)
        loss = None if labels is None else self._loss(logits, labels)
        return self.finished(SequenceClassifierOutput(loss=loss, logits=logits, **encoded.states), return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            integers = not labels.is_floating_point() and labels.dtype != torch.bool
            problem = "single_label_classification" if integers else "multi_label_classification"
            problem = "regression" if self.num_labels == 1 else problem
        if problem == "regression":
            return mean_squared_error(logits, labels)
        if problem == "single_label_classification":
            return mean_cross_entropy(logits, class_labels("labels", labels, logits))
        return mean_binary_cross_entropy(logits, labels)


class BertForTokenClassification(BertHeadModel):
    """BERT with a linear layer on every token."""

    head = "ForTokenClassification"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.dropout = _dropout(config, "classifier")
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.finish()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Unpack[Options],
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """logits (B, S, num_labels), zeros at padding, and the loss where labels are given.

        labels: int64, shape of input_ids; -100 for tokens that take no part. Labels at padding are left out.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        logits = self.classifier(self.dropout(encoded.hidden))
        loss = None
        if labels is not None:
            loss = mean_cross_entropy(logits, encoded.tokens.select_labels("labels", labels, self.num_labels))
        output = TokenClassifierOutput(loss=loss, logits=encoded.tokens.restore(logits), **encoded.states)
        return self.finished(output, return_dict)


class BertForQuestionAnswering(BertHeadModel):
    """BERT that finds where an answer starts and ends."""

    head = "ForQuestionAnswering"

    def __init__(self, config: BertConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels is {config.num_labels}; expected 2, a score for the start and one for the end"
            )
        super().__init__(config, add_pooling_layer=False)
        self.dropout = _dropout(config, "qa_dropout")  # of DistilBERT
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.finish()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Unpack[Options],
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """start_logits and end_logits (B, S), or (T,) for packed input, and the mean of both losses.

        Padding takes no part: its logits are the lowest finite value. A position past the end, or at padding, is left
        out of the loss.

        Args:
            start_positions, end_positions: int64 (B,), columns of input_ids; in packed input from the sequence's start.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        tokens = encoded.tokens
        scores = self.qa_outputs(self.dropout(encoded.hidden))  # (T, 2)
        places = tokens.places()
        start, end = (tokens.scatter(part, places, torch.finfo(scores.dtype).min) for part in scores.unbind(1))
        loss = None
        if start_positions is not None and end_positions is not None:
            real = tokens.scatter(torch.ones_like(places, dtype=torch.bool), places, False)
            losses = [
                _answer_loss(name, logits, real, positions)
                for name, logits, positions in (
                    ("start_positions", start, start_positions),
                    ("end_positions", end, end_positions),
                )
            ]
            loss = (losses[0] + losses[1]) / 2
        if tokens.shape is None:
            start, end = scores.unbind(1)
        output = QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.states)
        return self.finished(output, return_dict)


def _answer_loss(name: str, logits: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    """Cross entropy over the columns of logits (B, W) where `real`; positions (B,), or (B, 1)."""
    check_integer(name, positions)
    check_same_device(logits, **{name: positions})
    positions = positions.reshape(-1).long()
    check_shape(name, positions, (logits.shape[0],))
    width = logits.shape[1]
    if not width:
        return logits.sum()
    positions = positions.clamp(0, width)
    inside = real.gather(1, positions.clamp(max=width - 1).unsqueeze(1)).squeeze(1)
    return mean_cross_entropy(logits, torch.where(inside, positions, width), ignore_index=width)


class BertForMultipleChoice(_SequenceModel):
    """BERT that chooses one of several continuations."""

    head = "ForMultipleChoice"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, 1, config.architecture.choice_dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_choices: int | None = None,
        return_dict: bool | None = None,
        **options: Unpack[Options],
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """logits (B, choices) for input_ids (B, choices, S), and the loss where labels int64 (B,) are given.

        num_choices: for packed input, where the choices of an example are sequences that follow each other.
        """
        inputs: tuple[Tensor | None, ...] = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if options.get("cu_seqlens") is None:
            num_choices, inputs = _flatten_choices(*inputs)
        elif num_choices is None:
            raise ValueError("cu_seqlens came without num_choices; expected the number of choices of each example")
        encoded = self.run_encoder(*inputs, **options)
        if num_choices < 1 or encoded.tokens.batch % num_choices:
            raise ValueError(
                f"there are {encoded.tokens.batch} sequences and {num_choices} choices; expected a multiple of these"
            )
        logits = self.classify(encoded).view(-1, num_choices)
        loss = None if labels is None else mean_cross_entropy(logits, class_labels("labels", labels, logits))
        return self.finished(MultipleChoiceModelOutput(loss=loss, logits=logits, **encoded.states), return_dict)


def _flatten_choices(*inputs: Tensor | None) -> tuple[int, tuple[Tensor | None, ...]]:
    """The number of choices, and (B, choices, ...) as (B * choices, ...)."""
    given = inputs[0] if inputs[0] is not None else inputs[-1]
    if given is None:
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    if given.dim() < 3:
        raise ValueError(
            f"the input has shape {tuple(given.shape)}; expected (B, choices, S), or with E for embeddings"
        )
    flat = tuple(x.flatten(0, 1) if x is not None and x.dim() > 2 else x for x in inputs)
    return given.shape[1], flat
