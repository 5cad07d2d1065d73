"""`BertModel`, the encoder, and the base class of the models with a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from bert_fast.kernels._common.checks import check_integer, check_range, check_same_device, check_shape
from bert_fast.models.base import BertPreTrainedModel
from bert_fast.models.config import BertConfig
from bert_fast.models.embedding import encode
from bert_fast.models.encoder import DROPOUTS_PER_LAYER, BertEncoder, draw_rng_states
from bert_fast.models.inputs import Tokens
from bert_fast.models.layers import BertEmbeddings, BertPooler, linear_bias
from bert_fast.models.loading import check_flags
from bert_fast.models.outputs import BaseModelOutputWithPooling

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack


class OutputFlags(TypedDict, total=False):
    """Optional outputs of a forward; None for the configuration's setting."""

    output_attentions: bool | None
    output_hidden_states: bool | None


class EncoderOptions(OutputFlags, total=False):
    """The keywords that every head passes to `BertModel`; cu_seqlens and max_seqlen are for packed input."""

    cu_seqlens: Tensor | None
    max_seqlen: int | None
    rng_states: Tensor | None


class PackedOutput(NamedTuple):
    """What the encoder returns to a head."""

    tokens: Tokens
    hidden: Tensor  # (T, E)
    pooled: Tensor | None  # (B, E)
    states: dict[str, tuple[Tensor, ...] | None]  # hidden_states and attentions, in the shape of the input


