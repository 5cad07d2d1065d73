"""The forward that a fused model has: transformers' modules on packed tokens. Imported only where transformers is.

Its ...ForQuestionAnswering has one too, since its softmax is over the tokens, padding among them.

The weights are those of transformers' modules, read at every call. A module that is what transformers made goes into a
kernel; one that somebody wrapped (LoRA, quantisation) is called itself, on the packed tokens, since all of them work
token by token.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    QuestionAnsweringModelOutput,
)

from bert_fast.integrations.layouts import End, Layout, Parts, layout_of, layouts
from bert_fast.integrations.reasons import (
    droppable,
    first_position,
    plain,
    plain_linear,
    plain_norm,
    wants_input_gradient,
    why_not_taken,
)
from bert_fast.kernels import add_layer_norm, attention, linear
from bert_fast.kernels._common.checks import autocast_dtype
from bert_fast.kernels._common.philox import new_rng_state
from bert_fast.models.config import GELU_ACTIVATIONS
from bert_fast.models.encoder import SITES_PER_LAYER, add_norm, embed, project
from bert_fast.models.inputs import Tokens
from bert_fast.models.int8 import Int8Linear
from bert_fast.threads import settle_after_fork

# The class of the activation -> the `activation` argument of linear.
_GELUS = {type(ACT2FN[name]): gelu for name, gelu in GELU_ACTIVATIONS.items() if name in ACT2FN}
_OF_THE_ANSWER = ("start_positions", "end_positions", "return_dict")
_classes: dict[type[nn.Module], type[nn.Module]] = {}
_said: set[str] = set()


class FusedBert:
    """Marks a generated class, and makes its objects picklable: they are made again from the class they had before."""

    own: type[nn.Module]
    layout: Layout

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_new, (type(self).own,), *reduced[2:])


def _new(own: type[nn.Module]) -> nn.Module:
    made = fused_class(own)
    return made.__new__(made)


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` changed this module's class."""
    return isinstance(module, FusedBert)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a fused module had before."""
    assert isinstance(module, FusedBert)
    return module.own


def reads_padding(module: Any) -> bool:
    """Whether this is a head over a fused encoder whose loss reads what the encoder returns at padding."""
    layout = next((one for one in layouts() if isinstance(module, one.answers)), None)
    if layout is None or type(module).forward is not layout.answers.forward or "forward" in module.__dict__:
        return False
    return is_fused(getattr(module, layout.base))


def fused_class(own: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of `own`, an encoder model or one for question answering, that goes with our kernels.

    It goes by the name of `own`: transformers writes a model's class into config.json and keeps tables by it.
    """
    if own not in _classes:
        _classes[own] = _make_class(own)
    return _classes[own]


def _make_class(own: type[nn.Module]) -> type[nn.Module]:
    original: Callable[..., Any] = own.forward
    parameters = inspect.signature(original).parameters
    named = [name for name, one in parameters.items() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]

    tuple_keeps_none = "return_dict" in named
    layout = layout_of(own)
    assert layout is not None
    ours = _answers if issubclass(own, layout.answers) else _encoded

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(named) or any(name in kwargs for name in named[: len(args)]):
            return original(self, *args, **kwargs)  # which says what is wrong
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        if not torch.compiler.is_compiling():
            settle_after_fork()
        return ours(self, original, given, tuple_keeps_none=tuple_keeps_none)

    body = {"forward": forward, "own": own, "layout": layout, "__doc__": own.__doc__}
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (FusedBert, own), {**body, **names})


@torch.compiler.assume_constant_result
def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"bert_fast.fuse: this call runs transformers' own forward, because {reason}", UserWarning, stacklevel=6
        )


def _encoded(model: Any, original: Callable[..., Any], given: dict[str, Any], *, tuple_keeps_none: bool) -> Any:
    reason = why_not_taken(model, model.layout, given)
    if reason is None:
        return _forward(model, given, tuple_keeps_none=tuple_keeps_none)
    _say_once(reason)
    return original(model, **given)


