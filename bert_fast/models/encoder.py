"""The encoder on packed tokens: embeddings, layers, pooler. Parameters have transformers' names, but for one packed
projection `qkv` (3E, E) in place of query, key and value.

A bias that a kernel adds stays a Parameter of its Linear and is left out of that Linear's matrix product.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from bert_fast.kernels import add_layer_norm, attention, embedding_layer_norm, linear
from bert_fast.kernels._common.checks import autocast_dtype
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels._common.philox import new_rng_state
from bert_fast.kernels.linear_int8.op import FEED_FORWARD
from bert_fast.models.config import GELU_ACTIVATIONS, BertConfig
from bert_fast.models.inputs import Tokens
from bert_fast.models.int8 import Int8Linear

_logger = logging.getLogger("bert_fast")
_EAGER: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh}
SITES_PER_LAYER = 3  # attention probabilities, attention output, layer output


class EncoderOutput(NamedTuple):
    """hidden (T, E); hidden_states, L + 1 of (T, E), and attentions, L of (B, N, max_seqlen, max_seqlen), or empty."""

    hidden: Tensor
    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]


def project(x: Tensor, dense: nn.Linear | Int8Linear) -> Tensor:
    """A linear layer without its bias, which a kernel behind it adds: x (T, K) -> (T, N)."""
    return dense.run(x, None) if isinstance(dense, Int8Linear) else linear(x, dense.weight)


def activated(x: Tensor, dense: nn.Linear | Int8Linear, name: str) -> Tensor:
    """The activation called `name` in a configuration, of a linear layer: x (T, K) -> (T, N)."""
    gelu = GELU_ACTIVATIONS.get(name)
    if isinstance(dense, Int8Linear):
        out = dense.run(x, dense.bias, gelu)
    else:
        out = linear(x, dense.weight, dense.bias, activation=gelu)
    return _EAGER[name](out) if gelu is None else out


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
    """The tokens' embeddings, summed, normalised and dropped out by `rng_state` (None for no dropout): (T, E).

    `token_type` is None where there are no token types.
    """
    if tokens.inputs_embeds is not None:
        # The given vectors are a table of their own, of which token t takes row t.
        table = tokens.inputs_embeds
        ids = torch.arange(table.shape[0], device=table.device)
        padding_idx = None
    else:
        assert tokens.input_ids is not None
        table, ids, padding_idx = word.weight, tokens.input_ids, word.padding_idx
    return embedding_layer_norm(
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


def _without_gradient_at_padding(table: nn.Embedding) -> Tensor:
    """The rows of `table`; that of its padding_idx gets no gradient, as in nn.Embedding."""
    weight: Tensor = table.weight
    if table.padding_idx is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    rows = torch.arange(weight.shape[0], device=weight.device).unsqueeze(1)
    return torch.where(rows == table.padding_idx, weight.detach(), weight)


def add_norm(
    x: Tensor,
    residual: Tensor,
    dense: nn.Linear | Int8Linear,
    norm: nn.LayerNorm,
    *,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    """The end of a sublayer: x (T, E), projected by `dense` without its bias, which is added here; dropped out, added
    to residual (T, E) and normalised."""
    return add_layer_norm(
        x,
        residual,
        norm.weight,
        norm.bias,
        x_bias=dense.bias,
        dropout_p=0.0 if rng_state is None else dropout_p,
        eps=norm.eps,
        rng_state=rng_state,
    )


class BertEmbeddings(nn.Module):
    """Word, position and token type embeddings, their LayerNorm and dropout."""

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
    """The packed projection and the attention of every head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.heads = config.num_attention_heads
        self.head_size = config.head_size
        self.dropout_p = config.attention_probs_dropout_prob

    def project(self, hidden: Tensor) -> Tensor:
        """(T, E) -> (T, 3, N, D), without the bias."""
        return project(hidden, self.qkv).view(-1, 3, self.heads, self.head_size)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int, rng_state: Tensor | None) -> Tensor:
        """(T, E) -> (T, E)."""
        out = attention(
            self.project(hidden),
            cu_seqlens,
            max_seqlen,
            bias=self.qkv.bias.view(3, self.heads, self.head_size),
            dropout_p=0.0 if rng_state is None else self.dropout_p,
            rng_state=rng_state,
        )
        return out.reshape(hidden.shape)

    def probabilities(self, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The attention probabilities before dropout, dense: (B, N, max_seqlen, max_seqlen), zeros past a length."""
        _say_dense_attentions()
        qkv = self.project(hidden)
        qkv = qkv + self.qkv.bias.view(3, self.heads, self.head_size).to(qkv.dtype)
        B, N = cu_seqlens.shape[0] - 1, self.heads
        out = qkv.new_zeros(B, N, max_seqlen, max_seqlen)
        for b, one in enumerate(qkv.split(cu_seqlens.diff().tolist())):
            q, k = one[:, 0].transpose(0, 1), one[:, 1].transpose(0, 1)  # (N, S, D)
            scores = q @ k.transpose(1, 2) * self.head_size**-0.5
            out[b, :, : one.shape[0], : one.shape[0]] = scores.softmax(dim=-1)
        return out


@lru_cache(maxsize=1)
def _say_dense_attentions() -> None:
    _logger.warning(
        "output_attentions=True: the attention probabilities are computed a second time, densely, by eager PyTorch; "
        "the kernels never hold them"
    )


class BertSelfOutput(nn.Module):
    """Projection of the attention's output, dropout, residual and LayerNorm."""

    def __init__(self, config: BertConfig, in_features: int | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features or config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor, rng_state: Tensor | None) -> Tensor:
        """x (T, E) or (T, F), residual (T, E) -> (T, E)."""
        return self.finish(project(x, self.dense), residual, rng_state)

    def finish(self, x: Tensor, residual: Tensor, rng_state: Tensor | None) -> Tensor:
        """What stands behind the projection: x (T, E), residual (T, E) -> (T, E)."""
        return add_norm(x, residual, self.dense, self.LayerNorm, dropout_p=self.dropout_p, rng_state=rng_state)


class BertOutput(BertSelfOutput):
    """Projection back from the intermediate size, dropout, residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.intermediate_size)


class BertAttention(nn.Module):
    """Self-attention with its output block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)


