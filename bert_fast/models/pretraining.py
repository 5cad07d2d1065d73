"""The models for pretraining: masked LM, next sentence prediction, both, and ELECTRA's discriminator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast.kernels import masked_lm_loss
from bert_fast.kernels.masked_lm_loss import MaskedLMLoss
from bert_fast.models.activations import GELU_ACTIVATIONS
from bert_fast.models.bert import BertHeadModel, EncoderOptions, PackedOutput
from bert_fast.models.checkpoint import DECODER, DECODER_BIAS
from bert_fast.models.config import BertConfig
from bert_fast.models.inputs import IGNORE_INDEX
from bert_fast.models.layers import linear_activation, linear_bias
from bert_fast.models.losses import class_labels, mean_binary_cross_entropy, mean_cross_entropy
from bert_fast.models.outputs import (
    BertForPreTrainingOutput,
    ElectraForPreTrainingOutput,
    MaskedLMOutput,
    NextSentencePredictorOutput,
)
from bert_fast.models.plain import is_plain, is_plain_norm
from bert_fast.models.sparse import encode_sparse
from bert_fast.models.vocabulary import resize_bias, resize_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BertPredictionHeadTransform(nn.Module):
    """LayerNorm(act(dense(x))), before the decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.input_size)
        self.LayerNorm = nn.LayerNorm(config.input_size, eps=config.layer_norm_eps)
        self.hidden_act = config.architecture.lm_activation or config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, E) -> (M, config.input_size), the width of the word embedding."""
        out: Tensor = self.LayerNorm(linear_activation(hidden, self.dense, self.hidden_act))
        return out


class BertLMPredictionHead(nn.Module):
    """The logits of the vocabulary, and the loss at the masked tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.input_size, config.vocab_size)
        if config.architecture.lm_bias:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, E) -> (M, V)."""
        transformed = self.transform(hidden)
        if transformed.dtype is torch.float16 and transformed.device.type == "cpu":
            return linear_bias(transformed, self.decoder)  # torch's own product takes ten times as long as float32's
        logits: Tensor = self.decoder(transformed)
        return logits

    def loss(self, hidden: Tensor, labels: Tensor) -> MaskedLMLoss:
        """Mean cross entropy over the rows of hidden (T, E) whose label is not -100; labels int64 (T,)."""
        if not self._has_kernel():
            return self._eager_loss(hidden, labels)
        dense, norm = self.transform.dense, self.transform.LayerNorm
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

    def _has_kernel(self) -> bool:
        """Whether masked_lm_loss computes this head: plain modules, exact GELU, and no change of width."""
        transform = self.transform
        if not (is_plain(self, BertLMPredictionHead) and is_plain(transform, BertPredictionHeadTransform)):
            return False
        dense = transform.dense
        return (
            is_plain(dense, nn.Linear)
            and is_plain(self.decoder, nn.Linear)
            and is_plain_norm(transform.LayerNorm)
            and GELU_ACTIVATIONS.get(transform.hidden_act) == "gelu"
            and dense.in_features == dense.out_features
        )

    def _eager_loss(self, hidden: Tensor, labels: Tensor) -> MaskedLMLoss:
        """`loss` for the heads that have no kernel."""
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        labels = labels[rows]
        logits = self(hidden[rows])
        correct = (logits.argmax(dim=-1) == labels).sum() if rows.shape[0] else rows.sum()
        return MaskedLMLoss(mean_cross_entropy(logits, labels), correct, (labels != IGNORE_INDEX).sum())


class BertOnlyMLMHead(nn.Module):
    """The container of `predictions`, for transformers' parameter names."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)


class BertOnlyNSPHead(nn.Module):
    """The container of `seq_relationship`, for transformers' parameter names."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertPreTrainingHeads(nn.Module):
    """The container of both heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


def _check_container(container: nn.Module) -> None:
    """ValueError where a hook waits for a call of `cls`, whose parts are called."""
    hooks = (container._forward_hooks, container._forward_pre_hooks)
    if any(hooks) or container._backward_hooks or container._backward_pre_hooks:
        raise ValueError(
            "the module `cls` has a hook, and it is never called; expected the hook on a part of it: cls.predictions, "
            "cls.predictions.decoder or cls.seq_relationship"
        )