def _answers(model: Any, original: Callable[..., Any], given: dict[str, Any], *, tuple_keeps_none: bool) -> Any:
    """...ForQuestionAnswering where the encoder leaves padding out: so does the softmax over the tokens."""
    mask, encoder = given.get("attention_mask"), getattr(model, model.layout.base)
    positions = [given.get(f"{end}_positions") for end in ("start", "end")]
    inputs = {name: x for name, x in given.items() if name not in _OF_THE_ANSWER}
    if mask is None or not is_fused(encoder) or why_not_taken(encoder, encoder.layout, inputs) is not None:
        return original(model, **given)
    output = original(model, **inputs, return_dict=True)
    padding = mask == 0
    losses = []
    for name, wanted in zip(("start_logits", "end_logits"), positions, strict=True):
        logits = output[name].masked_fill(padding, torch.finfo(output[name].dtype).min)
        output[name] = logits
        if wanted is not None:
            # Like transformers, a position past the end is left out; so is one at padding.
            wanted = wanted.reshape(-1).clamp(0, logits.shape[1])
            outside = F.pad(padding, (0, 1), value=True).gather(1, wanted[:, None])[:, 0]
            losses.append(F.cross_entropy(logits, wanted.masked_fill(outside, -100)))
    loss = (losses[0] + losses[1]) / 2 if len(losses) == 2 else None
    output = QuestionAnsweringModelOutput(**{**output, "loss": loss})
    return output if _wants_dict(model.config, given, tuple_keeps_none) else output.to_tuple()


class _Sizes(NamedTuple):
    vocab_size: int
    input_size: int
    type_vocab_size: int
    max_position_embeddings: int
    first_position: int = 0


def _forward(model: Any, given: dict[str, Any], *, tuple_keeps_none: bool) -> Any:
    """What transformers' forward returns, for arguments that `why_not_taken` has nothing against."""
    config, layout = model.config, model.layout
    with_states = given.get("output_hidden_states")
    with_states = config.output_hidden_states if with_states is None else with_states
    hidden, tokens, rng_states = _embedded(model, given)
    states = [hidden]
    for index, layer in enumerate(getattr(model, layout.stack).layer):
        rows = None if rng_states is None else rng_states[1 + SITES_PER_LAYER * index :][:SITES_PER_LAYER]
        run = partial(_layer, layout.parts_of(layer), tokens.cu_seqlens, tokens.max_seqlen, rows)
        if layer.gradient_checkpointing and layer.training:
            # The dropout of the second run is that of the first: it depends on `rows` only.
            hidden = layer._gradient_checkpointing_func(run, hidden)
        else:
            hidden = run(hidden)
        states.append(hidden)

    # transformers' residual stream, and so its outputs, keep the parameters' dtype under autocast.
    norm_weight = getattr(model.embeddings.LayerNorm, "weight", hidden)
    wanted = norm_weight.dtype if autocast_dtype(hidden) else hidden.dtype
    restored = [tokens.restore(state.to(wanted)) for state in (states if with_states else states[-1:])]
    output: Any
    found: dict[str, Any] = {
        "last_hidden_state": restored[-1],
        "hidden_states": tuple(restored) if with_states else None,
    }
    if layout.pooler is None:
        made = BaseModelOutput if layout.base == "distilbert" else BaseModelOutputWithPastAndCrossAttentions
        output = made(**found)
        return output if _wants_dict(config, given, tuple_keeps_none) else output.to_tuple()
    pooled = None
    if model.pooler is not None and plain(model.pooler, layout.pooler):
        pooled = model.pooler(tokens.first(states[-1].to(wanted)).unsqueeze(1))
    elif model.pooler is not None:
        pooled = model.pooler(restored[-1])
    output = BaseModelOutputWithPoolingAndCrossAttentions(**found, pooler_output=pooled)
    if _wants_dict(config, given, tuple_keeps_none):
        return output
    # transformers 4.57 has the pooler's place in the tuple even where there is no pooler.
    return (
        (restored[-1], pooled, *output.to_tuple()[1:][pooled is not None :]) if tuple_keeps_none else output.to_tuple()
    )


