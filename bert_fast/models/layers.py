"""The modules of the encoder, on packed tokens: embeddings, attention, feed-forward, pooler.

Parameters have transformers' names, except that query, key and value are one projection `qkv` (3E, E).

A bias that the next kernel adds stays a Parameter of its Linear and is left out of that Linear's matrix product. A leaf
module that is not plain (`bert_fast.models.plain`) is called, and eager PyTorch computes what the kernel would have.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor, nn

from bert_fast.kernels import add_layer_norm, attention, embedding_layer_norm, linear
from bert_fast.kernels._common.checks import compute_dtype
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.models.activations import ACTIVATIONS, GELU_ACTIVATIONS
from bert_fast.models.config import BertConfig
from bert_fast.models.inputs import Tokens
from bert_fast.models.int8 import Int8Linear, attention_dtype
from bert_fast.models.plain import is_plain, is_plain_embedding, is_plain_norm, requires_input_gradient

_logger = logging.getLogger("bert_fast")


def linear_defer_bias(x: Tensor, dense: nn.Module, *, to_attention: bool = False) -> tuple[Tensor, Tensor | None]:
    """A linear layer whose bias the next kernel adds.

    Args:
        x: (T, K).
        dense: an nn.Linear or Int8Linear, or any module in the place of one.
        to_attention: the result is queries, keys and values, which an Int8Linear returns in `attention_dtype`.

    Returns:
        x weight^T (T, N) and the bias (N,); or dense(x) and None where `dense` is not plain.
    """
    if is_plain(dense, nn.Linear):
        return linear(x, dense.weight), dense.bias
    if is_plain(dense, Int8Linear):
        return dense.run(x, None, dtype=attention_dtype(x) if to_attention else None), dense.bias
    return _call(dense, x), None


def linear_bias(x: Tensor, dense: nn.Module) -> Tensor:
    """dense(x): x (T, K) -> (T, N)."""
    return linear(x, dense.weight, dense.bias) if is_plain(dense, nn.Linear) else _call(dense, x)


def linear_activation(x: Tensor, dense: nn.Module, hidden_act: str) -> Tensor:
    """act(dense(x)): x (T, K) -> (T, N); `hidden_act` as in the configuration."""
    gelu = GELU_ACTIVATIONS.get(hidden_act)
    if is_plain(dense, nn.Linear):
        out = linear(x, dense.weight, dense.bias, activation=gelu)
    elif is_plain(dense, Int8Linear):
        out = dense.run(x, dense.bias, gelu)
    else:
        return ACTIVATIONS[hidden_act](_call(dense, x))
    return ACTIVATIONS[hidden_act](out) if gelu is None else out


def add_norm(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    norm: nn.LayerNorm,
    *,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    """The end of a sublayer: norm(residual + dropout(x + x_bias)).

    Args:
        x, residual: (T, E).
        x_bias: (E,), as `linear_defer_bias` returns it.
        norm: a LayerNorm, or any module in the place of one.
        rng_state: int64 (2,), or None for no dropout.

    Returns:
        (T, E).
    """
    if is_plain_norm(norm):
        return add_layer_norm(
            x,
            residual,
            norm.weight,
            norm.bias,
            x_bias=x_bias,
            dropout_p=0.0 if rng_state is None else dropout_p,
            eps=norm.eps,
            rng_state=rng_state,
        )
    x = x if x_bias is None else x + x_bias.to(x.dtype)
    return _call(norm, residual + _dropout(x, dropout_p, rng_state))


def embed(
    tokens: Tokens,
    word: nn.Embedding,
    token_type: nn.Embedding | None,
    position: nn.Embedding,
    norm: nn.LayerNorm,
    *,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    """dropout(norm(word + position + token type)) of every token: (T, E).

    Args:
        token_type: None where the architecture has no token types.
        rng_state: int64 (2,), or None for no dropout.
    """
    tables = [table for table in (word, position, token_type) if table is not None]
    if not (is_plain_norm(norm) and all(map(is_plain_embedding, tables))):
        summed = word(tokens.input_ids) if tokens.inputs_embeds is None else tokens.inputs_embeds
        summed = summed + position(tokens.position_ids)
        summed = summed if token_type is None else summed + token_type(tokens.token_type_ids)
        return _dropout(_call(norm, summed), dropout_p, rng_state)
    if tokens.inputs_embeds is not None:
        # The vectors are a table of their own, of which token t takes row t.
        table = tokens.inputs_embeds
        ids = torch.arange(table.shape[0], device=table.device)
        padding_idx = None
    else:
        assert tokens.input_ids is not None
        table, ids, padding_idx = word.weight, tokens.input_ids, word.padding_idx
    hidden = embedding_layer_norm(
        ids,
        tokens.token_type_ids,
        tokens.position_ids,
        table,
        word.weight.new_zeros(1, word.embedding_dim) if token_type is None else token_type.weight,
        _without_gradient_at_padding(position),
        norm.weight,
        norm.bias,
        dropout_p=0.0 if rng_state is None else dropout_p,
        eps=norm.eps,
        rng_state=rng_state,
        padding_idx=padding_idx,
    )
    if requires_input_gradient(word) and torch.is_grad_enabled():
        hidden.requires_grad_()
    return hidden


def _without_gradient_at_padding(table: nn.Embedding) -> Tensor:
    """The rows of `table`; that of its padding_idx gets no gradient, as in nn.Embedding."""
    weight: Tensor = table.weight
    if table.padding_idx is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    rows = torch.arange(weight.shape[0], device=weight.device).unsqueeze(1)
    return torch.where(rows == table.padding_idx, weight.detach(), weight)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in the dtype that a kernel would return."""
    out: Tensor = module(x)
    return out.to(compute_dtype(x))