class BertModel(BertPreTrainedModel):
    """The encoder of every architecture.

    Args:
        config: the settings.
        add_pooling_layer: whether to pool the first token; DistilBERT and ELECTRA never do.
    """

    init_arguments = ("add_pooling_layer",)
    modules_kind = "SentenceTransformer"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        check_flags(add_pooling_layer=add_pooling_layer)
        self.embeddings = BertEmbeddings(config)
        projected = config.input_size != config.hidden_size
        self.embeddings_project = nn.Linear(config.input_size, config.hidden_size) if projected else None
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer and config.architecture.pooler else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        label_rows: Tensor | None = None,
        rng_states: Tensor | None = None,
        return_dict: bool | None = None,
        **flags: Unpack[OutputFlags],
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode padded or packed input.

        Padding is removed once, before the embeddings; in the output it is zeros.

        Args:
            input_ids ... inputs_embeds, cu_seqlens, max_seqlen: see `bert_fast.models.inputs.Inputs`.
            label_rows: int64 (M,), for packed input: the tokens that will have a loss. The last layer is computed at
                these and at the first tokens only, and last_hidden_state is (M, E), theirs.
            rng_states: int64 (1 + 3L, 2), the dropout states (seed, offset) of the embeddings and of three places in
                every layer; None to draw them from torch's generator. Only used in training mode.
            return_dict: False for a tuple.
            output_hidden_states: also return the embeddings' and every layer's output.
            output_attentions: also return every layer's attention probabilities before dropout, (B, N, S, S).

        Returns:
            last_hidden_state (B, S, E), for packed input (T, E); pooler_output (B, E), from each sequence's first real
            token; hidden_states and attentions where requested.

        Raises:
            TypeError: an input has another type or dtype, or a keyword is unknown.
            ValueError: a shape, a device or a value is wrong, or inputs contradict each other.
        """
        tokens = Tokens.from_inputs(
            self.config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        rng_states = self._rng_states(rng_states, tokens.cu_seqlens.device)
        hidden = self.embeddings(tokens, None if rng_states is None else rng_states[0])
        if self.embeddings_project is not None:
            hidden = linear_bias(hidden, self.embeddings_project)
        output_rows = None if label_rows is None else _first_and_label_rows(tokens, label_rows)
        encoded = self.encoder(
            hidden,
            tokens,
            None if rng_states is None else rng_states[1:],
            output_rows=output_rows,
            output_hidden_states=self._flag("output_hidden_states", **flags),
            output_attentions=self._flag("output_attentions", **flags),
        )
        hidden, first = encoded.hidden, None
        if output_rows is not None:
            first, hidden = hidden.split([tokens.batch_size, output_rows.shape[0] - tokens.batch_size])
            first = first.masked_fill(tokens.cu_seqlens.diff().eq(0).unsqueeze(1), 0.0)
        elif self.pooler is not None:
            first = tokens.first(hidden)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens.restore(hidden),
            pooler_output=None if self.pooler is None else self.pooler(first),
            hidden_states=_restore_all(tokens.restore, encoded.hidden_states),
            attentions=_restore_all(tokens.restore_attentions, encoded.attentions),
        )
        return self.format_output(output, return_dict)

    def _rng_states(self, rng_states: Tensor | None, device: torch.device) -> Tensor | None:
        """`rng_states`, checked, or drawn where they are None; None outside of training."""
        if rng_states is None or not self.training:
            return draw_rng_states(self.config, device) if self.training else None
        check_integer("rng_states", rng_states, (torch.int64,))
        check_shape("rng_states", rng_states, (1 + DROPOUTS_PER_LAYER * self.config.num_hidden_layers, 2))
        return rng_states

    def encode(
        self, texts: str | Iterable[str], *, tokenizer: Any = None, **options: Any
    ) -> Tensor | np.ndarray[Any, Any]:
        """Embed texts: `bert_fast.models.embedding.encode` with this model, as the folder says it was loaded from.

        For a folder of sentence-transformers, the vectors are those of its SentenceTransformer.

        Args:
            texts, options: see `bert_fast.models.embedding.encode`.
            tokenizer: None for the tokenizer of the folder or repository that the model was loaded from.

        Returns:
            (len(texts), D) float32 on the CPU, in the order of `texts`; (D,) for a str.

        Raises:
            TypeError, ValueError, ImportError: as `encode`; ValueError also where there is no tokenizer.
        """
        tokenizer = self.source_tokenizer() if tokenizer is None else tokenizer
        return encode(self, tokenizer, texts, **{"modules": self.modules_of_texts, **options})

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Tensor | np.ndarray[Any, Any]:
        """`encode` with the prompt "query" of the folder, and its maximum length for queries; see `encode`."""
        return self.encode(texts, **{"task": "query", **options})

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Tensor | np.ndarray[Any, Any]:
        """`encode` with the prompt "document" of the folder, and its maximum length for documents; see `encode`."""
        return self.encode(texts, **{"task": "document", **options})

    def _flag(self, name: str, **flags: Unpack[OutputFlags]) -> bool:
        unknown = flags.keys() - OutputFlags.__annotations__.keys()
        if unknown:
            hint = " (transformers' Trainer needs transformers' model: use bert_fast.fuse)"
            trainer = hint if "num_items_in_batch" in unknown else ""
            raise TypeError(f"forward got an unexpected keyword: {', '.join(sorted(unknown))}{trainer}")
        requested = flags.get(name)
        return bool(getattr(self.config, name) if requested is None else requested)


def _restore_all(restore: Callable[[Tensor], Tensor], states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    return tuple(restore(state) for state in states) if states else None


def _first_and_label_rows(tokens: Tokens, label_rows: Tensor) -> Tensor:
    """The rows of the sequences' first tokens, then `label_rows`, checked."""
    T = tokens.token_type_ids.shape[0]
    if tokens.shape is not None or T == 0:
        raise ValueError("label_rows came with padded or empty input; expected packed tokens, with cu_seqlens")
    check_integer("label_rows", label_rows, (torch.int64,))
    check_shape("label_rows", label_rows, ("M",))
    check_same_device(tokens.cu_seqlens, label_rows=label_rows)
    check_range("label_rows", label_rows, T, "the number of tokens")
    return torch.cat([tokens.cu_seqlens[:-1].long().clamp(max=T - 1), label_rows])


class BertHeadModel(BertPreTrainedModel):
    """Base class of the models with a head; the encoder is `bert`, and runs on packed tokens."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=add_pooling_layer)

    def run_encoder(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        label_rows: Tensor | None = None,
        rng_states: Tensor | None = None,
        **flags: Unpack[OutputFlags],
    ) -> PackedOutput:
        """Remove padding and run the encoder; the arguments are those of `BertModel.forward`.

        The packed tokens go through its forward, so that hooks on the encoder run.
        """
        tokens = Tokens.from_inputs(
            self.config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        if label_rows is not None:
            _first_and_label_rows(tokens, label_rows)  # checked here: the encoder never sees padded input
        output = self.bert(
            **tokens.as_inputs(), label_rows=label_rows, rng_states=rng_states, return_dict=True, **flags
        )
        states = {
            "hidden_states": _restore_all(tokens.restore, output.hidden_states),
            "attentions": _restore_all(tokens.restore_attentions, output.attentions),
        }
        return PackedOutput(tokens, output.last_hidden_state, output.pooler_output, states)