def _wants_dict(config: Any, given: dict[str, Any], named: bool) -> bool:
    if named and given.get("return_dict") is None:
        return bool(config.use_return_dict)
    return given.get("return_dict", getattr(config, "return_dict", True)) is not False


def _embedded(model: Any, given: dict[str, Any]) -> tuple[Tensor, Tokens, Tensor | None]:
    """The real tokens' first states (T, E), the tokens, and the dropout states of every place, int64 (1 + 3L, 2)."""
    parts = model.embeddings
    token_type = getattr(parts, "token_type_embeddings", None)  # DistilBERT has none
    ids, embeds, mask = (given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    types, positions = (_rows(given.get(name)) for name in ("token_type_ids", "position_ids"))
    if _plain_embeddings(parts, token_type, embeds, model.layout):
        words, places = parts.word_embeddings, parts.position_embeddings
        sizes = _Sizes(
            words.num_embeddings,
            words.embedding_dim,
            0 if token_type is None else token_type.num_embeddings,
            places.num_embeddings,
            first_position(parts),
        )
        tokens = Tokens.of(
            sizes,
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            token_type_ids=types,
            position_ids=positions,
        )
        rng_states = _rng_states(model, tokens.cu_seqlens.device)
        hidden = embed(
            tokens,
            words,
            token_type,
            places,
            parts.LayerNorm,
            dropout_p=_p(parts.dropout),
            rng_state=None if rng_states is None else rng_states[0],
        )
        if wants_input_gradient(parts) and torch.is_grad_enabled():
            hidden.requires_grad_()
    else:
        # Somebody's wrapper or hook expects to see (B, S): run it so, and take the real tokens from what it returns.
        if token_type is None:  # whose arguments have other names in transformers 4.57
            out = parts(ids, embeds, *([] if positions is None else [positions]))
        else:
            out = parts(input_ids=ids, token_type_ids=types, position_ids=positions, inputs_embeds=embeds)
        tokens = Tokens.of(_Sizes(0, out.shape[2], 1, out.shape[1]), inputs_embeds=out, attention_mask=mask)
        assert tokens.inputs_embeds is not None
        hidden, rng_states = tokens.inputs_embeds, _rng_states(model, out.device)
    if hasattr(model, "embeddings_project"):  # ELECTRA
        hidden = model.embeddings_project(hidden)
    return hidden, tokens, rng_states


def _rows(ids: Tensor | None) -> Tensor | None:
    return ids.unsqueeze(0) if isinstance(ids, Tensor) and ids.dim() == 1 else ids


def _plain_embeddings(parts: Any, token_type: Any, embeds: Tensor | None, layout: Layout) -> bool:
    tables = [table for table in (parts.word_embeddings, parts.position_embeddings, token_type) if table is not None]
    if not (plain(parts, layout.embeddings) and plain_norm(parts.LayerNorm) and droppable(parts.dropout)):
        return False
    if any(
        not plain(table, nn.Embedding) or table.max_norm is not None or table.scale_grad_by_freq or table.sparse
        for table in tables
    ):
        return False
    dtype = tables[0].weight.dtype
    return (
        (token_type is None or token_type.padding_idx is None)
        and all(table.weight.dtype == dtype for table in tables[1:])
        and (embeds is None or embeds.dtype == dtype)
    )


def _p(dropout: nn.Module) -> float:
    """The probability with which `dropout` drops now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _attention_p(module: Any) -> float:
    # Where transformers hands attention to a function, the attention's own mode decides; where it calls the dropout
    # module (4.57, eager), that module's.
    as_argument = hasattr(module, "scaling") or hasattr(module, "dropout_prob")
    p: float = getattr(module, "dropout_prob", module.dropout.p if isinstance(module.dropout, nn.Dropout) else 0.0)
    return p if (module.training if as_argument else module.dropout.training) else 0.0


def _rng_states(model: Any, device: torch.device) -> Tensor | None:
    """One draw of the generator's state for every place of dropout, or None where nothing is dropped."""
    layers = [model.layout.parts_of(layer) for layer in getattr(model, model.layout.stack).layer]
    drops = _p(model.embeddings.dropout) > 0.0 or any(
        _attention_p(parts.attention) > 0.0 or _p(parts.attended.dropout) > 0.0 or _p(parts.down.dropout) > 0.0
        for parts in layers
    )
    return new_rng_state(device, 1 + SITES_PER_LAYER * len(layers)) if drops else None


def _layer(parts: Parts, cu_seqlens: Tensor, max_seqlen: int, rng_states: Tensor | None, hidden: Tensor) -> Tensor:
    """(T, E) -> (T, E)."""
    rows = (None, None, None) if rng_states is None else rng_states.unbind(0)
    qkv, bias = _qkv(parts, hidden)
    p = _attention_p(parts.attention)
    out = attention(
        qkv,
        cu_seqlens,
        max_seqlen,
        bias=bias,
        softmax_scale=getattr(parts.attention, "scaling", None),
        dropout_p=p,
        rng_state=rows[0] if p else None,
    )
    attended = _end(parts.attended, out.flatten(1), hidden, rows[1])
    gelu = _GELUS.get(type(parts.activation))
    if gelu is not None and plain(parts.up, Int8Linear) and plain(parts.down.dense, Int8Linear):
        x = parts.up.feed_forward(attended, parts.down.dense, gelu)
        return _end(parts.down, x, attended, rows[2], projected=True)
    return _end(parts.down, _intermediate(parts, attended), attended, rows[2])


def _qkv(parts: Parts, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Queries, keys and values (T, 3, N, D), and their bias (3, N, D) where it is still to be added."""
    denses, heads = parts.qkv, parts.heads
    whole = getattr(denses[0], "whole", None)
    if whole is not None and all(plain(dense, Int8Linear) for dense in denses):
        return project(hidden, whole).unflatten(1, (3, *heads)), whole.bias.view(3, *heads)
    if not all(plain_linear(dense) for dense in denses):
        return torch.stack([dense(hidden) for dense in denses], dim=1).unflatten(2, heads), None
    bias = torch.cat([dense.bias for dense in denses]).view(3, *heads)
    return linear(hidden, [dense.weight for dense in denses]).unflatten(1, (3, *heads)), bias


def _intermediate(parts: Parts, hidden: Tensor) -> Tensor:
    """(T, E) -> (T, F)."""
    gelu = _GELUS.get(type(parts.activation))
    if gelu is None or not plain_linear(parts.up):
        out: Tensor = parts.activation(parts.up(hidden))
        return out
    return linear(hidden, parts.up.weight, parts.up.bias, activation=gelu)


def _end(end: End, x: Tensor, residual: Tensor, rng_state: Tensor | None, *, projected: bool = False) -> Tensor:
    """x (T, E) or (T, F), or (T, E) where it is `projected` but for the bias, residual (T, E) -> (T, E)."""
    dense, norm, dropout = end
    if not (plain_norm(norm) and droppable(dropout)):
        out: Tensor = norm(dropout(x + dense.bias if projected else dense(x)) + residual)
        return out
    p = _p(dropout)
    rng_state = rng_state if p else None
    if plain_linear(dense) or plain(dense, Int8Linear):
        x = x if projected else project(x, dense)
        return add_norm(x, residual, dense, norm, dropout_p=p, rng_state=rng_state)
    x = dense(x).to(residual.dtype)
    return add_layer_norm(x, residual, norm.weight, norm.bias, dropout_p=p, eps=norm.eps, rng_state=rng_state)