def _dropout(x: Tensor, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """The dropout of the kernels, in eager PyTorch: gradient checkpointing repeats it."""
    if rng_state is None:
        return x
    return x * dropout_multiplier(rng_state, dropout_p, 1, *x.shape)[0].to(x.dtype)


class BertEmbeddings(nn.Module):
    """Word, position and token type embeddings, LayerNorm and dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        E = config.input_size
        self.word_embeddings = nn.Embedding(config.vocab_size, E, padding_idx=config.pad_token_id)
        padding_idx = config.first_position - 1 if config.first_position else None
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, E, padding_idx=padding_idx)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, E) if config.type_vocab_size else None
        self.LayerNorm = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, tokens: Tokens, rng_state: Tensor | None) -> Tensor:
        """(T, config.input_size); `rng_state` int64 (2,), or None for no dropout."""
        return embed(
            tokens,
            self.word_embeddings,
            self.token_type_embeddings,
            self.position_embeddings,
            self.LayerNorm,
            dropout_p=self.dropout_p,
            rng_state=rng_state,
        )


class BertSelfAttention(nn.Module):
    """The packed projection to queries, keys and values, and the attention of every head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.heads = config.num_attention_heads
        self.head_size = config.head_size
        self.dropout_p = config.attention_probs_dropout_prob

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, E) -> queries, keys and values (T, 3, N, D), and the bias (3, N, D) that is still to be added."""
        qkv, bias = linear_defer_bias(hidden, self.qkv, to_attention=True)
        shape = (3, self.heads, self.head_size)
        return qkv.view(-1, *shape), None if bias is None else bias.view(shape)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int, rng_state: Tensor | None) -> Tensor:
        """(T, E) -> (T, E)."""
        qkv, bias = self.project(hidden)
        out = attention(
            qkv,
            cu_seqlens,
            max_seqlen,
            bias=bias,
            dropout_p=0.0 if rng_state is None else self.dropout_p,
            rng_state=rng_state,
        )
        return out.flatten(1).to(compute_dtype(hidden))

    def probabilities(self, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The attention probabilities before dropout, dense: (B, N, max_seqlen, max_seqlen), zeros past a length."""
        _warn_dense_attentions()
        qkv, bias = self.project(hidden)
        qkv = qkv.to(compute_dtype(hidden))
        qkv = qkv if bias is None else qkv + bias.to(qkv.dtype)
        B, N = cu_seqlens.shape[0] - 1, self.heads
        out = qkv.new_zeros(B, N, max_seqlen, max_seqlen)
        for b, sequence in enumerate(qkv.split(cu_seqlens.diff().tolist())):
            S = sequence.shape[0]
            q, k = sequence[:, 0].transpose(0, 1), sequence[:, 1].transpose(0, 1)  # (N, S, D)
            scores = q @ k.transpose(1, 2) * self.head_size**-0.5
            out[b, :, :S, :S] = scores.softmax(dim=-1)
        return out