class _MaskedLMModel(BertHeadModel):
    """Base class of the models with a masked-LM head, whose decoder is tied to the word embedding."""

    cls: BertOnlyMLMHead | BertPreTrainingHeads

    def tie_weights(self) -> None:
        """Share the decoder's weight with the word embedding, and its bias with `cls.predictions.bias`.

        Unless the configuration's tie_word_embeddings is False. Biases get the weight's number of rows, new ones at 0.
        """
        head = self.cls.predictions
        if not self.config.tie_word_embeddings:
            return
        weight = self.bert.embeddings.word_embeddings.weight
        head.decoder.weight, head.decoder.out_features = weight, weight.shape[0]
        bias = head.bias if self.config.architecture.lm_bias else head.decoder.bias
        if bias.shape[0] != weight.shape[0]:
            bias = resize_bias(bias, weight.shape[0])
        head.decoder.bias = bias
        if self.config.architecture.lm_bias:
            head.bias = bias

    def untie_weights(self) -> None:
        """Give the decoder a weight and a bias of its own, and set `config.tie_word_embeddings` to False."""
        decoder = self.cls.predictions.decoder
        self.config = self.bert.config = self.config.replace(tie_word_embeddings=False)
        for name in ("weight", "bias"):
            shared = getattr(decoder, name)
            setattr(decoder, name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder."""
        return self.cls.predictions.decoder

    def _resize_output(self, rows: int, std: float | None) -> None:
        head = self.cls.predictions
        if self.config.tie_word_embeddings:  # tie_weights does the rest
            return
        head.decoder.weight = resize_rows(head.decoder.weight, rows, std)
        head.decoder.bias, head.decoder.out_features = resize_bias(head.decoder.bias, rows), rows
        if self.config.architecture.lm_bias:
            head.bias = resize_bias(head.bias, rows)

    @property
    def tied_names(self) -> set[str]:
        """The decoder's parameters, where they are tied."""
        if not self.config.tie_word_embeddings:
            return set()
        return {DECODER, DECODER_BIAS} if self.config.architecture.lm_bias else {DECODER}

    def masked_lm(
        self, encoded: PackedOutput, labels: Tensor | None, *, output_logits: bool, label_rows: Tensor | None = None
    ) -> tuple[MaskedLMLoss | None, Tensor | None]:
        """The loss where there are labels, and the logits in the shape of the input.

        Logits are None in training with labels, unless `output_logits` is True. With `label_rows`, `encoded.hidden` is
        (M, E) of these tokens.
        """
        _check_container(self.cls)
        head, tokens, hidden, loss = self.cls.predictions, encoded.tokens, encoded.hidden, None
        with_logits = output_logits or labels is None or not self.training
        if labels is not None:
            labels = tokens.select_labels("labels", labels, head.decoder.out_features)
            loss = head.loss(hidden, labels if label_rows is None else labels.index_select(0, label_rows))
        return loss, tokens.restore(head(hidden)) if with_logits else None


class BertForPreTraining(_MaskedLMModel):
    """BERT with its pretraining heads: masked LM and next sentence prediction."""

    head = "ForPreTraining"
    model_types = ("bert",)
    cls: BertPreTrainingHeads

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()

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
        **options: Unpack[EncoderOptions],
    ) -> BertForPreTrainingOutput | tuple[Any, ...]:
        """Predict the masked tokens, and whether the second sentence follows the first.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            labels: int64, the shape of input_ids; the tokens to predict, -100 elsewhere. Labels at padding are ignored.
            next_sentence_label: int64 (B,); 0 where the second sentence follows the first, 1 where it does not.
            label_rows: int64 (M,), for packed input: the rows whose label is not -100, each once, and any others. The
                last layer is then computed at these and at the first tokens only. The loss is the same, except that
                dropout, which depends on the row, draws another mask. prediction_logits are (M, V).
            output_logits: return prediction_logits in training with labels too, where they are otherwise not computed.

        Returns:
            prediction_logits (B, S, V), for packed input (T, V); seq_relationship_logits (B, 2); mlm_loss,
            next_sentence_loss, mlm_correct and mlm_count where the labels are given, and loss where both are.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the labels do not fit.
        """
        tensors = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.run_encoder(*tensors, label_rows=label_rows, **options)
        mlm, logits = self.masked_lm(encoded, labels, output_logits=output_logits, label_rows=label_rows)
        relationship = self.cls.seq_relationship(encoded.pooled)
        next_sentence_loss = None
        if next_sentence_label is not None:
            next_sentence_label = class_labels("next_sentence_label", next_sentence_label, relationship)
            next_sentence_loss = mean_cross_entropy(relationship, next_sentence_label)
        output = BertForPreTrainingOutput(
            loss=None if mlm is None or next_sentence_loss is None else mlm.loss + next_sentence_loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            mlm_loss=None if mlm is None else mlm.loss,
            next_sentence_loss=next_sentence_loss,
            mlm_correct=None if mlm is None else mlm.correct,
            mlm_count=None if mlm is None else mlm.count,
            **encoded.states,
        )
        return self.format_output(output, return_dict)