class BertIntermediate(nn.Module):
    """Projection to the intermediate size and the activation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, E) -> (T, F)."""
        return activated(hidden, self.dense, self.hidden_act)


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
        wanted: Tensor | None = None,
        calls: Calls | None = None,
    ) -> Tensor:
        """(T, E) -> (T, E), or (R, E) of the rows `wanted`, int64 (R,): behind the attention no others are computed.

        `rng_states` int64 (3, 2), a row for each place of dropout, or None for no dropout. With `calls`, which is for
        inference, those compute a layer whose modules are as it made them.
        """
        if calls is not None and (plain := PlainLayer.of(self, hidden)) is not None:
            return plain.run(calls, hidden, cu_seqlens, max_seqlen)
        states = (None, None, None) if rng_states is None else rng_states.unbind(0)
        attended = self.attention.self(hidden, cu_seqlens, max_seqlen, states[0])
        if wanted is not None:
            attended, hidden = attended.index_select(0, wanted), hidden.index_select(0, wanted)
        attended = self.attention.output(attended, hidden, states[1])
        up, down, gelu = self.intermediate.dense, self.output.dense, GELU_ACTIVATIONS.get(self.intermediate.hidden_act)
        if isinstance(up, Int8Linear) and isinstance(down, Int8Linear) and gelu is not None:
            return self.output.finish(up.feed_forward(attended, down, gelu), attended, states[2])
        out: Tensor = self.output(self.intermediate(attended), attended, states[2])
        return out