@lru_cache(maxsize=1)
def _warn_dense_attentions() -> None:
    _logger.warning(
        "output_attentions=True: eager PyTorch computes the attention probabilities a second time, densely; the "
        "kernels never store them"
    )


class BertSelfOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config: BertConfig, in_features: int | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features or config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor, rng_state: Tensor | None) -> Tensor:
        """x (T, E) or (T, F), residual (T, E) -> (T, E)."""
        out, bias = linear_defer_bias(x, self.dense)
        return add_norm(out, bias, residual, self.LayerNorm, dropout_p=self.dropout_p, rng_state=rng_state)


class BertOutput(BertSelfOutput):
    """The same, from the intermediate size."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.intermediate_size)


class BertAttention(nn.Module):
    """Self-attention and its output block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng_states: tuple[Tensor | None, Tensor | None],
        output_rows: Tensor | None,
    ) -> Tensor:
        """(T, E) -> (T, E), or (R, E) of `output_rows`, int64 (R,)."""
        out = self.self(hidden, cu_seqlens, max_seqlen, rng_states[0])
        if output_rows is not None:
            out, hidden = out.index_select(0, output_rows), hidden.index_select(0, output_rows)
        out = self.output(out, hidden, rng_states[1])
        return out


class BertIntermediate(nn.Module):
    """act(dense(x)), to the intermediate size."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, E) -> (T, F)."""
        return linear_activation(hidden, self.dense, self.hidden_act)


class BertLayer(nn.Module):
    """One layer on packed tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng_states: Tensor | None,
        output_rows: Tensor | None = None,
    ) -> Tensor:
        """One encoder layer.

        Args:
            hidden: (T, E).
            cu_seqlens, max_seqlen: see `bert_fast.models.inputs.Tokens`.
            rng_states: int64 (3, 2), a row for each place of dropout, or None for no dropout.
            output_rows: int64 (R,), the only rows to compute after the attention; None for all.

        Returns:
            (T, E), or (R, E).
        """
        states = (None, None, None) if rng_states is None else rng_states.unbind(0)
        hidden = self.attention(hidden, cu_seqlens, max_seqlen, states[:2], output_rows)
        feed_forward = self._int8_feed_forward(hidden)
        if feed_forward is None:
            return self.output(self.intermediate(hidden), hidden, states[2])
        down, norm, dropout_p = self.output.dense, self.output.LayerNorm, self.output.dropout_p
        return add_norm(feed_forward, down.bias, hidden, norm, dropout_p=dropout_p, rng_state=states[2])

    def _int8_feed_forward(self, hidden: Tensor) -> Tensor | None:
        """Both INT8 products in one call, without the second bias: (T, E) -> (T, E); None for other layers."""
        if not (is_plain(self.intermediate, BertIntermediate) and is_plain(self.output, BertOutput)):
            return None
        up, down, gelu = self.intermediate.dense, self.output.dense, GELU_ACTIVATIONS.get(self.intermediate.hidden_act)
        if gelu is None or not (is_plain(up, Int8Linear) and is_plain(down, Int8Linear)):
            return None
        return up.feed_forward(hidden, down, gelu)


class BertPooler(nn.Module):
    """tanh(dense(x)) of the first token, [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """(B, E) -> (B, E)."""
        return torch.tanh(linear_bias(first, self.dense))  # the op: a row's bits don't depend on the other rows