class BertForMaskedLM(_MaskedLMModel):
    """BERT with a masked-LM head."""

    head = "ForMaskedLM"
    modules_kind = "SparseEncoder"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
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
        output_logits: bool = False,
        return_dict: bool | None = None,
        **options: Unpack[EncoderOptions],
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Predict the masked tokens.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            labels, output_logits: see `BertForPreTraining.forward`.

        Returns:
            logits (B, S, V), for packed input (T, V); loss, mlm_correct and mlm_count where labels are given.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the labels do not fit.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        mlm, logits = self.masked_lm(encoded, labels, output_logits=output_logits)
        output = MaskedLMOutput(
            loss=None if mlm is None else mlm.loss,
            logits=logits,
            mlm_correct=None if mlm is None else mlm.correct,
            mlm_count=None if mlm is None else mlm.count,
            **encoded.states,
        )
        return self.format_output(output, return_dict)

    def encode_sparse(self, texts: str | Iterable[str], *, tokenizer: Any = None, **options: Any) -> Tensor:
        """Embed texts as sparse vectors over the vocabulary (SPLADE): `bert_fast.models.sparse.encode_sparse`.

        The vectors are those of sentence-transformers' SparseEncoder of the same folder.

        Args:
            texts, options: see `bert_fast.models.sparse.encode_sparse`; task="query" or "document" for the prompt and
                the maximum length of these.
            tokenizer: None for the tokenizer of the folder or repository that the model was loaded from.

        Returns:
            (len(texts), V) float32, sparse COO, on the CPU, in the order of `texts`; (V,) for a str.

        Raises:
            TypeError, ValueError: as `encode_sparse`; ValueError also where there is no tokenizer.
        """
        tokenizer = self.source_tokenizer() if tokenizer is None else tokenizer
        modules = self.modules_of_texts
        modules = modules if self.sentence_modules is not None else replace(modules, pooling=("max",))
        return encode_sparse(self, tokenizer, texts, **{"modules": modules, **options})


class BertForNextSentencePrediction(BertHeadModel):
    """BERT that predicts whether the second sentence follows the first."""

    head = "ForNextSentencePrediction"
    model_types = ("bert",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertOnlyNSPHead(config)
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
    ) -> NextSentencePredictorOutput | tuple[Any, ...]:
        """Predict whether the second sentence follows the first.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            labels: int64 (B,); 0 where the second sentence follows the first, 1 where it does not.

        Returns:
            logits (B, 2); loss where labels are given.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the labels do not fit.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        _check_container(self.cls)
        logits = self.cls.seq_relationship(encoded.pooled)
        loss = None if labels is None else mean_cross_entropy(logits, class_labels("labels", labels, logits))
        return self.format_output(NextSentencePredictorOutput(loss=loss, logits=logits, **encoded.states), return_dict)


class ElectraDiscriminatorPredictions(nn.Module):
    """One score for every token: dense_prediction(act(dense(x)))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)
        self.hidden_act = config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, E) -> (T, 1)."""
        logits: Tensor = self.dense_prediction(linear_activation(hidden, self.dense, self.hidden_act))
        return logits


class ElectraForPreTraining(BertHeadModel):
    """ELECTRA's discriminator, which predicts of every token whether it was replaced."""

    head = "ForPreTraining"
    model_types = ("electra",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.discriminator_predictions = ElectraDiscriminatorPredictions(config)
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
    ) -> ElectraForPreTrainingOutput | tuple[Any, ...]:
        """Predict of every token whether it was replaced.

        Args:
            input_ids ... inputs_embeds, options: see `BertModel.forward`.
            labels: int64, the shape of input_ids; 1 for a replaced token, 0 for others, -100 is ignored.

        Returns:
            logits (B, S), zeros at padding, for packed input (T,); loss where labels are given.

        Raises:
            TypeError, ValueError: as `BertModel.forward`, or the labels do not fit.
        """
        encoded = self.run_encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        token_logits = self.discriminator_predictions(encoded.hidden)
        loss = None
        if labels is not None:
            labels = encoded.tokens.select_labels("labels", labels, 2).unsqueeze(1)
            rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
            loss = mean_binary_cross_entropy(token_logits[rows], labels[rows])
        logits = encoded.tokens.restore(token_logits).squeeze(-1)
        return self.format_output(ElectraForPreTrainingOutput(loss=loss, logits=logits, **encoded.states), return_dict)
