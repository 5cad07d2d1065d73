"""The models for fine-tuning: sequence and token classification, question answering, multiple choice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast.kernels._common.checks import check_integer, check_same_device, check_shape, check_tensor
from bert_fast.models.bert import BertHeadModel, EncoderOptions, PackedOutput
from bert_fast.models.config import BertConfig
from bert_fast.models.layers import linear_activation, linear_bias
from bert_fast.models.losses import class_labels, mean_binary_cross_entropy, mean_cross_entropy, mean_squared_error
from bert_fast.models.outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from bert_fast.models.reranking import rerank

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack


def _dropout(config: BertConfig, name: str) -> nn.Dropout:
    """Dropout with the probability of the setting `name`; see `Pooling`."""
    if name == "classifier":
        name = "hidden_dropout_prob" if config.classifier_dropout is None else "classifier_dropout"
    return nn.Dropout(getattr(config, name) if hasattr(config, name) else config.extra.get(name, 0.0))


_REDUCTIONS = {"cls": (), "mean": ("mean",), "max": ("max",), "mean_max": ("mean", "max")}


def _reductions(config: BertConfig) -> tuple[str, ...]:
    """The reductions over all tokens that the setting classifier_pooling names; () for the first token's state."""
    name = config.extra.get("classifier_pooling", "cls")
    if name not in _REDUCTIONS:
        raise ValueError(f"classifier_pooling is {name!r}; expected one of {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS[name]


class _SequenceHeadModel(BertHeadModel):
    """Base class of the models that classify a pooled sequence: by the encoder's pooler, or by pooling of their own."""

    def __init__(self, config: BertConfig, classes: int, dropout: str) -> None:
        pooling = config.architecture.pooling.get(self.head)
        self.reductions = _reductions(config) if self.head == "ForSequenceClassification" else ()
        if self.reductions:
            pooling = None
        super().__init__(config, add_pooling_layer=pooling is None and not self.reductions)
        if pooling is not None:
            for name, value in pooling.required:
                if config.extra.get(name, value) != value:
                    raise ValueError(f"{name} is {config.extra[name]!r}; {self.hf_class} supports only {value!r}")
            self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
            self.pre_dropout = _dropout(config, pooling.input_dropout)
            dropout = pooling.output_dropout
        self.pooling = pooling
        self.dropout = _dropout(config, dropout)
        self.classifier = nn.Linear(config.hidden_size * max(len(self.reductions), 1), classes)
        self.post_init()

    def classify(self, encoded: PackedOutput) -> Tensor:
        """The logits of every sequence: (B, classes)."""
        pooled = encoded.pooled
        if self.reductions:
            lengths, hidden = encoded.tokens.cu_seqlens.long().diff(), encoded.hidden
            # An empty sequence has nothing to reduce: it gives zeros, as in `Tokens.first`.
            reduced = [torch.segment_reduce(hidden.float(), name, lengths=lengths) for name in self.reductions]
            pooled = torch.cat(reduced, 1).masked_fill((lengths == 0).unsqueeze(1), 0.0).to(hidden.dtype)
        if self.pooling is not None:
            first = self.pre_dropout(encoded.tokens.first(encoded.hidden))
            pooled = linear_activation(first, self.pre_classifier, self.pooling.activation)
        # By the op, and not by the module: a row's bits don't depend on the other rows.
        return linear_bias(self.dropout(pooled), self.classifier)


class BertForSequenceClassification(_SequenceHeadModel):
    """BERT with a linear layer on the pooled output, for one class, several classes or regression.

    The setting `classifier_pooling` (in `BertConfig.extra`; unknown to transformers) may be mean, max or mean_max: the
    linear layer then reads that reduction of all tokens, and there is no pooler.
    """

    head = "ForSequenceClassification"
    modules_kind = "CrossEncoder"

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
        **options: Unpack[EncoderOptions],
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classify each sequence.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            labels: int64 (B,), or floating point (B, num_labels) for several classes or regression. The loss is that of
                `BertConfig.problem_type`; where that is None, regression if num_labels is 1, one class for integer
                labels, several classes otherwise.

        Returns:
            logits (B, num_labels); loss where labels are given.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the labels do not fit.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        logits = self.classify(encoded)
        loss = None if labels is None else self._loss(logits, labels)
        return self.format_output(SequenceClassifierOutput(loss=loss, logits=logits, **encoded.states), return_dict)

    def rerank(
        self, query: str, texts: str | Iterable[str], *, tokenizer: Any = None, **options: Any
    ) -> Tensor | np.ndarray[Any, Any]:
        """Score texts for a query: `bert_fast.models.reranking.rerank` with this model, which has one label.

        The scores are those of sentence-transformers' CrossEncoder of the same folder.

        Args:
            query, texts, options: see `bert_fast.models.reranking.rerank`.
            tokenizer: None for the tokenizer of the folder or repository that the model was loaded from.

        Returns:
            (len(texts),) float32 on the CPU, in the order of `texts`.

        Raises:
            TypeError, ValueError, ImportError: as `rerank`; ValueError also where there is no tokenizer.
        """
        tokenizer = self.source_tokenizer() if tokenizer is None else tokenizer
        return rerank(self, tokenizer, query, texts, **{"modules": self.modules_of_texts, **options})

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        check_tensor("labels", labels)
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
    """BERT with a linear layer on every token, for tagging."""

    head = "ForTokenClassification"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.dropout = _dropout(config, "classifier")
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

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
        **options: Unpack[EncoderOptions],
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Classify each token.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            labels: int64, the shape of input_ids; -100 is ignored, and so are labels at padding.

        Returns:
            logits (B, S, num_labels), zeros at padding, for packed input (T, num_labels); loss where labels are given.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the labels do not fit.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        logits = linear_bias(self.dropout(encoded.hidden), self.classifier)
        loss = None
        if labels is not None:
            loss = mean_cross_entropy(logits, encoded.tokens.select_labels("labels", labels, self.num_labels))
        output = TokenClassifierOutput(loss=loss, logits=encoded.tokens.restore(logits), **encoded.states)
        return self.format_output(output, return_dict)


class BertForQuestionAnswering(BertHeadModel):
    """BERT that predicts the start and the end of an answer."""

    head = "ForQuestionAnswering"

    def __init__(self, config: BertConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels is {config.num_labels}; expected 2, a score for the start and one for the end"
            )
        super().__init__(config, add_pooling_layer=False)
        self.dropout = _dropout(config, "qa_dropout")  # a setting of DistilBERT
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

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
        **options: Unpack[EncoderOptions],
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Score each token as the start and as the end of an answer.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            start_positions, end_positions: int64 (B,), columns of input_ids; for packed input, positions in the
                sequence. A position past the end or at padding is ignored in the loss.

        Returns:
            start_logits and end_logits (B, S), the lowest finite value at padding, for packed input (T,); loss, the
            mean of both cross entropies, where both positions are given.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the positions do not fit.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        tokens = encoded.tokens
        scores = linear_bias(self.dropout(encoded.hidden), self.qa_outputs)  # (T, 2)
        indices = tokens.table_indices()
        start, end = (tokens.scatter(part, indices, torch.finfo(scores.dtype).min) for part in scores.unbind(1))
        loss = None
        if start_positions is not None and end_positions is not None:
            real = tokens.scatter(torch.ones_like(indices, dtype=torch.bool), indices, False)
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
        return self.format_output(output, return_dict)


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


class BertForMultipleChoice(_SequenceHeadModel):
    """BERT that scores several continuations of each example."""

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
        **options: Unpack[EncoderOptions],
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Score the choices of each example.

        Args:
            input_ids ... inputs_embeds: padded (B, choices, S) or packed; see `BertModel.forward`, also for `options`.
            labels: int64 (B,), the right choice.
            num_choices: for packed input, where the choices of an example are consecutive sequences.

        Returns:
            logits (B, choices); loss where labels are given.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the labels or num_choices do not fit.
        """
        inputs: tuple[Tensor | None, ...] = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if options.get("cu_seqlens") is None:
            num_choices, inputs = _flatten_choices(*inputs)
        elif num_choices is None:
            raise ValueError("cu_seqlens came without num_choices; expected the number of choices of each example")
        encoded = self.run_encoder(*inputs, **options)
        if num_choices < 1 or encoded.tokens.batch_size % num_choices:
            raise ValueError(
                f"num_choices is {num_choices} and there are {encoded.tokens.batch_size} sequences; expected a divisor"
            )
        logits = self.classify(encoded).view(-1, num_choices)
        loss = None if labels is None else mean_cross_entropy(logits, class_labels("labels", labels, logits))
        return self.format_output(MultipleChoiceModelOutput(loss=loss, logits=logits, **encoded.states), return_dict)


def _flatten_choices(*inputs: Tensor | None) -> tuple[int, tuple[Tensor | None, ...]]:
    """The number of choices, and each input (B, choices, ...) as (B * choices, ...)."""
    for x in inputs:
        if x is not None:
            check_tensor("an input", x)
    main_input = inputs[0] if inputs[0] is not None else inputs[-1]
    if main_input is None:
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    if main_input.dim() < 3:
        shape = tuple(main_input.shape)
        raise ValueError(f"the input has shape {shape}; expected (B, choices, S), or (B, choices, S, E) of embeddings")
    flat = tuple(x.flatten(0, 1) if x is not None and x.dim() > 2 else x for x in inputs)
    return main_input.shape[1], flat
