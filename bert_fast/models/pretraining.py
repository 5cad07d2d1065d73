"""The models of pretraining: masked words, next sentences, both, and ELECTRA's replaced words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast.kernels import masked_lm_loss
from bert_fast.kernels.masked_lm_loss import MaskedLMLoss
from bert_fast.models.bert import BertHeadModel, Options
from bert_fast.models.config import GELU_ACTIVATIONS, BertConfig
from bert_fast.models.encoder import activated
from bert_fast.models.inputs import IGNORE_INDEX, Tokens
from bert_fast.models.losses import class_labels, mean_binary_cross_entropy, mean_cross_entropy
from bert_fast.models.outputs import (
    BertForPreTrainingOutput,
    ElectraForPreTrainingOutput,
    MaskedLMOutput,
    NextSentencePredictorOutput,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BertPredictionHeadTransform(nn.Module):
    """Projection, activation and LayerNorm before the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.input_size)
        self.LayerNorm = nn.LayerNorm(config.input_size, eps=config.layer_norm_eps)
        self.hidden_act = config.architecture.lm_activation or config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, E) -> (M, config.input_size), the width of the word embedding."""
        x = activated(hidden, self.dense, self.hidden_act)
        out: Tensor = self.LayerNorm(x)
        return out


class BertLMPredictionHead(nn.Module):
    """Scores of every word of the vocabulary, and their loss at the masked tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.input_size, config.vocab_size)
        if config.architecture.lm_bias:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, E) -> (M, V)."""
        scores: Tensor = self.decoder(self.transform(hidden))
        return scores

    def loss(self, hidden: Tensor, labels: Tensor) -> MaskedLMLoss:
        """Mean loss over the rows of hidden (T, E) whose label is not -100; labels int64 (T,)."""
        dense, norm = self.transform.dense, self.transform.LayerNorm
        if GELU_ACTIVATIONS.get(self.transform.hidden_act) != "gelu" or dense.in_features != dense.out_features:
            return self._eager_loss(hidden, labels)
        return masked_lm_loss(
            hidden,
            labels,
            dense.weight,
            dense.bias,
            norm.weight,
            norm.bias,
            self.decoder.weight,
            self.decoder.bias,
            eps=norm.eps,
            ignore_index=IGNORE_INDEX,
        )

    def _eager_loss(self, hidden: Tensor, labels: Tensor) -> MaskedLMLoss:
        """The same for the activations and widths that masked_lm_loss does not have."""
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        labels = labels[rows]
        scores = self(hidden[rows])
        correct = (scores.argmax(dim=-1) == labels).sum() if rows.shape[0] else rows.sum()
        return MaskedLMLoss(mean_cross_entropy(scores, labels), correct, (labels != IGNORE_INDEX).sum())


class BertOnlyMLMHead(nn.Module):
    """Holds `predictions`, under transformers' name."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)


class BertOnlyNSPHead(nn.Module):
    """Holds `seq_relationship`, under transformers' name."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertPreTrainingHeads(nn.Module):
    """Both heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


def _tie(model: BertHeadModel, head: BertLMPredictionHead) -> None:
    """One matrix for words in and words out, and one bias, unless the configuration says otherwise."""
    if model.config.tie_word_embeddings:
        head.decoder.weight = model.bert.embeddings.word_embeddings.weight
        if model.config.architecture.lm_bias:
            head.decoder.bias = head.bias


def _masked_lm(
    head: BertLMPredictionHead,
    tokens: Tokens,
    hidden: Tensor,
    labels: Tensor | None,
    with_logits: bool,
    rows: Tensor | None = None,
) -> tuple[MaskedLMLoss | None, Tensor | None]:
    """The loss where there are labels, the logits (in the shape of the input) where they are wanted.

    `hidden` is (T, E), or (M, E) of the tokens `rows`.
    """
    found = None
    if labels is not None:
        labels = tokens.select_labels("labels", labels, head.decoder.out_features)
        found = head.loss(hidden, labels if rows is None else labels.index_select(0, rows))
    return found, tokens.restore(head(hidden)) if with_logits else None