class Calls(NamedTuple):
    """What computes each operation of a layer in inference."""

    linear: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    add_layer_norm: Callable[..., Tensor]

    @classmethod
    def of(cls, hidden: Tensor) -> Calls | None:
        """What impl="auto" takes for `hidden` (T, E).

        None with gradients, under autocast, while tracing and with hooks on every module: there layers go through the
        ops' doors.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_any_global_hook():
            return None
        if autocast_dtype(hidden) is not None:
            return None
        return cls(*(OPS[op].select("auto", hidden) for op in cls._fields))


class Projection(NamedTuple):
    """A linear layer as its implementation takes it."""

    weight: tuple[Tensor, ...]  # of 8 bits: values, scale and sums
    bias: Tensor
    rest: tuple[Tensor | None, ...]  # of 8 bits: the range of its input

    @classmethod
    def of(cls, dense: nn.Linear | Int8Linear) -> Projection:
        """Raises LookupError where calling the module does something else."""
        if isinstance(dense, nn.Linear):
            weight, bias = _tensors(dense._parameters, "weight", "bias")
            return cls((weight,), bias, ())
        if dense.training or dense.observed is not None:
            raise LookupError
        *weights, bias = _tensors(dense._buffers, "values", "scale", "sums", "bias")
        return cls(tuple(weights), bias, (dense._buffers["input_range"],))


class PlainLayer(NamedTuple):
    """What a BertLayer computes with in inference.

    The ops' doors check what they are given, and modules look for their attributes: in every layer of a short text
    that takes a sixth of MiniLM's time. Here all is looked up and checked at once; the result is the same to the bit.
    """

    heads: int
    head_size: int
    gelu: str
    projections: list[Projection]  # to queries, keys and values; back from them; to the intermediate size; back from it
    norms: list[tuple[Tensor, Tensor, float]]  # behind attention and behind the layer: weight, bias, eps

    @classmethod
    def of(cls, layer: BertLayer, hidden: Tensor) -> PlainLayer | None:
        """None where a hook, a module of another kind or another activation wants the modules to be called, or where
        parameters don't fit hidden (T, E), of which the doors say more."""
        try:
            attention, intermediate, output = _plain(layer, "attention", "intermediate", "output")
            own, projection = _plain(attention, "self", "output")
            (qkv,), (up,) = _plain(own, "qkv"), _plain(intermediate, "dense")
            dense, attention_norm = _plain(projection, "dense", "LayerNorm")
            down, norm = _plain(output, "dense", "LayerNorm")
            projections = [Projection.of(module) for module in (qkv, dense, up, down)]
            norms = [(*_tensors(x._parameters, "weight", "bias"), x.eps) for x in (attention_norm, norm)]
            gelu = GELU_ACTIVATIONS[intermediate.hidden_act]
        except LookupError:
            return None
        tensors = [x for one in projections for x in (one.weight[0], one.bias)]
        tensors += [x for gain, shift, _ in norms for x in (gain, shift)]
        E, F = hidden.shape[1], up.out_features
        shapes = [(3 * E, E), (3 * E,), (E, E), (E,), (F, E), (F,), (E, F), (E,), (E,), (E,), (E,), (E,)]
        if [x.shape for x in tensors] != shapes or any(x.device != hidden.device for x in tensors):
            return None
        if len({len(one.weight) for one in projections}) > 1:
            return None
        return cls(own.heads, own.head_size, gelu, projections, norms)

    def run(self, calls: Calls, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, E) -> (T, E)."""
        (qkv, dense, up, down), (first, last) = self.projections, self.norms
        int8 = len(qkv.weight) > 1
        product = OPS["linear_int8"].select("auto", hidden) if int8 else calls.linear
        heads, scale = (3, self.heads, self.head_size), 1.0 / math.sqrt(self.head_size)
        x = product(hidden, qkv.weight, None, None, *qkv.rest).view(-1, *heads)
        x = calls.attention(x, qkv.bias.view(heads), cu_seqlens, max_seqlen, scale, 0.0, None).flatten(1)
        x = product(x, dense.weight, None, None, *dense.rest)
        gain, shift, eps = first
        hidden = calls.add_layer_norm(x, hidden, gain, shift, dense.bias, 0.0, eps, None)
        del x  # its memory goes into the next products
        if int8:
            feed_forward = FEED_FORWARD[product]
            x = feed_forward(hidden, up.weight, up.bias, down.weight, self.gelu, *up.rest, *down.rest)
        else:
            x = product(product(hidden, up.weight, up.bias, self.gelu), down.weight, None, None)
        gain, shift, eps = last
        return calls.add_layer_norm(x, hidden, gain, shift, down.bias, 0.0, eps, None)


_CONTAINERS = (BertAttention, BertSelfAttention, BertSelfOutput, BertIntermediate, BertOutput)
_PLAIN = (*_CONTAINERS, nn.Linear, Int8Linear, nn.LayerNorm)


def _plain(module: nn.Module, *names: str) -> list[Any]:
    """The children called `names`; LookupError unless calling them does nothing but what their class says."""
    # An attribute of an nn.Module takes 1.3 us, an entry of its dictionaries a tenth of that.
    children: list[Any] = [module._modules.get(name) for name in names]
    for child in children:
        if type(child) not in _PLAIN or child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
            raise LookupError
    return children


def _tensors(of: dict[str, Any], *names: str) -> list[Tensor]:
    """The tensors called `names`; LookupError where one is absent."""
    found = [of[name] for name in names]
    if any(x is None for x in found):
        raise LookupError
    return found


class BertEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden: Tensor,
        tokens: Tokens,
        rng_states: Tensor | None,
        *,
        wanted: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """(T, E) -> (T, E), or (R, E) of the rows `wanted`; `rng_states` int64 (3L, 2), or None for no dropout."""
        states, attentions = [hidden], []
        calls = Calls.of(hidden) if rng_states is None and wanted is None else None
        sequences = (tokens.cu_seqlens, tokens.max_seqlen)
        for index, layer in enumerate(self.layer):
            rows = None if rng_states is None else rng_states[SITES_PER_LAYER * index :][:SITES_PER_LAYER]
            last = wanted if index == len(self.layer) - 1 else None
            if output_attentions:
                assert isinstance(layer, BertLayer)
                attentions.append(layer.attention.self.probabilities(hidden, *sequences))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The dropout of the second run is that of the first: it depends on `rows` only.
                hidden = checkpoint(
                    layer, hidden, *sequences, rows, last, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = layer(hidden, *sequences, rows, last, calls)
            if output_hidden_states:
                states.append(hidden)
        return EncoderOutput(hidden, tuple(states) if output_hidden_states else (), tuple(attentions))


class BertPooler(nn.Module):
    """tanh of a projection of the first token, [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """(B, E) -> (B, E)."""
        return torch.tanh(self.dense(first))


def draw_rng_states(config: BertConfig, device: torch.device) -> Tensor | None:
    """One draw of the generator's state for every place of dropout in the encoder: int64 (1 + 3L, 2).

    None where the configuration has no dropout, so that nothing is drawn.
    """
    if config.hidden_dropout_prob == 0.0 and config.attention_probs_dropout_prob == 0.0:
        return None
    return new_rng_state(device, 1 + SITES_PER_LAYER * config.num_hidden_layers)