class BertForPreTraining(BertHeadModel):
    """BERT with the heads of its pretraining: masked words and next sentence."""

    head = "ForPreTraining"
    model_types = ("bert",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config)
        self.finish()

    def tie_weights(self) -> None:
        """Make the decoder's weight and bias those of the word embedding and of `cls.predictions.bias`."""
        _tie(self, self.cls.predictions)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        label_rows: Tensor | None = None,
        output_logits: bool = False,
        return_dict: bool | None = None,
        **options: Unpack[Options],
    ) -> BertForPreTrainingOutput | tuple[Any, ...]:
        """Scores, and the sum of both losses where both kinds of labels are given.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            labels: int64, shape of input_ids; the words to predict, -100 elsewhere. Labels at padding are left out.
            next_sentence_label: int64 (B,); 0 where the second sentence follows the first, 1 where it does not.
            label_rows: int64 (M,), of packed input: where labels are not -100, each once, and maybe others. The last
                layer is then computed at these and at the first tokens only, with the same loss, and its dropout (which
                goes by row) is another; prediction_logits are (M, V).
            output_logits: in training with labels, where only the loss is computed, return prediction_logits too.
        """
        tensors = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.run_encoder(*tensors, label_rows=label_rows, **options)
        with_logits = output_logits or labels is None or not self.training
        head, tokens = self.cls.predictions, encoded.tokens
        found, logits = _masked_lm(head, tokens, encoded.hidden, labels, with_logits, label_rows)
        relationship = self.cls.seq_relationship(encoded.pooled)
        next_sentence_loss = None
        if next_sentence_label is not None:
            next_sentence_label = class_labels("next_sentence_label", next_sentence_label, relationship)
            next_sentence_loss = mean_cross_entropy(relationship, next_sentence_label)
        output = BertForPreTrainingOutput(
            loss=None if found is None or next_sentence_loss is None else found.loss + next_sentence_loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            mlm_loss=None if found is None else found.loss,
            next_sentence_loss=next_sentence_loss,
            mlm_correct=None if found is None else found.correct,
            mlm_count=None if found is None else found.count,
            **encoded.states,
        )
        return self.finished(output, return_dict)


class BertForMaskedLM(BertHeadModel):
    """BERT that predicts masked words."""

    head = "ForMaskedLM"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.finish()

    def tie_weights(self) -> None:
        """Make the decoder's weight and bias those of the word embedding and of `cls.predictions.bias`."""
        _tie(self, self.cls.predictions)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_logits: bool = False,
        return_dict: bool | None = None,
        **options: Unpack[Options],
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Scores of every word for every token, and the loss where labels are given, as `BertForPreTraining`."""
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        with_logits = output_logits or labels is None or not self.training
        found, logits = _masked_lm(self.cls.predictions, encoded.tokens, encoded.hidden, labels, with_logits)
        output = MaskedLMOutput(
            loss=None if found is None else found.loss,
            logits=logits,
            mlm_correct=None if found is None else found.correct,
            mlm_count=None if found is None else found.count,
            **encoded.states,
        )
        return self.finished(output, return_dict)


class BertForNextSentencePrediction(BertHeadModel):
    """BERT that says whether the second sentence follows the first."""

    head = "ForNextSentencePrediction"
    model_types = ("bert",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertOnlyNSPHead(config)
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
    ) -> NextSentencePredictorOutput | tuple[Any, ...]:
        """logits (B, 2); labels int64 (B,), 0 where the second sentence follows the first, 1 where it does not."""
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        logits = self.cls.seq_relationship(encoded.pooled)
        loss = None if labels is None else mean_cross_entropy(logits, class_labels("labels", labels, logits))
        return self.finished(NextSentencePredictorOutput(loss=loss, logits=logits, **encoded.states), return_dict)


class ElectraDiscriminatorPredictions(nn.Module):
    """Projection, activation and one score for every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)
        self.hidden_act = config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, E) -> (T, 1)."""
        x = activated(hidden, self.dense, self.hidden_act)
        scores: Tensor = self.dense_prediction(x)
        return scores


class ElectraForPreTraining(BertHeadModel):
    """ELECTRA's discriminator, which says of every token whether it was replaced."""

    head = "ForPreTraining"
    model_types = ("electra",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.discriminator_predictions = ElectraDiscriminatorPredictions(config)
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
    ) -> ElectraForPreTrainingOutput | tuple[Any, ...]:
        """logits (B, S), zeros at padding; labels int64 (B, S), 1 for a replaced token, 0 for others, -100 for none."""
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        scores = self.discriminator_predictions(encoded.hidden)
        loss = None
        if labels is not None:
            chosen = encoded.tokens.select_labels("labels", labels, 2).unsqueeze(1)
            rows = (chosen != IGNORE_INDEX).nonzero()[:, 0]
            loss = mean_binary_cross_entropy(scores[rows], chosen[rows])
        logits = encoded.tokens.restore(scores).squeeze(-1)
        return self.finished(ElectraForPreTrainingOutput(loss=loss, logits=logits, **encoded.states), return_dict)
